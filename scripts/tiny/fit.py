"""The training loop of both networks: checkpoints, progress, and random numbers from the step.

A loss draws everything random from the number of its step, so that a run killed anywhere ends with
the same weights and a checkpoint needs no generator state.
"""

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)

SEED = 0
SECONDS_PER_REPORT = 15
SECONDS_PER_CHECKPOINT = 120


@dataclass(kw_only=True)
class Recipe:
    steps: int
    batch: int
    lr_peak: float
    flat_until: float  # fraction of the steps after which the learning rate falls
    ema: float  # decay per step of the averaged weights, which are the ones that ship
    warmup: int = 100  # steps


def fit(
    name: str,
    model: Network,
    groups: list[dict],
    loss_at: Callable[[Network, int], Tensor],
    recipe: Recipe,
    work: Path,
) -> Network:
    """Minimise `loss_at(model, step)`, from the checkpoint if there is one.  -> the averaged model.

    AdamW; a group of parameters may carry an `lr_scale`. The loss draws everything random from
    `step`.
    """
    optimizer = torch.optim.AdamW(
        groups, lr=recipe.lr_peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    average = copy.deepcopy(model).requires_grad_(False)
    checkpoint = work / f"{name}.pt"
    first = _restore(checkpoint, model, average, optimizer)
    report = Progress(name, first, recipe)
    saved_at = time.monotonic()
    for step in range(first, recipe.steps):
        # Set the learning rate: a function of the step alone.
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_peak * lr_factor(step, recipe) * group.get("lr_scale", 1.0)

        # Evaluate the loss, clip, and update the weights.
        loss = loss_at(model, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        # Update their average; early on over a short window, to forget the initialisation.
        decay = min(recipe.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)

        # Report, and save.
        report.step(step, loss.item())
        if time.monotonic() - saved_at > SECONDS_PER_CHECKPOINT or step + 1 == recipe.steps:
            _save(checkpoint, step + 1, model, average, optimizer)
            saved_at = time.monotonic()
    return average.eval()


def lr_factor(step: int, recipe: Recipe) -> float:
    """Fraction of the peak learning rate: linear warm-up, flat, half a cosine down to 2 %."""
    warmth = min(1.0, (step + 1) / recipe.warmup)
    flat_steps = recipe.flat_until * recipe.steps
    progress = max(0.0, (step - flat_steps) / (recipe.steps - flat_steps))
    return warmth * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


class Progress:
    """Prints a line now and then: mean loss since the last line, samples per second, time left."""

    def __init__(self, name: str, first: int, recipe: Recipe):
        self.name, self.recipe = name, recipe
        self.losses: list[float] = []
        self.since = time.monotonic()
        print(f"{name}: from step {first} of {recipe.steps}", flush=True)

    def step(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        seconds = time.monotonic() - self.since
        if seconds < SECONDS_PER_REPORT and step + 1 < self.recipe.steps:
            return
        steps_per_second = len(self.losses) / seconds
        minutes_left = (self.recipe.steps - step - 1) / steps_per_second / 60
        print(
            f"{self.name}: step {step + 1}/{self.recipe.steps}  loss {np.mean(self.losses):.4f}"
            f"  {steps_per_second * self.recipe.batch:.1f} samples/s  ETA {minutes_left:.1f} min",
            flush=True,
        )
        self.losses, self.since = [], time.monotonic()


def _save(
    path: Path, step: int, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Write a checkpoint under another name first: a kill never leaves half a file."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def _restore(
    path: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Load a checkpoint in place.  -> the step to go on with, 0 without one."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# --- random numbers -------------------------------------------------------------------------------


def draw(step: int) -> np.random.Generator:
    """The random numbers of one step."""
    return np.random.default_rng((SEED, step))


def picks(step: int, batch: int, number: int) -> list[int]:
    """The samples of one step, when `number` samples are gone through in a new order each time."""
    positions = range(step * batch, (step + 1) * batch)
    orders = {
        k // number: np.random.default_rng((SEED, 1, k // number)).permutation(number)
        for k in positions
    }
    return [int(orders[k // number][k % number]) for k in positions]


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))
