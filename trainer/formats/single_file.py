"""One checkpoint file with all parts, as A1111, ComfyUI and kohya's scripts read it.

The file has the published architecture of its kind, unless its metadata says otherwise: a model of
another architecture is written with its parts' configurations under `CONFIGS`.
"""

from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.formats import architectures, kinds, metadata, names, schedulers
from trainer.formats.weights import Weights, of_file

_OF_VAE = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


class SingleFile:
    """An open checkpoint file; its tensors are read one at a time."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if it is damaged, or not an SDXL or SD 1.x checkpoint."""
        self.path = path
        self.all, self.metadata = of_file(path)
        self.kind = kinds.of_checkpoint(self.all, path)
        self._configs = metadata.stored_configs(self.metadata, path)

    def config(self, part: str) -> dict[str, Any]:
        """A part's configuration; the scheduler's includes the changes of the file's marks."""
        config = self._configs.get(part) or architectures.config(self.kind, part)
        if part == "scheduler":
            return schedulers.marked(config, self.all, self.metadata)
        return config

    def weights(self, part: str) -> Weights:
        """A part's tensors by their names in a diffusers folder; UserError if incomplete."""
        prefix = names.PREFIXES[self.kind][part]
        tensors = self._modern(part, prefix)
        wanted = architectures.shapes(part, self.config(part))
        entries = names.table(part, wanted, self.config(part))
        for entry in entries:
            if prefix + entry.single not in tensors:
                raise UserError(
                    f"{self.path} lacks {prefix}{entry.single}; it is damaged, or of another "
                    "architecture"
                )
        expected = {prefix + entry.single for entry in entries}
        if part == "unet" and (spare := [name for name in tensors if name not in expected]):
            raise UserError(
                f"{self.path} has {spare[0]}, which its architecture does not; its UNet belongs to "
                "another model"
            )
        weights = names.to_own(tensors, entries, prefix)
        architectures.compare(part, weights, wanted, str(self.path))
        return weights

    def unused(self) -> Weights:
        """The file's tensors that are not weights (NOT_WEIGHTS), by their names in it."""
        prefixes = tuple(names.PREFIXES[self.kind].values())
        return {
            name: lazy
            for name, lazy in self.all.items()
            if name.startswith(prefixes) and name.endswith(names.NOT_WEIGHTS)
        }

    def _modern(self, part: str, prefix: str) -> Weights:
        """The part's tensors; adds the level `text_model` to a text encoder of 2022."""
        tensors = {name: lazy for name, lazy in self.all.items() if name.startswith(prefix)}
        if part != "text_encoder":
            return tensors
        return {prefix + names.canonical(part, n[len(prefix) :]): x for n, x in tensors.items()}


def vae_alone(weights: Weights, settings: dict[str, Any], where: str) -> Weights:
    """A VAE's tensors by their names in a diffusers folder, from a file of only a VAE that uses
    those names or a single file's, with or without prefix.

    Raises UserError if there is no VAE, or not that of `settings`.
    """
    prefix = names.PREFIXES["sdxl"]["vae"]
    tensors = {
        name.removeprefix(prefix): lazy
        for name, lazy in weights.items()
        if name.removeprefix(prefix).startswith(_OF_VAE)
    }
    if not tensors:
        some = next(iter(weights), "no tensor")
        raise UserError(f"{where} holds no VAE: it has {some}, but no encoder.* and decoder.*")
    wanted = architectures.shapes("vae", settings)
    if any(name.startswith("decoder.mid_block.") for name in tensors):
        renamed = {names.canonical("vae", name): lazy for name, lazy in tensors.items()}
    else:
        renamed = names.to_own(tensors, names.table("vae", wanted, settings), "")
    architectures.compare("vae", renamed, wanted, where)
    return renamed
