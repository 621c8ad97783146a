"""Evaluation and sampling during training, which must not change the training."""

import gc
import json
import shutil
import signal
import weakref

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder
from helpers import QUICK
from PIL import Image, ImageFont

from trainer.config import ASSETS
from trainer.models import execution
from trainer.phases import evaluation
from trainer.phases.assembly import assemble
from trainer.phases.micro_batches import loss_of
from trainer.reporting import metrics
from trainer.run import finish, run, train
from trainer.sampling import drawer, pictures
from trainer.storage import result
from trainer.system import memory, signals
from trainer.system.memory import Peaks
from trainer.training.gradients import Pass

CPU = torch.device("cpu")


@pytest.fixture
def begun(composed, tmp_path):
    """A run before its first step: begun("optim=lion") -> (state, writer)."""

    def make(*options, stop=()):
        config = composed(*QUICK, *options)
        state = assemble(config, tmp_path, None, stop)
        return state, metrics.Metrics(tmp_path, config, 0)

    return make


def draw(sampler):
    return sampler.decode(sampler.denoise())


def pixels(drawn):
    return [np.array(picture) for picture in drawn]


def test_pictures_differ_by_the_weights_alone_with_a_sampler_that_draws_noise(begun, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(ASSETS / "tiny_sdxl", model)
    for path, change in (
        ("scheduler/scheduler_config.json", {"_class_name": "EulerAncestralDiscreteScheduler"}),
        ("model_index.json", {"scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"]}),
    ):
        old = json.loads((model / path).read_text())
        (model / path).write_text(json.dumps(old | change))
    state, _ = begun(f"model.path={model}", "log.sample_count=3", "log.sample_steps=3")
    before = torch.get_rng_state()
    first, again = pixels(draw(state.sampler)), pixels(draw(state.sampler))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(before, torch.get_rng_state())
    state.sampler.batch_size = 1  # pictures do not depend on their batch either
    alone = pixels(draw(state.sampler))
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(first, alone, strict=True))


def test_a_unet_is_in_training_again_after_it_has_drawn(begun):
    state, _ = begun("log.sample_count=1", "log.sample_steps=1")
    assert state.model.unet.training
    draw(state.sampler)
    assert state.model.unet.training


def test_a_unet_that_leaves_no_room_for_the_vae_goes_aside_for_it(begun, monkeypatch):
    state, _ = begun("log.sample_count=1", "log.sample_steps=2")
    expected = pixels(draw(state.sampler))
    moves, load_vae = [], state.model.load_vae

    def crowded():
        if not moves:
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert moves == ["cpu"]
        return load_vae()

    monkeypatch.setattr(state.model, "load_vae", crowded)
    monkeypatch.setattr(state.model.unet, "to", lambda place: moves.append(str(place)))
    assert np.array_equal(pixels(draw(state.sampler)), expected)
    assert moves == ["cpu", "cpu"]  # away, and back to the run's device


def test_a_vae_without_room_is_gone_before_the_unet_comes_back(begun, monkeypatch, caplog):
    state, writer = begun("log.sample_count=1", "log.sample_steps=1")
    moves, made = [], []

    def crowded(self, scaled):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def load_vae(load=state.model.load_vae):
        vae = load()
        made.append(weakref.ref(vae))
        return vae

    def moved(place):
        gc.collect()
        moves.append((str(place), sum(vae() is not None for vae in made)))

    monkeypatch.setattr(AutoencoderKL, "decode", crowded)
    monkeypatch.setattr(state.model, "load_vae", load_vae)
    monkeypatch.setattr(state.model.unet, "to", moved)
    assert evaluation.sample(state, writer) is None
    assert moves == [("cpu", 0), ("cpu", 0)]
    assert "no pictures at step 0 (CUDA out of memory); the run continues" in caplog.text


def test_a_vae_that_has_no_room_at_all_decodes_in_tiles_and_says_so(begun, monkeypatch, caplog):
    state, _ = begun("log.sample_count=2", "log.sample_steps=2")
    latents = state.sampler.denoise()
    expected = pixels(state.sampler.decode(latents))
    decoder, sizes = Decoder.forward, []

    def crowded(self, latent, *rest):
        sizes.append(tuple(latent.shape[-2:]))
        if max(sizes[-1]) > latents[0].shape[-1] // 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decoder(self, latent, *rest)

    monkeypatch.setattr(Decoder, "forward", crowded)
    monkeypatch.setattr(drawer, "TILE", 32)
    for tiled, whole in zip(pixels(state.sampler.decode(latents)), expected, strict=True):
        assert tiled.shape == whole.shape
        assert np.abs(tiled.astype(float) - whole).mean() < 12  # of 255; the context is smaller
    assert len(sizes) > 2 + 2 * 4
    assert caplog.text.count("decodes in tiles of 32 pixels") == 1


