"""Shared helpers: small parameters and gradients, short runs."""

import math
import tempfile
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch.nn import Parameter

import optim
from optim.projection import projection
from trainer.export import __main__ as export
from trainer.objective import losses
from trainer.reporting import metrics

SHAPES = [(24, 16), (16, 3, 3, 3), (24,), (7, 5, 2), (), (0,), (101, 1)]

# Options that make an optimizer treat small tensors like large ones.
FOR_SMALL = {"apollo": {"rank": 4}, "adafactor8bit_apollo": {"rank": 4}}


# Optimizers that move weights little in a few steps (they begin with a tiny rate; their step of a
# matrix of rank 1, as of equal gradients, is small), with options that make it visible.
PRODIGIES = (
    *("lion_prodigy", "prodigy", "prodigy_factored"),
    *("prodigy_schedulefree", "prodigy_factored_schedulefree"),
)
MUONS = ("muon", "muon8bit", "muon_factored")
SCHEDULE_FREE = (
    "adamw_schedulefree",
    "adamw8bit_schedulefree",
    "adamw_factored_schedulefree",
    "prodigy_schedulefree",
    "prodigy_factored_schedulefree",
)
SWIFT = {name: {"lr": 0.03} for name in SCHEDULE_FREE}  # each step counts less in an average
SWIFT |= {name: {"lr": 0.2} for name in MUONS}
SWIFT |= {name: {"lr": 1.0, "d0": 1e-2} for name in PRODIGIES}


def build(name, params, **options):
    """Build an optimizer of the family with options for small tensors and few steps."""
    return optim.build(name, params, **FOR_SMALL.get(name, {}) | options | SWIFT.get(name, {}))


def make_params(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_grads(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def set_grad(param, grad):
    """Attach a gradient of any dtype, as when weights are cast after backward().  (`grad_dtype` of
    newer torch allows it, too.)"""
    if grad.dtype == param.dtype:
        param.grad = grad
        return
    data = param.data
    param.data = data.to(grad.dtype)
    param.grad = grad
    param.data = data


def run(optimizer, params, steps):
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


_CACHE = tempfile.TemporaryDirectory(prefix="encoded-for-tests-")  # gone when this process ends

# A run that takes a few seconds.  All of a process share what they have encoded.
QUICK = (
    "schedule.steps=4",
    "schedule.warmup_steps=1",
    "data.batch_size=4",
    "log.every=1",
    "log.eval_points=6",
    "log.sample_count=0",
    "runtime.threads=1",
    f"data.cache={_CACHE.name}",
)


def rows(folder):
    return metrics.read(folder / "metrics.jsonl")


def deterministic(folder):
    """The rows of metrics without times and memory."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("perf/", "memory/"))}
        for row in rows(folder)
    ]


def weights(folder, step):
    return load_file(folder / f"checkpoints/step-{step:06d}/weights.safetensors")


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def names(dataset):
    """The file names of a data set's pictures."""
    return [sample.name.rpartition("/")[2] for sample in dataset.samples]


def run_export(capsys, *arguments):
    """Run `python -m trainer.export` in this process -> (exit status, stdout, stderr)."""
    try:
        status = export.main([str(argument) for argument in arguments])
    except SystemExit as leaving:  # argparse
        status = leaving.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_export_refused(capsys, cases):
    """Each command, of cases (arguments, what the error says), ends with status 2 and one line."""
    for arguments, said in cases:
        status, _, error = run_export(capsys, *arguments)
        assert (status, error.count("\n")) == (2, 1), error
        assert error.startswith("error: ")
        assert said in error


def projection_of(index, t, width, **options):
    """The optimizer's P for this parameter at this step, in fp64."""
    known = {"seed": 0, "update_gap": 200, "projection": "gaussian", "residual": False}
    h = SimpleNamespace(**known | options | {"index": index, "t": t})
    return projection(h, width, torch.device("cpu")).double()


def poisoned_from(call):
    """A loss that is infinite from this call on, counted from 1."""
    calls, original = [], losses.loss
    return lambda *a: original(*a) * (math.inf if calls.append(a) or len(calls) >= call else 1)
