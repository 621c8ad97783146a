"""`python -m trainer.draw`: the same prompts with several models and LoRAs."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_export
from models import TINY, make_sd15
from peft import LoHaConfig, LoKrConfig
from PIL import Image
from test_lora_files import trained

from trainer.draw import __main__ as command
from trainer.draw import rows, sources
from trainer.draw.request import Request
from trainer.formats import lora, origin
from trainer.formats.adapters import attached, of_models
from trainer.models.model import Model
from trainer.models.quantization import quantize
from trainer.sampling import pictures
from trainer.sampling.drawer import Drawer

DRAWN = ("log.sample_count=2", "log.sample_steps=2")
LORA = ("method=lora", "optim.lr=0.02", *DRAWN)
FAST = ("--steps=2", "--guidance=1")


@pytest.fixture
def draw(tmp_path, capsys):
    """The command in this process: draw(source, "--steps=2") -> (exit status, stderr), with the
    grid in tmp_path/out.png."""

    def call(*arguments, out="out.png"):
        try:
            status = command.main([*map(str, arguments), f"--out={tmp_path / out}"])
        except SystemExit as leaving:
            status = leaving.code
        return status, capsys.readouterr().err

    return call


@pytest.fixture
def grids(monkeypatch):
    """The rows of every grid that is made: [{title: pictures}]."""
    made, grid = [], pictures.grid
    monkeypatch.setattr(
        pictures, "grid", lambda rows, *more: made.append(dict(rows)) or grid(rows, *more)
    )
    return made


@pytest.fixture(scope="module")
def sd15_folder(tmp_path_factory):
    return make_sd15(tmp_path_factory.mktemp("draw") / "sd15")


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory):
    """A LoRA of the tiny SDXL's UNet and text encoders."""
    path = tmp_path_factory.mktemp("draw") / "cats.safetensors"
    return lora.save_lora(path, "kohya", trained(TINY), "sdxl")


def pixels(folder):
    return np.stack([np.array(Image.open(path)).astype(int) for path in sorted(folder.iterdir())])


def drawn(tmp_path, out="out"):
    """The pictures of each row: {name of its folder: (count, h, w, 3)}."""
    return {path.name: pixels(path) for path in sorted((tmp_path / out).iterdir())}


def apart(a, b):
    """The mean difference of two rows of pictures, of 255."""
    return np.abs(a - b).mean()


EVERY = ("log.sample_count=24", "log.sample_steps=1", "data.cache=null")


@pytest.mark.parametrize(
    ("options", "most"),  # by how much a pixel may differ, of 255
    [
        pytest.param((*LORA, *EVERY), 0, id="lora"),
        # The captions are encoded in other batches than the run's, which changes last bits.
        pytest.param(DRAWN, 1, id="full"),
        pytest.param((*LORA, "method.dora=true", "method.train=[unet,text_encoder]"), 1, id="dora"),
        pytest.param((*LORA, "model.quantization=int8", "model.dtype=bfloat16"), 1, id="int8"),
        pytest.param(
            (*LORA, "noise.prediction=epsilon", "noise.zero_terminal_snr=false"), 1, id="epsilon"
        ),
        pytest.param(
            (*LORA, 'log.prompts=["a heart --w 96 --n grey --l 3","a cat --d 7"]'), 1, id="prompts"
        ),
    ],
)
def test_what_a_run_has_drawn_is_drawn_again_to_the_pixel(options, most, finished, draw, tmp_path):
    run = finished("run", *options)
    assert draw(run)[0] == 0
    folders = sorted((tmp_path / "out").iterdir())
    for folder, step in zip(folders, ("step-000000", "step-000004"), strict=True):
        own = sorted((run / "samples" / step).iterdir())
        assert len(own) == len([*folder.iterdir()])
        for path in own:
            then, again = Image.open(path), Image.open(folder / path.name)
            assert again.text["caption"] == then.text["caption"]
            difference = np.abs(np.array(again).astype(int) - np.array(then))
            assert difference.max() <= most, path
    before, after = (np.array(Image.open(folder / "00.png")).astype(int) for folder in folders)
    assert apart(before, after) > 2  # else this proves nothing


