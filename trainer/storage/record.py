"""What is needed to repeat a run: configuration, package versions, git revision."""

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import yaml

from trainer.system import disk, processes

_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "hydra-core",
    "omegaconf",
    "safetensors",
    "wandb",
    "pillow",
)


def write(folder: Path, config: dict[str, Any], device: torch.device) -> None:
    """Write config.yaml (resolved) and environment.json to the run's folder."""
    packages = dict.fromkeys([*_PACKAGES, *_packages_of(config["optim"])])
    disk.replace_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "processes": processes.world_size(),
        "packages": {name: _version(name) for name in packages},
        "git_revision": _git_revision(),
    }
    disk.replace_text(folder / "environment.json", json.dumps(environment, indent=2) + "\n")


def device_name(device: torch.device) -> str:
    """A GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or "cpu"


def _packages_of(optimizer: dict[str, Any]) -> list[str]:
    """The installed packages that an external optimizer comes from; [] for the family's, and for a
    module of no package."""
    if package := optimizer.get("package"):
        return [package]
    if not (path := optimizer.get("class_path")):
        return []
    module = path.partition(".")[0]
    return list(dict.fromkeys(importlib.metadata.packages_distributions().get(module, [])))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The revision of the source tree this package runs from, `-dirty` with uncommitted changes;
    None outside of git."""
    source = Path(__file__).parents[2]
    if not (source / ".git").exists():
        return None
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