def test_averages_are_not_the_models_weights_while_the_vae_decodes(begun, monkeypatch):
    state, writer = begun(
        "model.dtype=bfloat16", "ema=bf16", "log.sample_count=1", "log.sample_steps=1"
    )
    assert state.ema.config.sample == "average"
    own = next(state.model.unet.parameters()).data_ptr()
    seen = []

    def decode(latents):
        seen.append(next(state.model.unet.parameters()).data_ptr())
        raise MemoryError("enough")

    monkeypatch.setattr(state.sampler, "decode", decode)
    evaluation.sample(state, writer)
    assert seen == [own]


def test_a_signal_while_the_result_is_written_ends_the_process_of_a_complete_run(
    composed, tmp_path, monkeypatch
):
    """A sweep does not go on with its next run."""
    write = result.write

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return write(*arguments)

    monkeypatch.setattr(result, "write", interrupted)
    config = composed(*QUICK, "schedule.steps=1", "method=lora")
    with pytest.raises(SystemExit) as ended:
        run(config, tmp_path)
    assert ended.value.code == 128 + signal.SIGINT
    assert (tmp_path / "lora/pytorch_lora_weights.safetensors").is_file()
    assert "eval_loss_after" in json.loads((tmp_path / "summary.json").read_text())


def test_a_signal_ends_an_evaluation_and_the_drawing_of_pictures(begun):
    stop = []
    state, writer = begun("log.sample_count=2", stop=stop)
    stop.append(signal.SIGTERM)
    assert evaluation.evaluate(state, writer) == {}
    assert evaluation.sample(state, writer) is None
    with pytest.raises(signals.Stopped):
        draw(state.sampler)
    assert not list(state.folder.glob("samples/*"))
    assert not any("eval/loss" in row for row in metrics.read(state.folder / "metrics.jsonl"))


def test_what_is_looked_at_leaves_the_compilers_graphs_to_training(begun, monkeypatch):
    torch._dynamo.reset()
    made = []

    def backend(graph, inputs):
        made.append(torch.is_grad_enabled())
        return graph.forward

    monkeypatch.setattr(execution, "COMPILER", backend)
    state, writer = begun("runtime.compile=regional", "log.sample_count=1", "log.sample_steps=1")
    evaluation.evaluate(state, writer)
    evaluation.sample(state, writer)
    assert made == []
    state.backward.run([Pass(lambda: loss_of(state, 0)[0])])
    assert made
    assert all(made)


def test_the_peak_of_training_is_told_from_the_rest():
    gc.collect()  # freeing earlier tests' garbage later would make room
    peaks = Peaks(CPU)
    torch.ones(1 << 26, dtype=torch.uint8)
    peaks.end("rest")
    if memory.peak_bytes(CPU) > memory.resident_bytes() + (1 << 25):
        pytest.skip("this container does not let a process reset its peak memory")
    block = torch.ones(3 << 26, dtype=torch.uint8)
    del block
    peaks.end("training")
    most = peaks.training
    assert peaks.run == most
    block = torch.ones(6 << 26, dtype=torch.uint8)
    del block
    peaks.end("rest")
    assert peaks.training == most
    assert peaks.run > most + (2 << 26)


LETTERS = ["café", "кот", "猫", "😀 or ❤️", "two\nlines", "\ud800", "'\"\\"]


@pytest.mark.parametrize("fonts", ["of this machine", "of none"])
def test_captions_in_any_letters_are_told_apart_on_a_grid(monkeypatch, fonts):
    """A font draws the same box for every letter it lacks."""
    if fonts == "of none":
        monkeypatch.setattr(pictures, "_fonts", lambda: [ImageFont.load_default(11)])
    tile = Image.new("RGB", (128, 128))
    swapped = str.maketrans("éк猫😀\n\ud800'", "èт犬😁\t\ud801`")
    for caption in LETTERS:
        pair = [pictures.grid({"": [tile]}, [c]) for c in (caption, caption.translate(swapped))]
        assert pair[0].tobytes() != pair[1].tobytes(), caption


