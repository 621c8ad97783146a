"""The exponential moving average of the trained weights (`method.ema`).

    average <- decay * average + (1 - decay) * weights

Rounded to nearest, a bf16 average could not follow slow weights: its spacing is 1/256 of a value,
and a decay of 0.9999 moves it by a ten-thousandth of the difference.  So it is rounded
stochastically, by the optimizers' own engine: the average is a parameter with the gradient
average - weights, updated by SGD at the rate 1 - decay.  The random draws depend only on (seed,
tensor, number of the update), so a resumed average is the same bit for bit.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

import optim
from optim import rng
from trainer.config import DTYPES, EmaConfig
from trainer.streams import Stream

log = logging.getLogger(__name__)

_BUCKET_BYTES = 16 << 20  # of differences in memory at once


def decay_at(config: EmaConfig, step: int) -> float:
    """The decay of the update after step `step` (from 1), which covers `every` steps.

    With `warmup` at most (1 + step) / (10 + step), as in TensorFlow's moving average.
    """
    decay = min(config.decay, (1 + step) / (10 + step)) if config.warmup else config.decay
    return decay**config.every


class Ema:
    """The averages of some parameters, by name, with their own dtype and device."""

    def __init__(
        self,
        config: EmaConfig,
        parameters: Mapping[str, Parameter],
        seed: int,
        saved: Mapping[str, Tensor] | None = None,
        step: int = 0,
    ) -> None:
        """Start from the parameters' values, or from the `saved` averages of a run that has made
        `step` steps."""
        self.config = config
        self._weights = dict(parameters)
        self.averages = {
            name: Parameter(torch.empty_like(p, device=self._device(p), dtype=DTYPES[config.dtype]))
            for name, p in self._weights.items()
        }
        self._optimizer = optim.build(
            "sgd",
            list(self.averages.values()),
            momentum=0.0,
            weight_decay=0.0,
            seed=rng.mix(seed, Stream.EMA) >> 1,
        )
        self._optimizer.init_state()
        self.put_back(saved, step)
        count = sum(a.nbytes for a in self.averages.values())
        log.info("  average of the weights: %.1f MB in %s", count / 1e6, config.dtype)

    @torch.no_grad()
    def put_back(self, saved: Mapping[str, Tensor] | None, step: int) -> None:
        """Start again from `saved` averages, or from the weights, after step `step`."""
        for name, average in self.averages.items():
            average.copy_((saved or self._weights)[name])
        for state in self._optimizer.state.values():
            state["step"].fill_(step // self.config.every)

    def update(self, step: int) -> None:
        """Update the averages after step `step` (from 1), if an update is due."""
        if step % self.config.every:
            return
        for group in self._optimizer.param_groups:
            group["lr"] = 1 - decay_at(self.config, step)
        bucket, size = list[Parameter](), 0
        for name, average in self.averages.items():
            weights = self._weights[name].detach().to(average.device)
            average.grad = (average.detach() - weights).to(average.dtype)
            bucket.append(average)
            size += average.nbytes
            if size >= _BUCKET_BYTES:
                self._take(bucket)
                size = 0
        self._take(bucket)

    def state(self) -> dict[str, Tensor]:
        """The averages, to be saved."""
        return {name: average.detach() for name, average in self.averages.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block, the averages are the model's weights.

        If dtype and device agree, the two are swapped without copying; else the weights are kept in
        host memory, and copied back.
        """
        aside: dict[str, Tensor] = {}
        try:
            for name in self.averages:  # memory may run out in the middle
                aside[name] = self._put(name)
            yield
        finally:
            for name, own in aside.items():
                parameter = self._weights[name]
                if self._is_alike(name):
                    parameter.data = own
                else:
                    parameter.data.copy_(own)

    def _put(self, name: str) -> Tensor:
        """Give a parameter its average; returns its own weights."""
        parameter, average = self._weights[name], self.averages[name].detach()
        own = parameter.data
        if self._is_alike(name):
            parameter.data = average
            return own
        own = own.to("cpu", copy=True)  # the device may have no room for both
        parameter.data.copy_(average)
        return own

    def _is_alike(self, name: str) -> bool:
        """Whether an average has its parameter's dtype and device."""
        parameter, average = self._weights[name], self.averages[name]
        return (parameter.dtype, parameter.device) == (average.dtype, average.device)

    def _take(self, bucket: list[Parameter]) -> None:
        if bucket:
            self._optimizer.step_param(*bucket)
        for average in bucket:
            average.grad = None
        bucket.clear()

    def _device(self, parameter: Parameter) -> torch.device:
        return torch.device("cpu") if self.config.device == "cpu" else parameter.device
