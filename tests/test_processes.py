"""Several processes that train one model: torchrun, `trainer.system.processes`."""

import json
import logging
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from helpers import QUICK, assert_same_weights, weights
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import LaunchConfig, elastic_launch
from torch.nn import Parameter

from trainer.errors import UserError
from trainer.run import run
from trainer.storage import resuming
from trainer.system import processes
from trainer.training.clipping import Clip
from trainer.training.gradients import GatheredBackward, Pass

TORCHRUN = (
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    *("-m", "trainer"),
)
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # the launcher handles them


def train(*overrides):
    from trainer.__main__ import main

    sys.argv = ["trainer", *overrides]
    main()


@pytest.fixture
def torchrun(tmp_path, monkeypatch):
    """torchrun("seed=1") trains in two processes, which torchrun's own launcher forks from one that
    has the imports -> (whether they ended well, stdout, stderr)."""
    multiprocessing.set_forkserver_preload(["trainer.__main__", "trainer.run"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)  # the command sets it
    handlers = {number: signal.getsignal(number) for number in ENDING}

    def call(*overrides):
        folder = Path(tempfile.mkdtemp(dir=tmp_path.parent))
        launching = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=2,
            run_id="test",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            start_method="forkserver",
            logs_specs=DefaultLogsSpecs(log_dir=str(folder), redirects=Std.ALL),
        )
        ends_well = True
        try:
            elastic_launch(launching, train)(*overrides)
        except ChildFailedError:
            ends_well = False
        files = (sorted(folder.rglob(f"{name}.log")) for name in ("stdout", "stderr"))
        return (ends_well, *("".join(path.read_text() for path in paths) for paths in files))

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_micro_batches(composed, tmp_path, torchrun):
    """The sum of two terms has no order, so not a bit differs.  With a short batch at the end."""
    options = [
        *(*QUICK, "runtime.device=cpu", "model.dtype=bfloat16", f"data.cache={tmp_path}/cache"),
        *("runtime.fused_backward=true", "method.clip=exact"),
        *("data.batch_size=5", "schedule.epochs=1"),
    ]
    run(composed(*options, "runtime.accumulation=2"), tmp_path / "one")
    ends_well, out, err = torchrun(*options, f"hydra.run.dir={tmp_path}/two")
    assert ends_well, err
    last = json.loads((tmp_path / "one/summary.json").read_text())["steps"]
    assert_same_weights(weights(tmp_path / "one", last), weights(tmp_path / "two", last))
    environment = json.loads((tmp_path / "two/environment.json").read_text())
    assert environment["processes"] == 2
    assert out.count("\ncost ") == 1  # only the main process reports


@pytest.mark.slow
def test_a_signal_saves_once_and_the_run_goes_on_bit_for_bit(composed, tmp_path, torchrun):
    """With all gradients at once, of a LoRA of two parts."""
    options = [
        *(*QUICK, "schedule.steps=6", "runtime.device=cpu", "ema=bf16", "method.clip=lagged"),
        *("method=lora", "method.train=[unet,text_encoder]", "method.dropout=0.1"),
        *("data.cache=null", "optim=prodigy_factored", "optim.d0=1e-3"),
    ]
    run(composed(*options, "runtime.accumulation=2"), tmp_path / "whole")
    words, said = [*TORCHRUN, *options, f"hydra.run.dir={tmp_path}/parts"], ""
    with subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            said += line
            if line.startswith("step 2/"):
                process.send_signal(signal.SIGINT)
    assert "resume with: torchrun --nproc-per-node 2 -m trainer resume=" in said
    assert not (tmp_path / "parts/checkpoints/step-000006").exists()
    ends_well, out, err = torchrun(f"resume={tmp_path}/parts")
    assert ends_well, err
    assert "resumed after step" in out
    assert_same_weights(weights(tmp_path / "whole", 6), weights(tmp_path / "parts", 6))


