"""Measure training of the real SDXL UNet: memory by category, and seconds per step.

    python scripts/measure_sdxl.py                       # full, batch 1, 32x32 latents
    python scripts/measure_sdxl.py --latent 64 --json
    python scripts/measure_sdxl.py method=lora optim=adamw8bit runtime.gradient_checkpointing=true
    python scripts/measure_sdxl.py --grid                # 1024 px: full and LoRA, batch 1 and 4

The UNet is built from its configuration, 2,567,463,684 parameters, with random weights: memory and
time do not depend on their values.  Everything else is the trainer's own code; further arguments
are its options (`optim=`, `method.clip=`, ...).  By default Adafactor8bit trains bf16 weights with
the fused backward.  On a GPU the peak is the memory allocated by torch, on a CPU the process's
resident memory, including imports; it is shown next to the prediction of `python -m
trainer.planner` for the same step.
"""

import argparse
import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from trainer import planner
from trainer.checks import validate
from trainer.cli import compose, explain
from trainer.config import DTYPES, Config
from trainer.formats import architectures
from trainer.models import execution, quantization
from trainer.models.model import Model
from trainer.objective import batches, losses
from trainer.objective.noise_schedule import NoiseSchedule, training_schedule
from trainer.objective.trained_scheduler import scheduler_config
from trainer.reporting.report import format_bytes
from trainer.system import memory
from trainer.training import gradients, method, optimizers

UNET = architectures.folder("sdxl") / "unet" / "config.json"
SCHEDULER = architectures.folder("sdxl") / "scheduler" / "scheduler_config.json"
# As a user with little memory would train; arguments come after these.
OPTIONS = (
    "model=sdxl",
    f"model.path={architectures.folder('sdxl')}",
    "data=folder",
    "data.path=.",
    "optim=adafactor8bit",
    "optim.lr=1e-5",
    "runtime.fused_backward=true",
    "method.clip=none",
)
_BLOCK = 1 << 22  # random numbers that all weights are filled from


def configured(overrides: list[str]) -> Config:
    """The trainer's configuration for these options."""
    compose.register()
    return validate.to_dataclasses(explain.composition([*OPTIONS, *overrides]))