@pytest.mark.parametrize(
    "kind",
    [{}, {"use_dora": True}, {"config": LoKrConfig}, {"config": LoHaConfig}],
    ids=["lora", "dora", "lokr", "loha"],
)
def test_a_scale_draws_what_a_merged_model_draws_and_0_the_base(kind, draw, tmp_path, capsys):
    """UNet and text encoders."""
    path = lora.save_lora(tmp_path / "a.safetensors", "kohya", trained(TINY, **kind), "sdxl")
    models = {scale: tmp_path / f"merged{scale}" for scale in (1, 0.5, -1)}
    for scale, model in models.items():
        merge = ("--base", TINY, "--merge", f"--scale={scale}")
        assert run_export(capsys, path, model, *merge)[0] == 0
    prompts = ("--prompt", "two hearts", "--prompt", "a cat", *FAST)
    more = (f"--base={TINY}", "--scale=1,0.5,-1,0", *prompts)
    assert draw(path, *models.values(), *more)[0] == 0
    base, *scaled, nothing = [*drawn(tmp_path).values()][:5]
    assert np.array_equal(nothing, base)
    for own, merged in zip(scaled, [*drawn(tmp_path).values()][5:], strict=True):
        assert np.abs(own - merged).max() <= 2
        assert apart(own, base) > 5  # else this proves nothing


def test_both_formats_of_a_lora_draw_the_same(finished, draw, tmp_path):
    run = finished("run", *LORA)
    files = sorted((run / "lora").glob("*.safetensors"))
    assert len(files) == 2
    assert draw(*files, "--no-base")[0] == 0
    one, two = drawn(tmp_path).values()
    assert np.array_equal(one, two)


def test_all_results_of_a_run_are_rows_in_the_order_of_their_steps(finished, draw, tmp_path, grids):
    run = finished("run", *LORA, "method.export_every=1", "name=cats")
    assert draw(run, "--all-results", "--prompt=a cat")[0] == 0
    assert [*grids[-1]] == ["tiny_sdxl\n(base)", *(f"cats\nstep {step}" for step in (1, 2, 3, 4))]
    assert len({row.tobytes() for row in drawn(tmp_path).values()}) == 5
    assert draw(run / "results/step-000002", "--prompt=a cat", "--no-base", out="two.png")[0] == 0
    (two,) = drawn(tmp_path, "two").values()
    assert np.array_equal(two, drawn(tmp_path)["03-cats-step-2"])


def test_results_in_single_files_are_found_in_their_run(finished, draw, tmp_path, grids):
    export = ("method.export=[single_file]", "method.export_every=2")
    run = finished("run", "name=cats", *export, *DRAWN)
    assert draw(run, "--all-results", "--no-base")[0] == 0
    assert [*grids[-1]] == ["original", "cats\nstep 2", "cats\nstep 4"]
    assert draw(run / "cats.safetensors", "--prompt=ambulance", *FAST, out="file.png")[0] == 0
    assert apart(drawn(tmp_path)["02-cats-step-4"][0], drawn(tmp_path, "file")["01-cats"][0]) < 1


def test_a_runs_originals_are_above_what_its_captions_draw(finished, draw, grids):
    run = finished("run", *LORA)
    assert draw(run)[0] == 0
    assert [*grids[-1]][:2] == ["original", "tiny_sdxl\n(base)"]
    assert draw(run, "--prompt=a cat", out="other.png")[0] == 0
    assert "original" not in grids[-1]


def test_models_are_rows_in_the_given_order_with_names_that_differ(
    files, draw, tmp_path, grids, sd15_folder
):
    other = tmp_path / "other/sdxl.safetensors"
    other.parent.mkdir()
    other.symlink_to(files["sdxl"])
    sources = (files["sdxl"], sd15_folder, other, TINY)
    assert draw(*sources, "--prompt=a cat", "--resolution=64", *FAST)[0] == 0
    folder = files["sdxl"].parent.name
    names = [f"{folder}/sdxl", "sd15", "other/sdxl", "tiny_sdxl"]
    assert [*grids[-1]] == names
    one, sd15, again, tiny = drawn(tmp_path).values()
    assert np.array_equal(one, again)
    assert np.array_equal(one, tiny)
    assert apart(one, sd15) > 5


def test_the_same_base_model_with_other_options_has_a_row_of_its_own(finished, draw, grids):
    one, two = finished("one", *LORA), finished("two", *LORA)
    config = (two / "config.yaml").read_text()
    (two / "config.yaml").write_text(config.replace("clip_skip: null", "clip_skip: 0"))
    assert draw(one, two, "--prompt=a cat")[0] == 0
    base = "tiny_sdxl\n(base)"
    assert [*grids[-1]] == [base, "one\nstep 4", f"{base}\n(2)", "two\nstep 4"]