@pytest.mark.slow
def test_two_processes_go_back_together(composed, tmp_path, torchrun):
    options = [
        *(*QUICK, "schedule=constant", "schedule.steps=44", "schedule.warmup_steps=44"),
        *("runtime.device=cpu", "optim=sgd", "optim.lr=2.7", "data.batch_size=2"),
        *("runtime.save_every=10", "runtime.on_divergence=rollback"),
    ]
    run(composed(*options, "runtime.accumulation=2"), tmp_path / "one")
    ends_well, out, err = torchrun(*options, f"hydra.run.dir={tmp_path}/two")
    assert ends_well, err
    assert "(rollback 1 of 3)" in out
    assert_same_weights(weights(tmp_path / "one", 44), weights(tmp_path / "two", 44))


@pytest.mark.slow
def test_an_error_of_the_main_process_is_reported_once_and_ends_the_one_that_waits(
    tmp_path, torchrun
):
    (tmp_path / "config.yaml").write_text("mine")
    ends_well, _, err = torchrun(*QUICK, f"hydra.run.dir={tmp_path}", "runtime.device=cpu")
    assert not ends_well
    assert err.count("is not a run's folder") == 1
    assert "Error executing job" not in err


@pytest.fixture
def one_of_two(monkeypatch):
    """one_of_two(1) makes this process one that torchrun has started, with another."""

    def make(rank):
        torchruns = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        for name, value in (torchruns | {"RANK": str(rank), "LOCAL_RANK": str(rank)}).items():
            monkeypatch.setenv(name, value)

    return make


def test_processes_are_counted_by_torchrun(one_of_two, composed):
    one_of_two(1)
    assert (processes.world_size(), processes.rank(), processes.is_main()) == (2, 1, False)
    config = composed(*QUICK, "runtime.accumulation=3")
    assert (config.runtime.processes, config.runtime.micro_batches) == (2, 6)


def test_without_torchrun_there_is_one_process(monkeypatch, composed):
    monkeypatch.setenv("WORLD_SIZE", "8")  # of a cluster's own scripts
    assert (processes.world_size(), processes.rank(), processes.is_main()) == (1, 0, True)
    assert composed(*QUICK).runtime.processes == 1
    with pytest.raises(UserError, match=r"processes=2.*torchrun --nproc-per-node 2 -m trainer"):
        composed(*QUICK, "runtime.processes=2")


@pytest.mark.parametrize(
    ("option", "gpus", "says"),
    [
        ("optim=sophia", 2, "choose another optimizer, or train without torchrun"),
        ("runtime.device=cuda:0", 2, "CUDA_VISIBLE_DEVICES"),
        ("runtime.device=auto", 1, "use --nproc-per-node 1"),
    ],
)
def test_what_processes_cannot_share_is_refused(
    one_of_two, composed, monkeypatch, option, gpus, says
):
    one_of_two(0)  # the one that reports it
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(UserError, match=says):
        composed(*QUICK, option)


def test_a_sweep_is_not_shared_by_processes(one_of_two, command):
    one_of_two(0)
    status, _, err = command("-m", "seed=0,1")
    assert status == 2
    assert "once for each GPU with CUDA_VISIBLE_DEVICES=N" in err


@pytest.mark.parametrize("given", ["optim.lrr=1", "hydra.output_subdir=.hydra"])
def test_a_follower_leaves_no_folder(one_of_two, command, in_tmp, monkeypatch, given):
    one_of_two(1)
    monkeypatch.setattr(tempfile, "tempdir", str(in_tmp))
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("trainer.__main__._follow", lambda *_: math.nan)
    command(*QUICK, given, "hydra.run.dir=mine", "runtime.device=cpu")
    assert list(in_tmp.iterdir()) == []


def test_an_error_of_a_follower_alone_is_printed_after_the_main_process_had_time_to(
    one_of_two, command, monkeypatch
):
    one_of_two(1)
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    status, _, err = command(*QUICK, "seed=-1")
    assert status == 2
    assert waited[0] >= 10
    assert not logging.root.manager.disable  # what this process does next may be logged
    assert err.startswith("error in process 1: seed=-1")


