"""Shared fixtures: a small picture folder, composed configurations, the command line."""

import copy
import dataclasses
import functools
import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from helpers import QUICK
from models import TINY, make_sd15
from PIL import Image

from optim import backend
from trainer import config, data
from trainer.checks import validate
from trainer.cli import choices, compose
from trainer.formats import origin, writing
from trainer.objective.noise_schedule import noise_schedule
from trainer.run import run

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
torch.set_num_threads(1)

REPOSITORY = Path(__file__).parents[1]


def pytest_collection_modifyitems(items):
    """Run files with slow tests first, so that none of them starts when other workers are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """Exclude all imported objects from garbage collections, which every run triggers."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_wishes(monkeypatch):
    """No environment variable chooses the backend; warnings already issued are forgotten."""
    for name in ("OPTIM_BACKEND", "OPTIM_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(backend, "_said", set())


@pytest.fixture
def pictures(tmp_path):
    """A folder of four small captioned pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, colour in enumerate(("red", "green", "blue", "yellow")):
        Image.new("RGB", (80 + 10 * index, 70), colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"a {colour} card\n")
    return folder


@functools.cache
def _folder_options():
    return validate.to_dataclasses(compose_raw("data=folder", "data.path=/")).data


@pytest.fixture
def options(pictures):
    """The options of `data=folder` for the small picture folder, with 64-pixel center crops."""
    return dataclasses.replace(_folder_options(), path=str(pictures), resolution=64, buckets=False)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def load(options):
    """Load the data set with some options changed: load(batch_size=4)."""
    return lambda **changes: data.load(dataclasses.replace(options, **changes))


@pytest.fixture
def composed():
    """Compose and check a configuration: composed("optim=lion") -> Config."""

    def make(*overrides):
        return validate.to_dataclasses(compose_raw(*overrides))

    return make


@pytest.fixture
def quick(composed, tmp_path):
    """Run in this process: quick("a", "optim=lion") -> the folder `a` of a finished short run."""

    def make(name, *overrides):
        folder = tmp_path / name
        run(composed(*QUICK, *overrides), folder)
        return folder

    return make


@pytest.fixture(scope="session")
def _runs_made(tmp_path_factory):
    """Runs made for `finished`, cached by their overrides."""
    folder, known = tmp_path_factory.mktemp("finished"), {}

    def make(overrides):
        if overrides not in known:
            made = folder / str(len(known))
            run(validate.to_dataclasses(compose_raw(*QUICK, *overrides)), made)
            known[overrides] = made
        return known[overrides]

    return make


@pytest.fixture
def finished(_runs_made, tmp_path):
    """A run as a starting point: finished("a", "optim=lion") -> the folder `a`, a copy of the one
    run with these options in this process.  Tests of what happens during a run need `quick`."""
    return lambda name, *overrides: shutil.copytree(_runs_made(overrides), tmp_path / name)


@pytest.fixture
def noise_config():
    """noise_config(offset=0.1) -> NoiseConfig, with the other values of its file."""
    return lambda **options: _group("noise/default", config.NoiseConfig, options)


@pytest.fixture
def loss_config():
    """loss_config("huber", delta=0.1) -> HuberConfig, with the other values of its file."""
    nodes = {node.name: node for node in config.ALTERNATIVES["loss"]}
    return lambda name="mse", **options: _group(f"loss/{name}", nodes[name], options)


@pytest.fixture
def schedule_config():
    """schedule_config("wsd", steps=100) -> WsdConfig, with the other values of its file."""
    nodes = {node.name: node for node in config.ALTERNATIVES["schedule"]}
    return lambda name, **options: _group(f"schedule/{name}", nodes[name], options)


def _group(path, node, options):
    """Build a group's dataclass from its YAML file, 100 times faster than composing with Hydra."""
    return node(**(config.values_of(*path.split("/")) | options))


BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture
def make_schedule():
    """SDXL's noise schedule with some options changed."""
    return lambda **options: noise_schedule(BETAS | options)


@pytest.fixture
def make_ddpm():
    """The same of diffusers, to compare with."""
    return lambda **options: DDPMScheduler(**BETAS | options)


@pytest.fixture
def v_schedule(make_schedule):
    return make_schedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)


def compose_raw(*overrides):
    """Compose these overrides with Hydra, without checks."""
    return copy.deepcopy(_composition(overrides))


@functools.cache  # a fifth of a second each, and some are wanted by several tests
def _composition(overrides):
    compose.register()
    return choices.composition(list(overrides))


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Run in an empty folder, where `runs/` will appear."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(in_tmp, monkeypatch, capfd):
    """The command line in this process: command("optim=lion") -> (exit status, stdout, stderr)."""
    from trainer.__main__ import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["trainer", *arguments])
        status = 0
        try:
            main()
        except SystemExit as leaving:
            status = leaving.code or 0
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return call


def new_process(*arguments, cwd, module="trainer", **environment):
    """Run the command line in a new process."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    return make_sd15(tmp_path_factory.mktemp("models") / "sd15")


@pytest.fixture(scope="module")
def files(tmp_path_factory, sd15):
    """Both models as single files: {kind: path}."""
    folder = tmp_path_factory.mktemp("files")
    return {
        kind: writing.save_single_file(folder / f"{kind}.safetensors", origin.at(str(path)), {})
        for kind, path in (("sdxl", TINY), ("sd15", sd15))
    }


@pytest.fixture
def tiny(tmp_path):
    """A copy of the shipped model that a test may damage."""
    return shutil.copytree(TINY, tmp_path / "model")