def test_a_base_model_that_is_given_is_drawn_once_in_its_place(finished, draw, grids, monkeypatch):
    run = finished("run", *LORA, "name=cats")
    monkeypatch.chdir(TINY.parent)  # the run has an absolute path
    assert draw(run, "tiny_sdxl", "--prompt=a cat", *FAST)[0] == 0
    assert [*grids[-1]] == ["cats\nstep 4", "tiny_sdxl"]


def test_sources_have_the_shortest_names_that_differ(finished):
    def names(*paths):
        return [source.title for source in sources.found([*map(str, paths)], False)]

    run = finished("run", *LORA, "name=cats")
    assert names(run / "lora") == ["cats"]  # not pytorch_lora_weights
    there = shutil.copytree(run, run.parent / "there/run")
    assert names(run, there) == [f"{run}\nstep 4", f"{there}\nstep 4"]
    files = [run / "lora/pytorch_lora_weights.safetensors", run / "lora/cats.safetensors"]
    assert names(*files) == [*map(str, files)]


def test_a_scale_with_which_numbers_are_not_finite_is_named(lora_file, draw, tmp_path, caplog):
    path = lora.save_lora(tmp_path / "unet.safetensors", "kohya", trained(TINY, ["unet"]), "sdxl")
    more = (f"--base={TINY}", "--no-base", "--scale=1,1e30", "--prompt=a cat", *FAST)
    assert draw(path, *more)[0] == 0
    said = [text for text in caplog.messages if "not all of its numbers are finite" in text]
    assert [text.partition(":")[0] for text in said] == ["unet, scale 1e+30"]
    status, error = draw(lora_file, *more, out="other.png")
    assert status == 2
    assert error.startswith("error: cats, scale 1e+30: the text encoders' embedding")


def test_a_long_name_is_shortened_in_the_folder_of_its_pictures(lora_file, draw, tmp_path):
    long = tmp_path / f"{'é' * 115}.safetensors"
    long.symlink_to(lora_file)
    scale = f"--scale={'0.' + '3' * 40}"
    assert draw(long, "--prompt=a cat", "--no-base", f"--base={TINY}", scale, *FAST)[0] == 0
    assert [*drawn(tmp_path)] == [f"01-{'é' * 60}"]


def test_the_model_that_a_full_run_started_from_may_be_gone(finished, draw, tmp_path, caplog):
    run = finished("run", *DRAWN)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(f"path: {TINY}", f"path: {tmp_path / 'no'}"))
    assert draw(run)[0] == 0
    assert [*drawn(tmp_path)] == ["01-adafactor8bit-full-step-4"]
    assert "no row of the base model: the model that" in caplog.text


@pytest.mark.parametrize("told", [{}, {"ss_v_parameterization": "True"}])
def test_a_lora_for_v_prediction_is_sampled_as_such(told, sd15_folder, draw, tmp_path, capsys):
    """On a model that predicts noise; its merged model has the scheduler that it needs."""
    models = trained(sd15_folder, ["unet"])
    path = lora.save_lora(tmp_path / "a.safetensors", "kohya", models, "sd15", more_metadata=told)
    assert run_export(capsys, path, tmp_path / "m", "--base", sd15_folder, "--merge")[0] == 0
    predicts = origin.at(str(tmp_path / "m")).config("scheduler")["prediction_type"]
    assert predicts == ("v_prediction" if told else "epsilon")
    prompts = ("--prompt=a cat", "--resolution=64", *FAST)
    assert draw(path, tmp_path / "m", f"--base={sd15_folder}", *prompts)[0] == 0
    base, own, merged = drawn(tmp_path).values()
    assert np.abs(own - merged).max() <= 2
    assert apart(own, base) > 1


