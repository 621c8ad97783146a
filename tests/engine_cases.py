"""Inputs of the engine tests: weights and gradients with every kind of edge case, options."""

import torch
from helpers import FOR_SMALL, SWIFT

import optim
from optim import dispatch

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, BF16, FP16]
NAMES = sorted(name for name, cls in optim.FAMILY.items() if dispatch.has_rule(cls.rule))

# (130, 700): several tiles in each dimension; (3, 4700): more tiles in a row than fit a strip.
MEDIUM = [(130, 700), (3, 4700), (10007,), (33, 3, 3, 3), (), (0,)]

# Options that avoid dividing a difference of nearly equal numbers by almost nothing.
CONDITIONED = {"sophia": {"rho": 1e3, "eps": 1e-4}} | SWIFT | FOR_SMALL

# Several features in one step, in the order they act.
TOGETHER = [
    {"max_grad_norm": 0.1, "grad_clip": 1e-3, "orthograd": True, "growth_limit": 1.01},
    {"orthograd": True, "cautious": True, "cautious_decay": True, "rounding": "kahan"},
    {"grams": True, "cautious_decay": True, "growth_limit": 1.5, "rounding": "nearest"},
    {"grad_clip": 1e-3, "cautious": True, "cautious_decay": True, "storage": "bf16", "seed": 7},
]


def rotated(firsts, seconds, thirds):
    """Every first with every second, while the thirds take turns.  If there are no more of them
    than of the firsts and of the seconds, each meets each of those, too."""
    return [
        (first, second, thirds[(i + j) % len(thirds)])
        for i, first in enumerate(firsts)
        for j, second in enumerate(seconds)
    ]


def step(optimizer):
    optimizer.step()


def estimate(optimizer):
    """Update Sophia's curvature estimate."""
    optimizer.update_hessian(3.0)


def weights(shape, dtype, generator):
    return (torch.randn(shape, generator=generator) * 0.1).to(dtype)


def gradients(shape, dtype, generator, scale=0.01):
    """Gradients of many magnitudes, with some zero elements, rows and columns."""
    g = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator) ** 3
    if len(shape) > 1 and shape[0] > 2 and g.numel():
        g *= torch.logspace(-3, 0, shape[0]).view(-1, *[1] * (len(shape) - 1))
        g[1], g[:, 1] = 0, 0
    g *= torch.rand(shape, generator=generator) > 0.01
    return (g * scale).to(dtype)
