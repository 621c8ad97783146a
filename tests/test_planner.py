"""The plan of a run's memory: `trainer/planner/` and `trainer/config/remedies.py`."""

import gc
import json
import subprocess
import sys

import pytest
import torch

from trainer import planner, run
from trainer.config import remedies
from trainer.errors import UserError
from trainer.formats import architectures
from trainer.models.model import Model
from trainer.phases import micro_batches
from trainer.planner import before_run, rehearsal
from trainer.planner.__main__ import _completed, _less, _with
from trainer.planner.ledger import Ledger
from trainer.planner.page import page
from trainer.planner.rehearsal import rehearse
from trainer.planner.room import Room
from trainer.sampling import drawer
from trainer.system import memory
from trainer.training import optimizers
from trainer.training.gradients import Pass

CPU = torch.device("cpu")
FUSED = ("runtime.fused_backward=true", "method.clip=exact")
CHECKPOINTING = "runtime.gradient_checkpointing=true"
UNSEEN = "log.sample_count=0"  # the rehearsal of drawing takes as long as that of training


def rehearsed(config, device_type="cpu"):
    return rehearse(config, Model(config.model, CPU, with_weights=False), device_type)


def sdxl(*overrides):
    """A configuration of the published SDXL; its weights are not needed."""
    return _completed(["model=sdxl", *overrides])[1]


def test_what_a_plan_needs_no_place_for_is_assumed_and_what_is_given_stays():
    assert _completed(["optim=lion"])[0] == ["optim=lion"]  # the demo ships its pictures
    *assumed, model, given = _completed(["model=sdxl"])[0]
    assert ({*assumed}, given) == ({"data.path=.", "data=folder"}, "model=sdxl")
    assert model == f"model.path={architectures.folder('sdxl')}"
    assert sdxl("data.path=/tmp").data.path == "/tmp"
    both = sdxl("experiment=sdxl", "data.sources=[{path: /tmp}]").data
    assert (both.path, [source.path for source in both.sources]) == (None, ["/tmp"])


def test_a_ledger_counts_what_is_alive_and_a_view_adds_nothing():
    with Ledger("made") as ledger:
        x = torch.empty(1024)
        y = x.view(32, 32)
        assert ledger.alive["made"] == 4096
        del x
        assert ledger.alive["made"] == 4096
        del y
        assert ledger.alive["made"] == 0
        z = torch.empty(256)
        ledger.enter([z], "kept")
    assert ledger.alive == {"made": 0, "kept": 1024}
    assert ledger.peak == {"made": 4096}


def test_drawing_is_planned_by_the_largest_prompt(composed):
    small, tall = (
        rehearsed(composed(f"log.prompts=[{line}]")) for line in ("a", "a --w 128 --h 256")
    )
    assert tall.denoising_bytes > 4 * small.denoising_bytes
    assert tall.decoding_bytes > small.decoding_bytes
    assert tall.training == small.training


QUIET = ("runtime.threads=1", UNSEEN)
STEPS = {
    "plain": (),
    "fused": FUSED,
    "checkpointing": (CHECKPOINTING,),
    "accumulated": ("runtime.accumulation=2", "data.batch_size=4"),
    "autocast": ("model.compute=bfloat16",),
    "bf16": ("model.dtype=bfloat16", CHECKPOINTING, *FUSED),
    "lora": ("method=lora", "model.dtype=bfloat16"),
    "dora": ("method=lora", "method.dora=true", CHECKPOINTING),
    "lokr": ("method=lokr", "model.dtype=bfloat16"),
    "lokr-autocast": ("method=lokr", "model.compute=bfloat16", CHECKPOINTING, *FUSED),
    "loha": ("method=loha", "method.targets=[to_q,conv1]", "model.dtype=bfloat16"),
    "text": ("method.train=[unet,text_encoder]", "data.batch_size=4"),
    "rules": ("method.rules=[{pattern: attn, trainable: false}]",),
}


