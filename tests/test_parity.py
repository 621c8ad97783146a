"""Every optimizer's arithmetic against other implementations of the same paper."""

import adafactor8bit
import adv_optm
import bitsandbytes
import came_pytorch
import lion_pytorch
import prodigyopt
import pytest
import pytorch_optimizer
import schedulefree
import torch
from helpers import make_params, run, set_grads

import optim

MATRIX = [(24, 16), (24,)]
CONVOLUTION = [(16, 3, 3, 3), (24, 16), (8, 4, 1, 1), (24,)]
PAPER = {"beta2": None, "relative_step": True, "scale_parameter": True, "weight_decay": 0.1}

# Where a library departs from its paper, the difference is switched off or not compared:
# - decay: torch and adafactor8bit (scale_weight_decay=False) decay by the unscaled rate, as this
#   family does.  adafactor8bit's default decays by the scaled one.
# - bias correction: adafactor8bit has none for a fixed beta2 without momentum, so the paper's
#   1 - t^-0.8 is compared, which needs none.
# - first moment: adafactor8bit averages the gradient where the paper (Alg. 4) averages the clipped
#   update; not compared.
# - eps: came_pytorch and pytorch_optimizer average eps with what it is added to, which shows
#   only in rows without gradients.  They factor a convolution's last two dimensions, so CAME is
#   compared on matrices and vectors.
# - pytorch_optimizer's APOLLO maps the scaled projection back, where the paper (Alg. 1) scales the
#   gradient itself; not compared.  `test_apollo.py` has the peers that follow the paper.
# - d: prodigyopt multiplies eps, and only eps, by the next step's d, so eps is tiny.
# - curvature: test_sophia.py compares sophia, with estimates.
# - lagged clip: adafactor8bit's `lag_norm` is in its CUDA kernels only; not compared.


def in_training(optimizer):
    """Schedule-Free's mode, which it must be told."""
    optimizer.train()
    return optimizer


THIRD_PARTIES = {
    # name and variant: (our options, theirs, shapes)
    "sgd": (
        {"lr": 0.1, "momentum": 0.9},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        CONVOLUTION,
    ),
    "sgd nesterov": (
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        CONVOLUTION,
    ),
    "lomo": (
        {"lr": 0.1},
        lambda p: torch.optim.SGD(p, lr=0.1),
        CONVOLUTION,
    ),
    "adamw": (
        {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1},
        lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1),
        CONVOLUTION,
    ),
    "adamw_schedulefree": (
        {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1},
        lambda p: in_training(
            schedulefree.AdamWScheduleFree(p, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1)
        ),
        CONVOLUTION,
    ),
    "lion": (
        {"lr": 1e-2, "weight_decay": 0.1},
        lambda p: pytorch_optimizer.Lion(p, lr=1e-2, weight_decay=0.1, weight_decouple=True),
        CONVOLUTION,
    ),
    "lion lion-pytorch": (
        {"lr": 1e-2, "weight_decay": 0.1},
        lambda p: lion_pytorch.Lion(p, lr=1e-2, weight_decay=0.1),
        CONVOLUTION,
    ),
    "ademamix": (
        {"lr": 1e-2, "alpha": 3.0, "warmup_steps": 40, "weight_decay": 0.1},
        lambda p: pytorch_optimizer.AdEMAMix(
            p,
            lr=1e-2,
            betas=(0.9, 0.999, 0.9999),
            alpha=3.0,
            t_alpha_beta3=40,
            weight_decay=0.1,
            weight_decouple=True,
        ),
        CONVOLUTION,
    ),
    "adamw grams": (
        {"lr": 1e-2, "grams": True, "weight_decay": 0.0},
        lambda p: pytorch_optimizer.Grams(p, lr=1e-2, weight_decay=0.0),
        CONVOLUTION,
    ),
    "prodigy": (
        {"d0": 1e-2, "slice_p": 1, "eps": 1e-12, "weight_decay": 0.1},
        lambda p: prodigyopt.Prodigy(p, d0=1e-2, eps=1e-12, weight_decay=0.1),
        CONVOLUTION,
    ),
    "prodigy slice": (
        {"d0": 1e-2, "slice_p": 11, "eps": 1e-12, "bias_correction": True, "weight_decay": 0.0},
        lambda p: prodigyopt.Prodigy(p, d0=1e-2, slice_p=11, eps=1e-12, use_bias_correction=True),
        CONVOLUTION,
    ),
    "adafactor": (
        PAPER | {"lr": 1e-2},
        lambda p: torch.optim.Adafactor(p, lr=1e-2, eps=(None, 1e-3), weight_decay=0.1),
        MATRIX,
    ),
    "adafactor last2": (
        PAPER | {"lr": 1e-2, "conv_view": "last2"},
        lambda p: torch.optim.Adafactor(p, lr=1e-2, eps=(None, 1e-3), weight_decay=0.1),
        CONVOLUTION,
    ),
    "adafactor last2 adafactor8bit": (
        PAPER | {"lr": 1e-2, "conv_view": "last2"},
        lambda p: adafactor8bit.Adafactor8Bit(
            p,
            lr=1e-2,
            weight_decay=0.1,
            scale_weight_decay=False,
            quantize=False,
            use_cuda_kernel=False,
        ),
        CONVOLUTION,
    ),
    "came": (
        {"lr": 1e-2, "betas": (0.8, 0.99, 0.995), "weight_decay": 0.1},
        lambda p: came_pytorch.CAME(p, lr=1e-2, betas=(0.8, 0.99, 0.995), weight_decay=0.1),
        MATRIX,
    ),
    "came pytorch-optimizer": (
        {"lr": 1e-3, "clip_threshold": 0.5},
        lambda p: pytorch_optimizer.CAME(p, lr=1e-3, clip_threshold=0.5),
        MATRIX,
    ),
}