def test_prompts_have_their_own_options_or_those_of_the_command(draw, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# mine\ntwo hearts --d 5\ntwo hearts --l 4 --n grey\n")
    lines = ("--prompt", "two hearts --w 96 --h 32", "--prompt", "two hearts --d 5")
    more = ("--seed=4", "--resolution=32", f"--prompts-file={prompts}", *FAST)
    assert draw(TINY, *lines, *more)[0] == 0
    found = [Image.open(path) for path in sorted((tmp_path / "out/01-tiny_sdxl").iterdir())]
    assert [picture.size for picture in found] == [(96, 32), (32, 32), (32, 32), (32, 32)]
    assert found[1].tobytes() == found[2].tobytes() != found[3].tobytes()
    assert found[3].text["caption"] == "two hearts --l 4 --n grey"
    guided = ("--guidance=4", "--negative=grey", "--steps=2", "--seed=7", "--resolution=32")
    assert draw(TINY, "--prompt=two hearts", *guided, out="guided.png")[0] == 0
    assert np.array_equal(drawn(tmp_path, "guided")["01-tiny_sdxl"][0], np.array(found[3]))


def test_ctrl_c_keeps_the_rows_and_pictures_that_are_drawn(draw, tmp_path, monkeypatch, grids):
    original, calls = Drawer._denoise, []

    def interrupted(self, places):
        calls.append(places)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(self, places)

    monkeypatch.setattr(Drawer, "_denoise", interrupted)
    lines = ("--prompt=a cat", "--prompt=a dog", "--batch-size=1", *FAST)
    copy = tmp_path / "copy"
    copy.symlink_to(TINY)
    assert draw(copy, TINY, *lines)[0] == 128 + signal.SIGINT
    assert len(calls) == 3
    assert [len(row) for row in drawn(tmp_path).values()] == [2, 1]
    assert [[picture is not None for picture in row] for row in grids[-1].values()] == [
        [True, True],
        [True, False],
    ]
    assert (tmp_path / "out.png").is_file()


def test_memory_that_runs_out_is_one_line_that_says_what_needs_less(draw, tmp_path, monkeypatch):
    def crowded(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Model, "load_unet", crowded)
    status, error = draw(TINY, "--prompt=a cat")
    assert status == 2
    assert "out of memory; try --dtype=bfloat16, --quantization=int8" in error
    assert not (tmp_path / "out.png").exists()


def test_mistakes_are_one_line_before_anything_is_loaded(
    draw, finished, tmp_path, monkeypatch, lora_file, sd15_folder
):
    run, full = finished("run", *LORA), finished("full", "log.sample_count=0")
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text((run / "config.yaml").read_text())
    unfinished = finished("unfinished", *LORA, "method.export_every=2")
    (unfinished / "lora").rename(tmp_path / "elsewhere")
    gone = finished("gone", *LORA)
    config = (gone / "config.yaml").read_text()
    (gone / "config.yaml").write_text(config.replace(f"path: {TINY}", f"path: {tmp_path / 'no'}"))
    (tmp_path / "there.png").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(Model, "_load", lambda *_: pytest.fail("a part was loaded"))
    before = sorted(tmp_path.rglob("*"))
    prompt, based = "--prompt=a cat", f"--base={TINY}"
    for arguments, said in (
        ([TINY], 'as no run here drew pictures; say it: --prompt "a cat"'),
        ([full], 'as no run here drew pictures; say it: --prompt "a cat"'),
        ([lora_file, prompt], "cats.safetensors is a LoRA, and draws with the model that it "),
        ([lora_file, prompt, f"--base={sd15_folder}"], "--base=MODEL names its own"),
        ([lora_file, prompt, "--base=sd_xl.safetensors"], "--base=sd_xl.safetensors"),
        ([gone], f"is no longer at {tmp_path / 'no'}; give its new location: --base=MODEL"),
        ([tmp_path / "nothing", prompt], f"SOURCE={tmp_path / 'nothing'} does not exist"),
        ([tmp_path / "empty", prompt], "empty is not a model, a LoRA, a run or its result"),
        ([begun], "begun is a run without a result; python -m trainer.export"),
        ([unfinished], "unfinished has no result yet; --all-results draws with its"),
        (
            [run, "--all-results"],
            "--all-results: none is the folder of a run with intermediate results",
        ),
        ([run / "checkpoints/step-000004"], "is a checkpoint; write what it holds first"),
        ([run, run], "is given twice"),
        ([TINY, prompt, "--scale=0.5"], "--scale is the strength of a LoRA, and there is none"),
        ([TINY, prompt, based], "--base is the model of LoRAs, and there is none"),
        ([lora_file, prompt, based, "--scale=nan"], "--scale=nan must be a finite number"),
        ([lora_file, prompt, based, "--scale=1,0.5,1"], "--scale has 1 twice; once is enough"),
        ([lora_file, prompt, based, "--scale=a,b"], "'a,b' is not a list of numbers"),
        ([TINY, "--prompt=a cat --w 833"], "'a cat --w 833': --w 833 is not a multiple of 8"),
        ([TINY, "--prompt=a --n b", "--guidance=1"], "--l 5, or --guidance=5"),
        ([TINY, prompt, "--guidance=1", "--negative=b"], "--negative only has an effect with"),
        ([TINY, f"--prompts-file={tmp_path / 'none.txt'}"], "none.txt cannot be read"),
        ([TINY, prompt, "--resolution=100"], "--resolution=100 is not a multiple of 8"),
        ([TINY, prompt, "--steps=0"], "--steps=0 must be from 1 to 1000"),
        ([TINY, prompt, "--guidance=-1"], "--guidance=-1 must be from 0 to 100"),
        ([TINY, prompt, "--seed=-1"], "--seed=-1 must be from 0"),
        ([TINY, prompt, "--batch-size=0"], "--batch-size=0 must be at least 1"),
        ([TINY, prompt, "--device=tpu"], "--device=tpu is not a device"),
    ):
        status, error = draw(*arguments)
        assert status == 2, arguments
        assert said in error, (arguments, error)
        assert error.count("\n") == 1 or "usage:" in error, error
    for out, said in (
        ("there.png", "there.png already exists; name another file"),
        ("folder.png", "folder already exists; name another file"),
        ("grid.jpg", "the grid is a PNG"),
        ("there.png/below.png", "nothing can be written in "),
    ):
        status, error = draw(TINY, prompt, out=out)
        assert (status, said in error) == (2, True), error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "FlowMatchHeunDiscreteScheduler ("),
        ({"_class_name": "SchedulerOfSomebody"}, "SchedulerOfSomebody ("),
        ({"beta_schedule": "steep"}, "steep is not implemented"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0},
            "the shift of the model's scheduler, FlowMatchEulerDiscreteScheduler, is 0;",
        ),
    ],
)
def test_a_scheduler_that_cannot_be_drawn_with_is_named_before_anything_is_loaded(
    own, says, draw, tiny, monkeypatch
):
    path = tiny / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    monkeypatch.setattr(Model, "_load", lambda *_: pytest.fail("a part was loaded"))
    status, error = draw(tiny, "--prompt=a cat")
    assert status == 2
    assert says in error
    assert "scheduler/scheduler_config.json" in error
    assert error.count("\n") == 1