@pytest.mark.parametrize("overrides", STEPS.values(), ids=STEPS)
def test_a_rehearsal_counts_what_a_step_with_numbers_has(composed, tmp_path, overrides):
    config = composed(*QUIET, "optim=adamw", *overrides)
    planned = rehearsed(config).training
    state = run.begin(config, tmp_path)
    passes = [
        Pass(lambda n=batch.number: micro_batches.loss_of(state, n)[0], batch.share)
        for batch in micro_batches.of_step(state)
    ]
    parts = torch.nn.ModuleDict(state.model.trained_parts)
    gc.collect()
    with Ledger("activations") as ledger:
        ledger.enter([*parts.parameters(), *parts.buffers()], "weights")
        state.backward.run(passes)
    found = ledger.peak.total()
    assert planned.weights == ledger.peak["weights"]
    assert planned.optimizer_state == optimizers.state_bytes(state.optimizer)
    held = planned.optimizer_state + planned.optimizer_scratch
    assert planned.peak - held == pytest.approx(found, rel=0.03)


def test_a_gpus_autocast_keeps_norms_in_fp32(composed):
    config = composed("model.compute=bfloat16", UNSEEN)
    cpu, gpu = (rehearsed(config, kind).training.activations for kind in ("cpu", "cuda"))
    assert 1.05 * cpu < gpu < rehearsed(composed(UNSEEN), "cuda").training.activations
    assert torch.nn.functional.group_norm.__module__ == "torch.nn.functional"


@pytest.mark.parametrize("optimizer", ["adafactor8bit", "prodigy_factored", "apollo", "lion8bit"])
def test_the_planned_state_is_what_is_allocated(composed, tmp_path, optimizer):
    config = composed(*QUIET, f"optim={optimizer}")
    state = run.begin(config, tmp_path)
    planned = rehearsed(config).training.optimizer_state
    assert planned == optimizers.state_bytes(state.optimizer)


def test_the_state_of_another_package_is_planned_by_its_first_step(composed):
    config = composed(UNSEEN, "optim=external", "optim.class_path=torch.optim.AdamW")
    found = rehearsed(config)
    steps = 4 * sum(1 for _ in Model(config.model, CPU).empty("unet", "float32").parameters())
    assert found.training.optimizer_state == 2 * 4 * found.num_trained + steps


def test_a_state_that_cannot_be_known_beforehand_is_said_to_be_left_out(composed, monkeypatch):
    def needs_numbers(self, closure=None):
        raise RuntimeError("this one reads its gradients")

    monkeypatch.setattr(torch.optim.SGD, "step", needs_numbers)
    monkeypatch.setattr(optimizers, "_try_step", lambda *_: None)
    config = composed(UNSEEN, "optim=external", "optim.class_path=torch.optim.SGD")
    plan = planner.make(config, Model(config.model, CPU, with_weights=False), "cpu")
    assert plan.rehearsal.training.optimizer_state is None
    assert "without the state of optim=external" in page(plan, planner.card(8))


def test_an_average_costs_its_dtype_where_it_is(composed):
    none, bf16 = (
        rehearsed(composed(f"ema={choice}", UNSEEN)).training for choice in ("none", "bf16")
    )
    assert bf16.averages == 2 * rehearsed(composed(UNSEEN)).num_trained
    assert none.averages == 0
    assert rehearsed(composed("ema=bf16", "method.ema.device=cpu", UNSEEN)).training.averages == 0


@pytest.mark.slow
def test_sdxl_is_planned_as_it_was_measured():
    """Peaks from scripts/measure_sdxl.py: on a CPU without the imports, on an H200 as allocated by
    torch (docs/gpu.md)."""
    low = ("experiment=low_memory", UNSEEN)
    for overrides, device, measured in (
        ((*low, "data.resolution=256", "runtime.gradient_checkpointing=false"), "cpu", 5.737e9),
        ((*low, "data.resolution=512", "runtime.gradient_checkpointing=false"), "cpu", 6.987e9),
        ((*low, "data.resolution=512"), "cpu", 5.541e9),
        ((*low, "data.resolution=1024"), "cuda", 6.17e9),
    ):
        config = sdxl(*overrides)
        plan = planner.make(config, Model(config.model, CPU, with_weights=False), device)
        assert plan.training_bytes - plan.process_bytes == pytest.approx(measured, rel=0.02), (
            overrides
        )