def test_a_long_caption_has_up_to_three_lines():
    tile, line = Image.new("RGB", (128, 128)), "two hearts on a very long boat"
    captions = ["a cat", f"{line} {line}", f"{line} {line} {line}", f"{line} {line} {line} more"]
    grids = [pictures.grid({"": [tile]}, [caption]) for caption in captions]
    assert [grid.height - 128 - 6 for grid in grids] == [14, 42, 42, 42]
    assert len({grid.tobytes() for grid in grids[1:3]}) == 2


def test_what_no_font_has_is_escaped_and_the_font_with_the_most_letters_is_taken(monkeypatch):
    class Font:
        def __init__(self, letters):
            self.letters = letters

        def getmask(self, character):
            return (character if character in self.letters else "box").encode()

    ascii_only, wide = Font("cat "), Font("catéк ")
    monkeypatch.setattr(pictures, "_fonts", lambda: [ascii_only, wide])
    assert pictures.written("a cat") == ("a cat", ascii_only)
    assert pictures.written("é к 猫\n") == ("é к \\u732b\\n", wide)


def test_a_grid_compares_pictures_of_the_same_captions_only(begun, caplog):
    state, writer = begun("log.prompts=[a cat]", "log.sample_steps=1")
    evaluation.sample(state, writer)
    written = state.folder / "samples/step-000000"
    assert len(pictures.load(written, ["a cat"])) == 1
    assert pictures.load(written, ["a dog"]) == []
    assert pictures.load(written, ["a cat", "a dog"]) == []
    state.step = 1
    evaluation.sample(state, writer)
    assert "no 'before' row" not in caplog.text
    pictures.save(written, pictures.load(written, ["a cat"]), ["a dog"])
    evaluation.sample(state, writer)
    assert "no 'before' row" in caplog.text


def test_a_grid_has_rows_of_the_pictures_in_between_evenly_chosen_of_many(begun, monkeypatch):
    state, writer = begun("log.prompts=[a cat]", "log.sample_steps=1")
    drawn, grid = [], pictures.grid
    monkeypatch.setattr(pictures, "grid", lambda rows, _: drawn.append([*rows]) or grid(rows, _))
    for step in range(11):
        state.step = step
        pictures.save(
            state.folder / f"samples/step-{step:06d}", [Image.new("RGB", (9, 9))], ["a cat"]
        )
    for step in (0, 2, 10):
        state.step = step
        evaluation.sample(state, writer)
    assert drawn == [
        ["step 0"],
        ["before", "step 1", "step 2"],
        ["before", *(f"step {n}" for n in (1, 3, 4, 6, 7, 9)), "step 10"],
    ]


def test_the_base_model_is_drawn_as_it_predicts_and_its_loss_is_not_compared(
    begun, monkeypatch, caplog
):
    """The first pictures are the same with and without a change of the prediction type."""
    options = ["log.sample_count=2", "log.sample_steps=3", "schedule.steps=1"]
    same, writer = begun(*options)
    evaluation.sample(same, writer)
    captions = same.sampler.captions()
    first = pixels(pictures.load(same.folder / "samples/step-000000", captions))
    options += ["noise.prediction=epsilon", "noise.zero_terminal_snr=false"]
    state, writer = begun(*options)
    caplog.set_level("INFO")
    train(state, writer)
    finish(state, writer)
    again = pixels(pictures.load(state.folder / "samples/step-000000", captions))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert state.sampler._denoiser.scheduler.config.prediction_type == "epsilon"
    assert "(not comparable: the model predicted v_prediction, not epsilon)" in caplog.text


@pytest.mark.filterwarnings("error")
def test_a_ruined_models_pictures_are_drawn_without_a_warning(begun):
    state, _ = begun("log.sample_count=1", "log.sample_steps=1")
    for parameter in state.model.unet.parameters():
        parameter.data.fill_(float("nan"))
    assert len(draw(state.sampler)) == 1


@pytest.mark.parametrize(("side", "tile"), [(64, 96), (200, 200), (1024, 256)])
def test_a_grid_shows_large_pictures_larger(side, tile):
    rows = {"now": [Image.new("RGB", (side, side // 2), "red")] * 2}
    width, height = pictures.grid(rows, ["a", "b"]).size
    assert width == 64 + 2 * tile
    assert height == 14 + tile + 6