def test_torch_without_distributed_trains_in_one_process(one_of_two, monkeypatch):
    one_of_two(0)
    monkeypatch.setattr("torch.distributed.is_available", lambda: False)
    for name in ("is_torchelastic_launched", "ReduceOp", "all_reduce"):
        monkeypatch.delattr(f"torch.distributed.{name}")
    assert processes.world_size() == 1
    assert (processes.total(2.0), processes.largest(3.0)) == (2.0, 3.0)


@pytest.mark.parametrize(("ending", "ends"), [(None, 1), (SystemExit, 1), (UserError, 0)])
def test_a_process_that_fails_does_not_wait_for_the_others(one_of_two, monkeypatch, ending, ends):
    """NCCL's communicators are destroyed by all processes together."""
    one_of_two(0)
    destroyed = []
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: None)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: destroyed.append(1))
    with (
        pytest.raises(ending) if ending else nullcontext(),
        processes.joined(torch.device("cpu")),
    ):
        if ending:
            raise ending
    assert len(destroyed) == ends


AcceleratorError = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)  # not in older ones


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (RuntimeError("Connection closed by peer"), ConnectionError),
        (torch.distributed.DistBackendError("NCCL error"), torch.distributed.DistBackendError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (AcceleratorError("CUDA error: an illegal memory access"), AcceleratorError),
    ],
)
def test_an_error_of_nccl_is_not_taken_for_the_end_of_another_process(
    one_of_two, monkeypatch, error, seen
):
    one_of_two(0)

    def fails(*_, **__):
        raise error

    monkeypatch.setattr("torch.distributed.all_reduce", fails)
    with pytest.raises(seen):
        processes.sum_gradients(torch.zeros(1))


def test_no_gradients_are_summed_unless_all_processes_have_them(monkeypatch):
    """NCCL would wait for one that has failed."""
    weight = Parameter(torch.ones(2))
    backward = GatheredBackward([weight], Clip("none", 1.0, [weight]))
    summed = []
    monkeypatch.setattr(processes, "sum_gradients", lambda *p: summed.append(p))

    def lost(number):
        raise ConnectionError

    monkeypatch.setattr(processes, "total", lost)
    with pytest.raises(ConnectionError):
        backward.run([Pass(weight.sum)])
    assert not summed


def test_a_run_of_several_processes_resumed_by_one_is_told_how_to_start_them(
    finished, composed, monkeypatch
):
    whole = finished("whole")
    load = resuming.load_newest

    def of_two(folders):
        found = load(folders)
        found.config["runtime"]["processes"] = 2
        return found

    monkeypatch.setattr(resuming, "load_newest", of_two)
    says = r"before \(torchrun --nproc-per-node 2 -m trainer\), or set runtime.allow_config_change"
    with pytest.raises(UserError, match=says):
        resuming.to_resume(composed(*QUICK, f"resume={whole}"))


@pytest.mark.parametrize(
    ("given", "again"),
    [
        ([], ""),
        (["optim=lion", "-m"], ""),
        (["--config-dir", "mine"], " --config-dir /here/mine"),
        (["-cd", "/a b", "optim=mine"], " --config-dir '/a b'"),
        (["--config-dir=mine", "seed=1"], " --config-dir /here/mine"),
        (["hydra.searchpath=[file:///x]"], " 'hydra.searchpath=[file:///x]'"),
    ],
)
def test_the_command_of_a_run_has_the_folders_of_its_own_choices(monkeypatch, given, again):
    monkeypatch.setattr(sys, "argv", ["trainer", *given])
    monkeypatch.setattr(os, "getcwd", lambda: "/here")
    assert processes.command() == f"python -m trainer{again}"
    assert processes.command(2) == f"torchrun --nproc-per-node 2 -m trainer{again}"
