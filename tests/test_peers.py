"""Other packages' optimizers as choices of the same sweep: they train, resume and are named; a
missing package is a one-line error."""

import dataclasses
import io
import json
import sys
from collections import deque
from copy import deepcopy

import pytest
import torch
from helpers import QUICK, assert_same_weights, make_params, rows, set_grads, weights
from omegaconf import OmegaConf

from trainer import config
from trainer.run import run
from trainer.storage import checkpoint, resuming
from trainer.training import optimizers

PEERS = {  # choice: may a resumed run differ from an unbroken one with bf16 weights?
    "peer/adafactor8bit": False,
    "peer/adv_adopt": True,  # its loader rounds to bf16, and its random numbers restart
    "peer/bnb_adamw8bit": False,
    "peer/bnb_lion8bit": False,
    "peer/bnb_paged_adamw8bit": False,
    "peer/hf_adafactor": True,  # torch's loader rounds its fp32 means to bf16
    "peer/prodigy_plus_schedulefree": True,  # its random numbers restart
    "peer/schedulefree_adamw": False,
    "peer/torch_adafactor": False,
    "peer/torchao_adamw8bit": True,  # it rounds stochastically with torch's global generator
}
FILES = config.conf_dir() / "optim"
SHAPES = [(64, 128), (8, 8, 3, 3), (128,), (5,), (96, 80)]


@pytest.fixture
def installed(monkeypatch):
    """Skip where a peer's package is missing: installed("peer/hf_adafactor")."""

    def need(choice):
        written = OmegaConf.load(FILES / f"{choice}.yaml")
        pytest.importorskip(written.class_path.split(".")[0])
        if written.package == "torchao":  # same arithmetic, without minutes of compilation
            monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    return need


def test_every_peer_is_in_the_table_and_says_how_to_install_it():
    assert set(PEERS) == {name for name in config.choices_of("optim") if "/" in name}
    for choice in PEERS:
        text = (FILES / f"{choice}.yaml").read_text()
        package = OmegaConf.create(text).package
        assert text.splitlines()[0].endswith(f": pip install {package}.")


@pytest.mark.slow
@pytest.mark.parametrize("choice", PEERS)
def test_a_peer_trains_the_unet_and_resumes_bitwise(quick, composed, tmp_path, installed, choice):
    installed(choice)
    options = [f"optim={choice}", "schedule.steps=3", "log.eval_points=2"]
    whole = quick("whole", *options, "runtime.save_every=2")
    assert rows(whole)[0]["eval/loss"] != rows(whole)[-1]["eval/loss"]
    assert all(row.get("train/skipped_steps", 0) == 0 for row in rows(whole))
    before = whole / "checkpoints" / "step-000002"
    run(composed(*QUICK, *options, f"resume={before}"), tmp_path / "resumed")
    assert_same_weights(weights(whole, 3), weights(tmp_path / "resumed", 3))
    packages = json.loads((whole / "environment.json").read_text())["packages"]
    assert packages[OmegaConf.load(FILES / f"{choice}.yaml").package]
    assert json.loads((whole / "summary.json").read_text())["name"] == f"{choice}-full"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("choice", PEERS)
def test_a_peer_takes_its_own_state_back_from_a_file(composed, installed, choice, dtype):
    installed(choice)
    made = composed(f"optim={choice}").optim
    optimizers.try_out(made)

    def steps(params, optimizer, numbers):
        for number in numbers:
            optimizers.set_lr(optimizer, 0.5)
            set_grads(params, number)
            optimizer.step()

    module = torch.nn.ParameterList(make_params(dtype, SHAPES))
    whole = optimizers.build(made, module, seed=0)
    steps(module, whole, range(3))
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)

    copy = torch.nn.ParameterList(torch.nn.Parameter(p.detach().clone()) for p in module)
    resumed = optimizers.build(made, copy, seed=0)
    optimizers.restore(resumed, torch.load(file, weights_only=True))
    before = [p.detach().clone() for p in copy]
    steps(module, whole, range(3, 5))
    steps(copy, resumed, range(3, 5))
    assert any(not torch.equal(start, p) for start, p in zip(before, copy, strict=True))
    for a, b in zip(module, copy, strict=True):
        if dtype is torch.bfloat16 and PEERS[choice]:
            assert (a - b).float().norm() <= 2**-8 * a.float().norm()  # bf16's rounding
        else:
            assert torch.equal(a, b)


