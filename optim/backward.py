"""Stepping inside the backward pass, so that all gradients never exist at once.

A gradient is consumed as soon as it is complete: when `bucket_bytes` of them have gathered, their
parameters are stepped and the gradients freed.  For the SDXL UNet in bf16 that is 64 MB of
gradients instead of 5.1 GB.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from optim.fused import FusedOptimizer


class FusedBackward:
    """The hooks that `fuse_backward` installed; `remove()` takes them off."""

    def __init__(self, optimizer: FusedOptimizer, bucket_bytes: int) -> None:
        self._consume: Callable[..., None] = optimizer.step_param
        self._bucket_bytes = bucket_bytes
        self._waiting: list[Tensor] = []
        self._waiting_bytes = 0
        self._holds = False
        params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._handles = [p.register_post_accumulate_grad_hook(self._collect) for p in params]
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self._free()))

    def remove(self) -> None:
        """Take the hooks off; gradients still waiting stay, for an ordinary `step()`."""
        for handle in self._handles:
            handle.remove()
        self._waiting, self._waiting_bytes = [], 0

    @contextmanager
    def handing_to(self, consume: Callable[..., None]) -> Iterator[None]:
        """Within it, the backward pass hands its gradients to `consume(*params)`, bucket by bucket,
        where it would step; what is left in the last bucket at the end of it, too."""
        stepping, self._consume = self._consume, consume
        try:
            yield
            if self._waiting:
                consume(*self._waiting)
        finally:
            self._consume = stepping
            self._free()

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Within it, gradients are left where they are, to add up over several backward passes; the
        next pass outside of it steps with their sum."""
        self._holds = True
        try:
            yield
        finally:
            self._holds = False

    def _collect(self, param: Tensor) -> None:
        assert param.grad is not None
        if self._holds:
            return
        self._waiting.append(param)
        self._waiting_bytes += param.grad.numel() * param.grad.element_size()
        if self._waiting_bytes >= self._bucket_bytes:
            self._consume(*self._waiting)
            self._free()

    def _free(self) -> None:
        for param in self._waiting:
            param.grad = None
        self._waiting, self._waiting_bytes = [], 0


def fuse_backward(optimizer: FusedOptimizer, bucket_bytes: int = 64 << 20) -> FusedBackward:
    """Let `optimizer` step inside every backward pass from now on.

    The training loop keeps its form: set the learning rate, call `backward()`, then `step()`, which
    steps what is left in the last bucket.  The weights are bitwise those of the unfused loop.  A
    global norm, which needs all gradients at once, cannot be had this way; several backward passes
    add up inside `holding()`, which keeps the gradients.  Raises ValueError where `bucket_bytes` is
    not positive or a group has a `max_grad_norm`.
    """
    optimizer.check_steps_alone("fuse_backward")
    if bucket_bytes <= 0:
        raise ValueError(f"fuse_backward: bucket_bytes={bucket_bytes} must be > 0")
    return FusedBackward(optimizer, bucket_bytes)