def test_remedies_are_tried_until_it_fits(composed):
    overrides = ["optim=adamw", "data.batch_size=16", UNSEEN]
    config = composed(*overrides)
    model = Model(config.model, CPU, with_weights=False)
    plan = planner.make(config, model, "cuda")
    half = planner.Room(
        free_bytes=plan.libraries_bytes + plan.rehearsal.training.peak // 2, where="a card"
    )
    found = list(_less(plan, overrides, "cuda", half))
    sizes = [plan.needed_bytes, *(better.needed_bytes for _, better in found)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= half.free_bytes < sizes[-2]
    assert {r.overrides for r, _ in found} <= {r.overrides for r in EVERY_REMEDY}


EVERY_REMEDY = [
    remedies.Remedy(overrides=overrides, what="")
    for overrides in (
        ("runtime.fused_backward=true", "method.clip=exact"),
        ("model.dtype=bfloat16",),
        ("runtime.gradient_checkpointing=true",),
        *((f"data.batch_size={16 // n}", f"runtime.accumulation={n}") for n in (2, 4, 8, 16)),
        ("optim=adamw8bit",),
        ("optim=adamw_factored",),
        ("optim=adafactor8bit",),
        ("method=lora",),
    )
]


@pytest.mark.parametrize("optimizer", ["adamw", "sophia", "peer/torch_adafactor"])
@pytest.mark.parametrize("others", [(), ("method=lora", "method.rank=32", "ema=bf16")])
def test_every_remedy_is_accepted(composed, optimizer, others):
    overrides = (f"optim={optimizer}", *others)
    found = [*remedies.of(composed(*overrides))]
    assert len(found) > 3
    for remedy in found:
        composed(*_with(overrides, remedy.overrides))


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ("data.batch_size=12 runtime.accumulation=3", "data.batch_size=6 runtime.accumulation=6"),
        ("data.batch_size=9", "data.batch_size=3 runtime.accumulation=3"),
        ("data.batch_size=7", "data.batch_size=1 runtime.accumulation=7"),
    ],
)
def test_smaller_batches_make_the_same_steps(composed, given, remedy):
    assert remedy in [" ".join(r.overrides) for r in remedies.of(composed(*given.split()))]


@pytest.mark.parametrize(
    ("optimizer", "smaller"),
    [
        ("adamw", "adamw8bit"),
        ("adamw8bit", "adamw_factored"),
        ("muon", "muon8bit"),
        ("adamw_schedulefree", "adamw8bit_schedulefree"),
        ("prodigy", "prodigy_factored"),
        ("adamw_factored", None),
        ("apollo", None),  # adafactor8bit_apollo has another rule
        ("sgd", None),
    ],
)
def test_the_same_optimizer_with_its_state_in_fewer_bits_is_a_remedy(composed, optimizer, smaller):
    found = [
        remedy.overrides
        for remedy in remedies.of(composed(f"optim={optimizer}"))
        if remedy.what.startswith("which has a smaller state")
    ]
    assert found == ([(f"optim={smaller}",)] if smaller else [])


def test_what_is_switched_on_is_no_remedy(composed):
    config = composed(
        *("optim=lomo", "model.dtype=bfloat16", "method=lora", "method.clip=none"),
        *(
            CHECKPOINTING,
            "data.batch_size=1",
            "model.quantization=nf4",
            "model.text_dtype=bfloat16",
        ),
    )
    assert [r.overrides for r in remedies.of(config)] == []


def test_what_this_process_has_already_is_room_for_its_plan(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  4 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "none")
    monkeypatch.setattr(memory, "resident_bytes", lambda: 1000)
    assert planner.room_of(CPU).free_bytes == 4096 + 1000