def test_what_an_external_optimizer_has_found_is_the_checkpoints_and_its_options_are_the_configured(
    composed,
):
    """Prodigy keeps the rate it finds and its step count in its groups."""
    pytest.importorskip("prodigyopt")
    prodigy = ["optim=external", "optim.class_path=prodigyopt.Prodigy", "optim.lr=1"]
    of = composed(*prodigy, "+optim.options.d0=1e-3", "+optim.options.weight_decay=0.1").optim

    def five_steps(module, optimizer):
        for _ in range(5):
            optimizers.set_lr(optimizer, 0.5)
            set_grads(list(module), 0)  # always the same, so it raises its rate
            optimizer.step()

    whole = torch.nn.ParameterList(make_params())
    first = optimizers.build(of, whole, seed=0)
    five_steps(whole, first)
    copy = torch.nn.ParameterList(torch.nn.Parameter(p.detach().clone()) for p in whole)
    resumed = optimizers.build(of, copy, seed=0)
    optimizers.restore(resumed, deepcopy(first.state_dict()))
    assert resumed.param_groups[0]["d"] == first.param_groups[0]["d"] > 2e-3
    five_steps(whole, first)
    five_steps(copy, resumed)
    for a, b in zip(whole, copy, strict=True):
        assert torch.equal(a, b)

    changed = dataclasses.replace(of, lr=2.0, options={"d0": 1e-3, "weight_decay": 0.2})
    other = optimizers.build(changed, copy, seed=0)
    optimizers.restore(other, deepcopy(first.state_dict()))
    for group in other.param_groups:
        assert (group["lr"], group["k"]) == (2.0, 10)
    assert {group["weight_decay"] for group in other.param_groups} == {0.0, 0.2}


class Remembering(torch.optim.SGD):
    """Keeps per-parameter state that a checkpoint cannot restore, or not even save."""

    kept = staticmethod(deque)

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["recent"] = self.kept()


class Unsaved(Remembering):
    kept = staticmethod(lambda: lambda: None)


def test_an_optimizer_whose_state_does_not_come_back_from_a_file_says_so_first_and_at_the_resume(
    composed, quick, caplog
):
    path = f"optim.class_path={__name__}.Remembering"
    optimizers.try_out(composed("optim=external", path, "optim.lr=0.01").optim)
    assert f"{path}: no checkpoint of this run can be resumed" in caplog.text
    assert "holds collections.deque" in caplog.text
    folder = quick("run", "optim=external", path, "optim.lr=0.01", "schedule.steps=1")
    says = "cannot be resumed: the optimizer's state holds collections.deque"
    with pytest.raises(ValueError, match=says):
        checkpoint.load(folder / "checkpoints/step-000001")
    with pytest.raises(ValueError, match="no undamaged checkpoint"):
        resuming.load_newest(resuming.find(str(folder)))
    of = composed("optim=external", f"optim.class_path={__name__}.Unsaved", "optim.lr=0.01").optim
    with pytest.raises(ValueError, match="Unsaved: its state cannot be saved"):
        optimizers.try_out(of)


@pytest.mark.parametrize("choice", [name for name in PEERS if name != "peer/torch_adafactor"])
def test_a_peer_that_is_not_installed_is_one_line_before_anything_is_loaded(
    command, in_tmp, monkeypatch, choice
):
    written = OmegaConf.load(FILES / f"{choice}.yaml")
    monkeypatch.setitem(sys.modules, written.class_path.split(".")[0], None)
    status, out, err = command(f"optim={choice}")
    assert status == 2
    package = written.package
    assert err.strip() == (
        f"error: optim={choice} needs {package}, which is not installed: pip install {package}"
    )
    assert "model: loading" not in out
    assert not list(in_tmp.glob("runs/*/*"))


def test_a_peer_without_the_class_is_one_line(composed, monkeypatch):
    made = composed("optim=peer/bnb_lion8bit").optim
    made.class_path = "bitsandbytes.optim.Lion4bit"
    says = r"optim=peer/bnb_lion8bit cannot be imported .*pip install --upgrade bitsandbytes"
    with pytest.raises(optimizers.UserError, match=says):
        optimizers.try_out(made)


def test_an_eight_bit_peer_has_eight_bit_state(composed, installed):
    """One byte per element and moment, plus code books, which all tensors share."""
    for choice, moments in (("peer/bnb_adamw8bit", 2), ("peer/bnb_lion8bit", 1)):
        module = torch.nn.ParameterList(make_params(shapes=[(128, 128)] * 3))
        optimizer = optimizers.build(composed(f"optim={choice}").optim, module, seed=0)
        set_grads(list(module), 0)
        optimizer.step()
        elements = 3 * 128 * 128
        codes, scales, books = elements, elements // 256 * 4, 1024
        assert optimizers.state_bytes(optimizer) == moments * (codes + scales + books)


def test_state_bytes_of_a_tensor_that_holds_others_are_theirs(composed, installed):
    installed("peer/torchao_adamw8bit")
    module = torch.nn.ParameterList(make_params(shapes=[(128, 128)]))
    optimizer = optimizers.build(composed("optim=peer/torchao_adamw8bit").optim, module, seed=0)
    set_grads(list(module), 0)
    optimizer.step()
    codes, scales, book, step = 128 * 128, 64 * 4, 1024, 4
    assert optimizers.state_bytes(optimizer) == 2 * (codes + scales + book) + step


@pytest.mark.slow
def test_a_sweep_over_family_and_peers_names_them(command, tmp_path):
    choices = "optim=adafactor8bit,peer/hf_adafactor"
    status, out, err = command("-m", *QUICK, choices, "schedule.steps=1")
    assert status == 0, err
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert {line.split()[1] for line in table[2:]} == {
        "optim=adafactor8bit",
        "optim=peer/hf_adafactor",
    }
    (folder,) = tmp_path.glob("runs/sweep-*/1-*")
    assert folder.name == "1-peer-hf_adafactor-full-seed0"
