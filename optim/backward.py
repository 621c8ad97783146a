"""Stepping inside the backward pass, so that all gradients never exist at once.

A gradient is consumed as soon as it is complete: when `bucket_bytes` of them have gathered, their
parameters are stepped and the gradients freed.  For the SDXL UNet in bf16 that is 64 MB of
gradients instead of 5.1 GB.

A gradient that arrives twice in a round was incomplete the first time, and its parameter may have
been stepped with only a part of it: that is an error.  A round ends with `step()` or `zero_grad()`.

Autograd has one thread per device, so gradients of several devices (two GPUs, or a GPU and the CPU)
arrive in several threads; one thread at a time collects and steps them.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, distributed
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from optim.fused import FusedOptimizer, uncompiled

# The `BackwardHooks` of each hooked parameter.
_hooked = WeakTensorKeyDictionary()


class BackwardHooks:
    """The hooks that `fuse_backward` installed; `remove()` removes them, and so does deleting the
    optimizer."""

    def __init__(self, optimizer: FusedOptimizer, bucket_bytes: int, summed: bool) -> None:
        self._summed = summed  # over processes, by the caller
        self._optimizer_ref = weakref.ref(optimizer)
        self._consume: Callable[..., None] | None = None  # the optimizer's `step_param`
        self._bucket_bytes = bucket_bytes
        self._arrived: set[Tensor] = set()  # in this round
        self._num_expected = 0  # in this round
        self._waiting: list[Tensor] = []
        self._waiting_bytes = 0
        self._collected: dict[Tensor, tuple[int, int]] = {}  # `_seen` of `_waiting`, on arrival
        self._turn = threading.RLock()  # for the threads that deliver gradients
        self._holds = False
        self._handles: dict[Tensor, RemovableHandle] = {}
        self.attach()
        self._after_step = optimizer.register_step_post_hook(lambda *_: self._stepped())
        optimizer.fused_backward = self
        weakref.finalize(optimizer, _take_off, self._handles)

    @property
    def _optimizer(self) -> FusedOptimizer:
        optimizer = self._optimizer_ref()
        assert optimizer is not None, "without it there are no hooks"
        return optimizer

    def attach(self) -> None:
        """Hook the optimizer's current parameters, and unhook all others.  Raises ValueError for
        one that another optimizer steps inside backward()."""
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        if self._handles.keys() == {*params}:
            return
        for param in params:
            if _hooked.get(param, self) is not self:
                raise ValueError(
                    f"fuse_backward: a parameter {tuple(param.shape)} is already stepped inside "
                    "backward() by another optimizer; call remove() on what the first "
                    "fuse_backward() returned"
                )
        for param in self._handles.keys() - {*params}:
            _take_off({param: self._handles.pop(param)})
        collect = _weakly(self._collect)  # a hook must not keep the optimizer alive
        for param in params:
            if param not in self._handles:
                trainable = param.requires_grad
                param.requires_grad_(True)  # a frozen tensor takes no hook; it may be unfrozen
                self._handles[param] = param.register_post_accumulate_grad_hook(collect)
                _hooked[param] = self
                param.requires_grad_(trainable)

    def remove(self) -> None:
        """Remove the hooks; waiting gradients are left for an ordinary `step()`."""
        _take_off(self._handles)
        self._after_step.remove()
        self.end_round()
        optimizer = self._optimizer_ref()
        if optimizer is not None and optimizer.fused_backward is self:
            optimizer.fused_backward = None

    @contextmanager
    def handing_to(self, consume: Callable[..., None]) -> Iterator[None]:
        """In this context the backward pass calls `consume(*params)` for each bucket instead of
        stepping; the last bucket is consumed at the end of the context.

        This is a round of its own: raises RuntimeError if gradients are waiting for a `step()`.
        """
        if self._live():
            raise RuntimeError(
                "handing_to: gradients of an earlier backward() wait for step() or zero_grad()"
            )
        self.end_round()
        self._consume = consume
        try:
            yield
            self._take()
        finally:
            self._consume = None
            _free(self._waiting)
            self.end_round()

    @contextmanager
    def holding(self) -> Iterator[None]:
        """In this context gradients accumulate over several backward passes; the next pass outside
        of it steps with their sum."""
        held, self._holds = self._holds, True
        try:
            yield
        finally:
            self._holds = held

    def end_round(self) -> None:
        """Forget which gradients have arrived; those still waiting stay in `.grad`."""
        self._arrived.clear()
        self._forget_waiting()

    def _forget_waiting(self) -> None:
        self._waiting, self._waiting_bytes = [], 0
        self._collected.clear()

    def check_unchanged(self) -> None:
        """Raise RuntimeError if waiting gradients were changed since their arrival, and others of
        this round have already been stepped."""
        live = [(param, param.grad) for param in self._waiting if param.grad is not None]
        changed = sum(_seen(grad) != self._collected[param] for param, grad in live)
        if changed and len(self._waiting) < len(self._arrived):
            raise RuntimeError(
                f"fuse_backward: {changed} of {len(self._arrived)} gradients were changed after "
                "backward(), perhaps by clipping, which could not reach those already applied "
                "inside it. Clip with the optimizer's grad_clip (the norm of each tensor's "
                "gradient), in the trainer method.clip=exact, lagged or rms, or call remove() on "
                "what fuse_backward() returned"
            )

    def _collect(self, param: Tensor) -> None:
        with self._turn:
            self._collect_alone(param)

    def _collect_alone(self, param: Tensor) -> None:
        assert param.grad is not None
        if param in self._arrived:
            raise RuntimeError(
                f"fuse_backward: the gradient of a parameter {tuple(param.shape)} arrived twice, "
                "and the parameter may have been updated with the first only. Between two "
                "backward() passes call optimizer.step() or optimizer.zero_grad(); passes that "
                "accumulate belong inside holding(), except the last; a parameter used in several "
                "checkpoints needs checkpoint(use_reentrant=False)"
            )
        if self._holds:
            return
        if not self._arrived:
            if not self._summed:
                _check_alone()
            self._num_expected = sum(each.requires_grad for each in self._handles)
        self._arrived.add(param)
        self._waiting.append(param)
        self._collected[param] = _seen(param.grad)
        self._waiting_bytes += param.grad.numel() * param.grad.element_size()
        # The last bucket is left to `step()`, however full: a clip before it then finds gradients
        # to change, and `check_unchanged` detects that.
        is_last = len(self._arrived) == self._num_expected
        if self._waiting_bytes >= self._bucket_bytes and not is_last:
            self._take()

    def _live(self) -> list[Tensor]:
        """The waiting parameters that still have a gradient; the caller may have cleared it."""
        return [param for param in self._waiting if param.grad is not None]

    def _take(self) -> None:
        """Consume and free the waiting gradients, but not those that arrive meanwhile."""
        live, taken = self._live(), self._waiting
        self._forget_waiting()
        try:
            if live:
                (self._consume or self._optimizer.step_param)(*live)
        finally:
            _free(taken)

    def _stepped(self) -> None:
        """After an ordinary step, which has used every gradient: free them all."""
        for group in self._optimizer.param_groups:
            _free(group["params"])
        self.end_round()
        self.attach()


@uncompiled  # else dynamo compiles a graph for every gradient
def _seen(grad: Tensor) -> tuple[int, int]:
    """A value that changes when a gradient is written to or replaced; no device sync."""
    return grad.data_ptr(), grad._version


def _weakly(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """This bound method by a weak reference: it does nothing once its object is gone."""
    weak = weakref.WeakMethod(method)

    def call(param: Tensor) -> None:
        if (found := weak()) is not None:
            found(param)

    return call


def _take_off(handles: dict[Tensor, RemovableHandle]) -> None:
    """Remove these hooks, and forget them."""
    for param, handle in handles.items():
        handle.remove()
        _hooked.pop(param, None)
    handles.clear()


def _free(params: list[Tensor]) -> None:
    for param in params:
        param.grad = None


def fuse_backward(
    optimizer: FusedOptimizer, bucket_bytes: int = 64 << 20, *, summed: bool = False
) -> BackwardHooks:
    """Make `optimizer` step inside every backward pass from now on.

    The training loop stays the same: set the learning rate, call `backward()`, then `step()`, which
    applies and clears the gradients left in the last bucket.  The weights are bitwise those of the
    unfused loop.  A global norm, which needs all gradients at once, is unavailable:
    `clip_grad_norm_` would only reach the last bucket, and a `step()` that finds its gradients
    changed is a RuntimeError (if some parameters take no part in the pass, there may be no gradient
    left, and clipping goes unnoticed).  Several backward passes accumulate inside `holding()`,
    which keeps the gradients.

    To skip a step, call `optimizer.zero_grad()` instead; updates already made by the backward pass
    remain.  A gradient that arrives twice without either is a RuntimeError inside `backward()`: in
    a second pass outside `holding()`, or for a parameter that several reentrant checkpoints share
    (`use_reentrant=False` accumulates its gradient first).

    Not for `torch.amp.GradScaler`, whose scale would still be in the gradients: its first `step()`
    is a RuntimeError, after one backward pass has already done harm (hooks cannot see the scale).
    Not for DistributedDataParallel, which averages gradients over processes only after they have
    been consumed here.  With several processes, `summed` says that the caller sums each gradient
    over them as it arrives, in a hook that was registered before this call.

    Raises ValueError if there are several processes and it does not, if the optimizer is
    already fused or another one steps a parameter in this way, if `bucket_bytes` is not positive,
    or a group has a `max_grad_norm` or on_nonfinite="raise", and TypeError for an optimizer that is
    not of this family.
    """
    wrapped = getattr(optimizer, "optimizer", None)
    if isinstance(wrapped, FusedOptimizer):
        raise TypeError(
            f"fuse_backward: {type(optimizer).__qualname__} wraps a {type(wrapped).__name__}; pass "
            "that one, its .optimizer"
        )
    if not isinstance(optimizer, FusedOptimizer):
        cls = type(optimizer)
        raise TypeError(
            f"fuse_backward: {cls.__module__}.{cls.__qualname__} is not an optimizer of this "
            "family; use one of optim.FAMILY"
        )
    optimizer.check_steps_alone("fuse_backward")
    if bucket_bytes <= 0:
        raise ValueError(f"fuse_backward: bucket_bytes={bucket_bytes} must be > 0")
    if optimizer.fused_backward is not None:
        raise ValueError(
            f"fuse_backward: this {type(optimizer).__name__} is already fused, and would step "
            "twice; call remove() on what the first fuse_backward() returned"
        )
    if not summed:
        _check_alone()
    return BackwardHooks(optimizer, bucket_bytes, summed)


def _check_alone() -> None:
    """Raise ValueError if there are other processes, whose gradients a step would miss."""
    if distributed.is_available() and distributed.is_initialized():
        processes = distributed.get_world_size()
        if processes > 1:
            raise ValueError(
                f"fuse_backward: there are {processes} processes, and each would step with its own "
                "gradients, before DistributedDataParallel averages them: their models would drift "
                "apart. Call step() after backward() instead, or sum the gradients in hooks of "
                "your own and pass summed=True"
            )