@pytest.mark.parametrize(
    ("folder", "files"), [("", "max current"), ("memory/", "limit_in_bytes usage_in_bytes")]
)
def test_a_containers_limit_counts_and_its_cached_files_do_not(
    monkeypatch, tmp_path, folder, files
):
    """It uses 2500 of 3000 bytes, 1500 of them for cached files."""
    (tmp_path / folder).mkdir(exist_ok=True)
    limit, used = (tmp_path / f"{folder}memory.{name}" for name in files.split())
    limit.write_text("3000\n")
    used.write_text("2500\n")
    prefix = "total_" if folder else ""
    (tmp_path / f"{folder}memory.stat").write_text(f"anon 1000\n{prefix}inactive_file 1500\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.free_host_bytes() == 2000
    limit.write_text("max\n")
    assert memory.free_host_bytes() > 1e6


def test_without_a_model_or_pictures_the_published_architecture_is_planned():
    config = sdxl()
    assert config.model.path == str(architectures.folder("sdxl"))
    assert config.data.resolution == 1024


def test_a_large_model_is_planned_before_it_is_loaded(tmp_path):
    program = "from trainer import __main__; from trainer.system import memory; "
    program += "memory.LARGE_BYTES = 1; __main__.main()"
    # A process of its own, as a run has: what other tests left to this one would be planned too.
    subprocess.run(
        [sys.executable, "-c", program, *QUIET, "experiment=smoke", f"hydra.run.dir={tmp_path}"],
        check=True,
    )
    assert "memory: fits: a run needs" in (tmp_path / "train.log").read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    planned, measured = summary["planned_training_bytes"], summary["peak_training_bytes"]
    assert planned == pytest.approx(measured, rel=0.3)


def test_what_does_not_fit_is_told_before_it_is_loaded(composed, monkeypatch, caplog):
    monkeypatch.setattr(memory, "LARGE_BYTES", 1)
    small = planner.Room(free_bytes=1000, where="this machine")
    monkeypatch.setattr(before_run, "room_of", lambda device: small)
    config = composed()
    model = Model(config.model, CPU, with_weights=False)
    assert planner.announce(config, model, CPU)
    assert "does not fit: a run needs" in caplog.text
    assert "this machine has 1.0 kB free" in caplog.text


def test_a_model_that_cannot_be_rehearsed_is_trained_all_the_same(composed, monkeypatch, caplog):
    monkeypatch.setattr(memory, "LARGE_BYTES", 1)

    def refused(*_):
        raise NotImplementedError("no fake kernel")

    monkeypatch.setattr(before_run, "make", refused)
    config = composed()
    assert planner.announce(config, Model(config.model, CPU, with_weights=False), CPU) is None
    assert "no plan, because the model cannot be simulated (no fake kernel)" in caplog.text


def test_an_average_of_averages_is_refused_while_planning(composed):
    with pytest.raises(UserError, match="leave ema out"):
        rehearsed(composed("optim=adamw_schedulefree", "ema=bf16"))


def test_a_part_that_there_is_not_is_refused_while_planning(composed):
    config = composed("method.train=[unet,text_encoder_2]")
    model = Model(config.model, CPU, with_weights=False)
    model.text_parts = ["text_encoder"]
    with pytest.raises(UserError, match="has no text_encoder_2"):
        rehearse(config, model, "cpu")


def room(size):
    return Room(free_bytes=round(size), where="a card")


def test_pictures_are_promised_only_if_they_fit_with_what_the_allocator_cannot_use(composed):
    config = composed("log.sample_count=1")
    plan = planner.plan.make(config, Model(config.model, CPU, with_weights=False), "cuda")
    aside = plan.drawing_aside_bytes
    assert "moved to host memory\n" in page(plan, room(1.06 * aside)) + "\n"
    # A picture of the tiny model is one tile, so tiles save nothing.
    assert "will not be drawn" in page(plan, room(1.04 * plan.least_drawing_bytes))


def test_tiles_are_planned_as_they_are_decoded(composed, monkeypatch):
    monkeypatch.setattr(drawer, "TILE", 32)
    config = composed("log.sample_count=1", "data.resolution=256")
    model = Model(config.model, CPU, with_weights=False)
    vae, planned = model.empty("vae", "float32"), rehearsed(config).tiled_bytes
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 32 // 4
    with rehearsal._without_data(config, "cpu"), Ledger("made") as ledger, torch.no_grad():
        ledger.enter([*vae.parameters()], "weights")
        vae.decode(torch.empty(1, 4, 256 // 4, 256 // 4))
    assert ledger.peak.total() <= planned < 1.2 * ledger.peak.total()


def test_compiled_blocks_that_keep_decoded_weights_are_not_promised_to_need_less(composed):
    options = ("method=lora", "model.quantization=int8", "runtime.compile=regional", UNSEEN)
    for more, says in (((), "not in this plan"), ((CHECKPOINTING,), "may need less")):
        config = composed(*options, *more)
        plan = planner.make(config, Model(config.model, CPU, with_weights=False), "cpu")
        assert says in page(plan, planner.card(8))


@pytest.mark.slow
def test_drawing_is_planned_in_tiles_where_a_whole_picture_does_not_fit():
    config = sdxl("method=lora", "model.quantization=nf4", "log.sample_count=1")
    plan = planner.plan.make(config, Model(config.model, CPU, with_weights=False), "cuda")
    least, aside = plan.least_drawing_bytes, plan.drawing_aside_bytes
    assert least < aside - 5e8
    assert "in tiles of 512 pixels" in page(plan, room(1.06 * least))
    assert "in tiles" not in page(plan, room(1.06 * aside))
