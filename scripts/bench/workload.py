"""The parameters and gradients that every candidate steps, and the reference beside it."""

import torch
from torch.nn import Parameter

from bench.shapes import Shape, num_params

LR = 1e-5  # what SDXL is fine-tuned with: steps leave the weights near where they were
GRAD_STD = 1e-3
SETTLING_STEPS = 2  # allocate state, build plans, leave special first steps (ADOPT's) behind


class Workload:
    """Tensors of these shapes with two fixed sets of random gradients, used in turn.

    All candidates share them: a step moves a weight by about LR, which changes no timing.  Two sets
    because a training step brings new gradient tensors at other addresses, which a benchmark must
    not let anybody skip.
    """

    def __init__(self, shapes: list[Shape], dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def random(shape: Shape, std: float) -> torch.Tensor:
            numbers = torch.empty(shape, dtype=dtype, device=device)
            return numbers.normal_(std=std, generator=generator)

        self.shapes = shapes
        self.num_params = num_params(shapes)
        self.element_size = dtype.itemsize
        self.params = [Parameter(random(shape, 0.02)) for shape in shapes]
        self._grads = [[random(shape, GRAD_STD) for shape in shapes] for _ in range(2)]
        self.next_grads()
        self.reference = torch.optim.AdamW(self.params, lr=LR, fused=True)
        self.settle(self.reference)

    def next_grads(self) -> None:
        """Hand every parameter its gradient of the other set."""
        self._grads.reverse()
        for param, grad in zip(self.params, self._grads[0], strict=True):
            param.grad = grad

    def settle(self, optimizer: torch.optim.Optimizer) -> None:
        """The first steps, which are not measured."""
        for _ in range(SETTLING_STEPS):
            self.next_grads()
            optimizer.step()