def empty_unet(path: Path) -> UNet2DConditionModel:
    """The UNet of this configuration: shapes without data."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(json.loads(path.read_text(encoding="utf-8")))


@torch.no_grad()
def build_unet(path: Path, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
    """The UNet of this configuration with random weights, never held in any other dtype."""
    unet = empty_unet(path).to(dtype).to_empty(device=device).requires_grad_(False)
    normal = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for module in unet.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2:
                is_gain = name == "weight"  # of a norm
                parameter.fill_(1.0 if is_gain else 0.0)
                continue
            scale = parameter[0].numel() ** -0.5
            for chunk in parameter.view(-1).split(_BLOCK):
                torch.mul(normal[: chunk.numel()], scale, out=chunk)
    return unet


def random_inputs(unet: UNet2DConditionModel, size: int, latent: tuple[int, int]) -> batches.Inputs:
    """Random numbers in the shapes that this UNet takes."""
    generator, config = torch.Generator().manual_seed(1), unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(size, *shape, generator=generator)

    return batches.Inputs(
        latents=normal(config.in_channels, *latent),
        prompt=normal(77, config.cross_attention_dim),
        pooled=normal(pooled),
        time_ids=torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]] * size),
    )


class AliveGradients:
    """The most bytes of gradients that exist at once, sampled whenever one is complete."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.most = 0
        self._alive: set[Tensor] = set()
        self._handles = [p.register_post_accumulate_grad_hook(self._look) for p in parameters]

    def _look(self, parameter: Tensor) -> None:
        self._alive.add(parameter)
        self._alive = {p for p in self._alive if p.grad is not None}
        self.most = max(self.most, sum(p.grad.nbytes for p in self._alive if p.grad is not None))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def measure(config: Config, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train for `steps` steps: -> what was measured."""
    device = torch.device(arguments.device)
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    before = memory.resident_bytes()
    started = time.monotonic()
    unet = build_unet(arguments.unet, DTYPES[config.model.dtype], device)
    if config.model.quantization != "none":
        unet.apply(partial(quantization.quantize, kind=config.model.quantization))
    memory.return_freed_blocks(quantization.num_weights(unet) * unet.dtype.itemsize)
    model: Any = SimpleNamespace(trained_parts={"unet": unet}, text_encoder=None)
    method.attach(config.method, model, config.seed)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    alive = AliveGradients(parameters)
    optimizer = optimizers.build(config.optim, nn.ModuleDict(model.trained_parts), config.seed)
    execution.prepare(config, model.trained_parts, device)
    backward = gradients.make(config, parameters, optimizer)
    inputs = random_inputs(unet, arguments.batch, arguments.latent)
    scheduler = json.loads(SCHEDULER.read_text(encoding="utf-8"))
    trained = scheduler_config(config.noise, scheduler)
    noise_schedule = training_schedule(trained, config.noise)
    seconds_to_build = time.monotonic() - started
    gc.collect()
    memory.reset_peak(device)

    count, steps = config.runtime.accumulation, []
    for step in range(arguments.steps):
        drawn = [
            batches.noised(inputs, noise_schedule, config.noise, config.seed, step * count + place)
            for place in range(count)
        ]
        forwards = [partial(loss_of, config, unet, noise_schedule, batch) for batch in drawn]
        steps.append(one_step(forwards, optimizer, backward, device))
    alive.remove()
    kept = {
        "weights": quantization.num_bytes(unet),
        "optimizer_state": optimizers.state_bytes(optimizer),
        "gradients_alive": alive.most,
    }
    peak = memory.peak_bytes(device)
    if device.type == "cpu":
        kept = {"imports": before} | kept
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "parameters": quantization.num_weights(unet),
        "trained_parameters": sum(p.numel() for p in parameters),
        "optim": config.optim.name,
        "method": config.method.name,
        "clip": config.method.clip,
        "fused_backward": config.runtime.fused_backward,
        "accumulation": config.runtime.accumulation,
        "gradient_checkpointing": config.runtime.gradient_checkpointing,
        "channels_last": config.runtime.channels_last,
        "compile": config.runtime.compile,
        "compute": config.model.compute,
        "quantization": config.model.quantization,
        "batch": arguments.batch,
        "latent": list(arguments.latent),
        "bytes": kept | {"activations_and_rest": peak - sum(kept.values()), "peak": peak},
        "planned_peak_bytes": planned_peak(config, arguments, kept.get("imports", 0)),
        "peak_reserved_bytes": (
            torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
        ),
        "seconds_to_build": seconds_to_build,
        "steps": steps,
    }


def planned_peak(config: Config, arguments: argparse.Namespace, imports: int) -> int | None:
    """The peak that the planner predicts for this step; None if there is no plan: for another UNet,
    or pictures that are not square."""
    height, width = arguments.latent
    if arguments.unet != UNET or height != width:
        return None
    data = replace(config.data, resolution=8 * height, batch_size=arguments.batch)
    model = Model(config.model, torch.device("cpu"), with_weights=False)
    plan = planner.make(replace(config, data=data), model, torch.device(arguments.device).type)
    return plan.training_bytes - plan.process_bytes + imports


def loss_of(
    config: Config,
    unet: UNet2DConditionModel,
    noise_schedule: NoiseSchedule,
    batch: batches.Batch,
) -> Tensor:
    """The loss of a micro-batch."""
    prediction = batches.predict(unet, batch)
    return losses.loss(config.loss, noise_schedule, prediction, batch)


def one_step(
    forwards: Sequence[Callable[[], Tensor]],
    optimizer: torch.optim.Optimizer,
    backward: gradients.Backward,
    device: torch.device,
) -> dict[str, float]:
    """One optimizer step of these micro-batches, as a run makes it: its loss, gradient norm and
    seconds."""
    forward = 0.0

    def timed(run: Callable[[], Tensor]) -> Tensor:
        nonlocal forward
        begun = now(device)
        loss = run()
        forward += now(device) - begun
        return loss

    begun = now(device)
    share = 1 / len(forwards)
    outcome = backward.run([gradients.Pass(partial(timed, run), share) for run in forwards])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    total = now(device) - begun
    return {
        "loss": outcome.loss,
        "grad_norm": outcome.grad_norm,
        "seconds": total,
        "seconds_forward": forward,
        "seconds_backward_and_step": total - forward,
    }


def now(device: torch.device) -> float:
    """The time, after the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def table(found: dict[str, Any]) -> str:
    """What was measured, as readable text."""
    trained = f"{found['trained_parameters']:,} of {found['parameters']:,} parameters"
    height, width = found["latent"]
    held = {key.replace("_", " "): format_bytes(count) for key, count in found["bytes"].items()}
    lines = [
        f"{found['method']}, {trained}, {found['optim']}, batch {found['batch']}, latents "
        f"{height}x{width} ({8 * height}x{8 * width} px), on {found['device']}",
        *(f"  {what:<22}{size:>10}" for what, size in held.items()),
    ]
    if found["planned_peak_bytes"]:
        lines.append(f"  {'peak as planned':<22}{format_bytes(found['planned_peak_bytes']):>10}")
    if found["peak_reserved_bytes"]:
        lines.append(f"  {'peak reserved':<22}{format_bytes(found['peak_reserved_bytes']):>10}")
    for number, step in enumerate(found["steps"], start=1):
        lines.append(
            f"  step {number}: {step['seconds']:.2f} s ({step['seconds_forward']:.2f} forward, "
            f"{step['seconds_backward_and_step']:.2f} backward and step), loss {step['loss']:.4f}, "
            f"gradient norm {step['grad_norm']:.3g}"
        )
    return "\n".join(lines)


def grid(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """1024 px, full and LoRA, batch 1 and 4: each in a process of its own, one after another."""
    for chosen in ("full", "lora"):
        for batch in (1, 4):
            command = [sys.executable, __file__, "--json", "--latent", "128", "--batch", str(batch)]
            command += ["--steps", str(arguments.steps), "--device", arguments.device]
            command += ["--unet", str(arguments.unet), f"method={chosen}", *arguments.options]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                error = (done.stderr.strip().splitlines() or ["no output"])[-1]
                print(f"method={chosen}, batch {batch}: {error}", file=sys.stderr)
                continue
            yield json.loads(done.stdout)


def latent_size(text: str) -> tuple[int, int]:
    """32 -> (32, 32); 104x152 -> (104, 152)."""
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("options", nargs="*", help="trainer options: group=choice or key=value")
    parser.add_argument(
        "--latent", type=latent_size, default=(32, 32), help="H or HxW, in units of 8 px"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--unet", type=Path, default=UNET, help="another configuration file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--grid", action="store_true", help="1024 px: full and LoRA, batch 1 and 4")
    parser.add_argument(
        "--most-gb", type=float, default=math.inf, help="exit with 1 above this peak"
    )
    arguments = parser.parse_intermixed_args(argv)
    config = configured(arguments.options)
    results = grid(arguments) if arguments.grid else iter([measure(config, arguments)])
    fits = True
    for found in results:
        print(json.dumps(found) if arguments.json else table(found), flush=True)
        fits = fits and found["bytes"]["peak"] <= arguments.most_gb * 1e9
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