def test_a_runs_lora_is_not_drawn_with_a_model_that_has_changed(finished, tiny, draw, tmp_path):
    run = finished("run", f"model.path={tiny}", *LORA)
    path = tiny / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.02}))
    status, error = draw(run)
    assert status == 2
    assert "is not the one that the run of" in error
    assert draw(run, f"--base={tiny}")[0] == 0  # if that is what is wanted


def test_a_gpu_draws_in_bf16_unless_a_run_or_the_user_says_otherwise(finished):
    run = finished("run", *LORA, "model.dtype=float32", "model.compute=bfloat16")

    def kinds(names, device, **options):
        request = Request(sources=[], out=Path("a.png"), lines=[], **options)
        found = sources.found([*map(str, names)], False)
        every = rows.of_sources(found, request, device)
        return {(row.model.dtype, row.model.compute) for row in every}

    assert kinds([TINY], "cuda") == {("bfloat16", "same")}
    assert kinds([TINY], "cpu") == {("float32", "same")}
    assert kinds([TINY, run], "cuda") == {("float32", "bfloat16")}
    assert kinds([TINY, run], "cuda", dtype="float16") == {("float16", "same")}


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_a_lora_that_comes_and_goes_leaves_the_weights_as_they_were(kind):
    models = trained(TINY, ["unet"])
    held = of_models(models)["unet"]
    unet = origin.at(str(TINY)).load("unet", torch.bfloat16)
    if kind != "none":
        unet.apply(lambda layer: quantize(layer, kind))
    before = {name: (id(x), x.clone()) for name, x in unet.state_dict(keep_vars=True).items()}
    for scale in (1.0, 0.5):
        with attached(unet, held, scale):
            assert any("lora_A" in name for name in unet.state_dict())
    after = unet.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    assert all(id(after[name]) == known for name, (known, _) in before.items())
    assert all(torch.equal(after[name], value) for name, (_, value) in before.items())
    assert not hasattr(unet, "peft_config")
    assert not any(p.requires_grad for p in unet.parameters()) or kind == "none"
