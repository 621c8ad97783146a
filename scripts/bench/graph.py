"""A training step in a CUDA graph: its replays are the eager steps."""

import torch
from torch import nn

import optim
from bench.outcomes import Finding
from bench.subject import Subject

WARM = 3
RATES = (1e-2, 3e-3, 1e-3, 5e-3, 2e-3)
EAGER = 3  # which of these steps is made outside the graph, between its replays
FARTHEST = 1e-2  # of how far the weights have moved, where the bits differ


class Training:
    """A small model and its training step, the same from the same arguments."""

    def __init__(self, device: torch.device, name: str, **options: object) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int, std: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) * std).to(device, torch.bfloat16)

        self.x, self.y = random(32, 256), random(32, 256)
        layers = [nn.Linear(256, 320), nn.Linear(320, 256)]
        self.model = nn.Sequential(layers[0], nn.SiLU(), layers[1]).to(device, torch.bfloat16)
        with torch.no_grad():
            for param in self.model.parameters():
                param.copy_(random(*param.shape, std=0.06))
        self.start = self.weights()
        self.lr = torch.full((), 1e-2, device=device)
        self.optimizer = optim.build(name, self.model.parameters(), lr=self.lr, **options)

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        (self.model(self.x) - self.y).float().square().mean().backward()
        self.optimizer.step()

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten().cpu() for p in self.model.parameters()])


def is_captured(subject: Subject, deadline: float) -> Finding:
    """A graph's replays, and an eager step between them, are the eager steps."""
    distances = {}
    runs: tuple[tuple[str, dict[str, object]], ...] = (
        ("adamw_factored", {}),
        ("adafactor8bit", {"max_grad_norm": 0.1}),
        ("apollo", {"rank": 16, "max_grad_norm": 0.1}),
        ("apollo_mini", {}),
        ("muon", {}),
    )
    for name, options in runs:
        eager, graphed = (Training(subject.device, name, **options) for _ in range(2))
        for _ in range(WARM):
            eager.step()
        for rate in RATES:
            eager.lr.fill_(rate)
            eager.step()
        _replay(graphed)
        wanted, found = eager.weights(), graphed.weights()
        moved = (wanted - eager.start).float().norm()
        distances[name] = ((found - wanted).float().norm() / moved).item()
    far = [name for name, distance in distances.items() if not distance <= FARTHEST]
    said = ", ".join(
        f"{name} {'bitwise' if distance == 0 else f'{distance:.1e} apart'}"
        for name, distance in distances.items()
    )
    return Finding(
        holds=not far,
        line=f"{len(RATES) - 1} replays and an eager step between them: {said}",
        facts={"distances": distances},
    )


def _replay(training: Training) -> None:
    """The steps of RATES by a graph, but for the one that is EAGER."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            training.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    training.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        training.step()
    for count, rate in enumerate(RATES):
        training.lr.fill_(rate)
        if count == EAGER:
            training.step()
        else:
            graph.replay()
    torch.cuda.synchronize()