def distance(ours, theirs, shapes):
    """Largest distance between two optimizers' weights over the tensors, relative to how far the
    second's have moved."""
    return max(
        ((a - b).norm() / (b - start).norm()).item()
        for a, b, start in zip(ours, theirs, make_params(shapes=shapes), strict=True)
    )


@pytest.mark.parametrize("case", THIRD_PARTIES)
def test_fp32_trajectory_equals_the_third_party(case):
    options, make_other, shapes = THIRD_PARTIES[case]
    ours, theirs = make_params(shapes=shapes), make_params(shapes=shapes)
    run(optim.build(case.split()[0], ours, **options), ours, range(60))
    run(make_other(theirs), theirs, range(60))
    assert distance(ours, theirs, shapes) <= 3e-5


def test_adalomo_equals_the_one_of_pytorch_optimizer_where_both_mean_the_same():
    """On matrices and vectors without weight decay.  Theirs takes no convolutions and decays by lr
    times the RMS of the weights; it reads a model's gradients, one step at a time."""
    ours, theirs = make_params(shapes=MATRIX), make_params(shapes=MATRIX)
    other = pytorch_optimizer.AdaLOMO(torch.nn.ParameterList(theirs), lr=1e-2, loss_scale=0.0)
    optimizer = optim.build("adalomo", ours, lr=1e-2)
    for step in range(60):
        run(optimizer, ours, [step])
        set_grads(theirs, step)
        other.num_steps += 1
        other.grad_func(None)
    assert distance(ours, theirs, MATRIX) <= 3e-5


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("adopt_factored", adv_optm.Adopt_adv),
        ("adamw_factored", adv_optm.AdamW_adv),
        ("lion_factored", adv_optm.Lion_adv),
    ],
)
def test_factored_moments_follow_the_smmf_cycle_of_adv_optm(name, peer):
    shapes = [(24, 16), (16, 3, 3, 3)]
    ours, theirs = make_params(shapes=shapes), make_params(shapes=shapes)
    run(optim.build(name, ours, lr=1e-2, weight_decay=0.0), ours, range(40))
    run(peer(theirs, lr=1e-2, weight_decay=0.0, nnmf_factor=True), theirs, range(40))
    assert distance(ours, theirs, shapes) <= 1e-3


@pytest.mark.parametrize(
    ("name", "peer", "tolerance"),
    [
        ("adamw8bit", bitsandbytes.optim.AdamW8bit, 0.08),
        ("lion8bit", bitsandbytes.optim.Lion8bit, 0.16),  # its updates are signs
    ],
)
def test_eight_bit_moments_lead_where_those_of_bitsandbytes_do(name, peer, tolerance):
    """Both round, with different codes and methods; the tolerance says how close they are."""
    shapes = [(96, 64), (64, 8, 3, 3)]  # bitsandbytes keeps tensors below 4096 elements in fp32
    ours, theirs = make_params(shapes=shapes), make_params(shapes=shapes)
    run(optim.build(name, ours, lr=1e-2, weight_decay=0.1), ours, range(60))
    run(peer(theirs, lr=1e-2, weight_decay=0.1), theirs, range(60))
    assert distance(ours, theirs, shapes) <= tolerance
