"""Sophia: a momentum divided by an estimate of the loss's curvature, each element clipped."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from optim import gpu, plan, reference
from optim.codecs import Codec, split, stored
from optim.features import Features
from optim.fused import FusedOptimizer, uncompiled
from optim.idle import IdleOption
from optim.share import Share, Trait


class Sophia(FusedOptimizer):
    """Sophia-G: the momentum over the Gauss-Newton diagonal, elements clipped at 1; both in fp32.

    State: 8 bytes per parameter.

    Args:
        params: parameters or parameter groups.
        lr: step size; the largest change of an element.
        betas: decay of the averages of the gradient and of the curvature's estimates.
        rho: multiplies the curvature; the larger it is, the fewer elements are clipped.
        hessian_every: steps from one estimate of the curvature to the next, the first before the
            first step.
        eps: floor of rho * curvature in the division; an element at the floor is clipped, or has
            hardly any gradient.
        weight_decay: decoupled decay; a step multiplies the weights by 1 - lr * weight_decay.
        features: options shared by all optimizers, `optim.features.Features`.

    The training loop computes the estimates, because they need a backward pass of their own:

        if optimizer.wants_hessian():
            prediction = model(x)
            noisy = prediction.detach() + torch.randn_like(prediction)  # a sampled target
            F.mse_loss(prediction, noisy).backward()
            optimizer.update_hessian(prediction.numel() / 2)  # before the loss's own backward()

    Without any the curvature is 0 and every element is clipped: lr times the momentum's sign.  A
    warning says so once (`IdleOption`), after `hessian_every` steps.

    Source: Liu et al. 2023 (arXiv 2305.14342), Alg. 2 and 3.
    """

    rule = staticmethod(reference.sophia)
    common: ClassVar[tuple[str, ...]] = ("hessian_every",)
    _num_steps: int | None = None  # the largest step count, if known without reading the device
    _has_moved = False  # since the last `step()`
    # Steps that this object has made without an estimate; None when no warning can be due.
    _num_blind: int | None = 0
    _captured = False  # if so, a CUDA graph's replays step too: the count must be read each time

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        hessian_every: int = 10,
        eps: float = 1e-12,
        weight_decay: float = 0.1,
        **features: Unpack[Features],
    ) -> None:
        super().__init__(params, locals())

    @classmethod
    def bounds_updates(cls, group: Mapping[str, Any]) -> str:
        return "clips each element of an update, whatever the size of its gradient"

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        return stored(param.shape, group, "exp_avg", square="hessian")

    def wants_hessian(self) -> bool:
        """Whether an estimate is due before the next step: before the first, and after every
        `hessian_every` steps.  It stays due until that step, whether or not one has been made.

        Waits for a GPU once, or every time if a step has been captured in a CUDA graph."""
        steps = self._num_steps
        if steps is None:
            steps = self._largest_count()
            self._num_steps = None if self._has_moved or self._captured else steps
        return steps % self.param_groups[0]["hessian_every"] == 0

    def _largest_count(self) -> int:
        """The largest step count of all parameters, read from each device once."""
        counts: dict[torch.device, list[Tensor]] = {}
        for _, _, state in self._allocated():
            counts.setdefault(state["step"].device, []).append(state["step"])
        return max((int(torch.stack(those).max()) for those in counts.values()), default=0)

    def end_step(self) -> None:
        if self._num_steps is not None and self._has_moved:
            self._num_steps += 1
        if self._num_blind is not None and self._has_moved:
            self._num_blind += 1
            self._say_if_blind(self._num_blind)
        self._has_moved = False

    def _say_if_blind(self, num_steps: int) -> None:
        """Warn once if an estimate should have been made by now and the state has none."""
        group = self.param_groups[0]
        if num_steps < group["hessian_every"]:
            return
        self._num_blind = None
        if not self._knows_curvature():  # it may come from before a load or a copy
            warnings.warn(
                f"Sophia: rho={group['rho']!r} and hessian_every={group['hessian_every']!r} have "
                f"no effect without estimates of the curvature: {num_steps} steps were made "
                "without one, each lr times the momentum's sign; call update_hessian() when "
                "wants_hessian() says so, or use Lion",
                IdleOption,
                stacklevel=2,
            )

    def _knows_curvature(self) -> bool:
        """Whether any curvature in the state is not zero; waits for a GPU."""
        return any(
            bool(self.codecs(param, group)["hessian"].decode(split(state, "hessian")).any())
            for group, param, state in self._allocated()
        )

    def _step(self, share: Share) -> None:
        super()._step(share)
        self._has_moved = self._has_moved or bool(share)
        if gpu.capturing():
            self._captured, self._num_steps = True, None

    def _forget(self) -> None:
        super()._forget()
        self._num_steps = None

    @uncompiled
    @torch.no_grad()
    def update_hessian(self, scale: float, params: Sequence[Tensor] | None = None) -> None:
        """Update the curvature from the gradients of a sampled loss, and clear them; no weight
        moves.

        Uses all parameters that have a gradient, or `params`.  scale * grad^2 is the estimate.
        For the mean of (f - y)^2 over n elements, with unit normal noise e, y = f + e and
        f's Jacobian J: grad = -2/n J^T e, so the expected grad^2 is 4/n^2 diag(J^T J), and the
        Gauss-Newton diagonal is 2/n diag(J^T J): the scale is n/2.  If the loss weights its terms
        by c, use e / sqrt(c) for e; for gradients accumulated over micro-batches, each of them 1/m
        of the loss, use the n of all together.

        With `fuse_backward`, whose hooks would step at once, run the backward pass inside
        `hooks.handing_to(lambda *params: optimizer.update_hessian(scale, params))`.

        Raises ValueError if there is no gradient or `scale` is not a positive number, and, with
        on_nonfinite="raise", FloatingPointError if a gradient element is not usable.
        """
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(
                f"update_hessian: scale={scale} is not possible; it must be a number > 0 (n/2 for "
                "the mean of n squared errors)"
            )
        places = self._places()
        self._watch.check(self.param_groups)
        if params is None:
            params = [param for _, _, param in places if param.grad is not None]
        share = Share(self._places_of("update_hessian", params))
        if not params or Trait.MISSING in share.traits:
            which = "a parameter has no" if params else "no parameter has a"
            raise ValueError(
                f"update_hessian: {which} gradient; call backward() of the sampled loss before it"
            )
        self._refuse_gradients(share)
        self._raise_on_nonfinite(share)
        coefficients: dict[int, float | Tensor] = {id(g): scale**0.5 for g in self.param_groups}
        with self._turn:
            for engine, its in self._dispatch.shares(share, plan.ESTIMATE):
                engine.step(its, coefficients)
        for param in params:
            param.grad = None
        self._num_blind = None
