"""The memory plan of a run: a rehearsal's tensors, plus what libraries and the process take."""

from dataclasses import dataclass

from trainer.config import Config
from trainer.models.model import Model
from trainer.planner.rehearsal import Rehearsal, rehearse
from trainer.planner.room import Room
from trainer.system import memory

# Memory that libraries use for themselves in training, measured with SDXL's UNet: on a CPU oneDNN's
# copies; on an H200 cuDNN's and cuBLAS's workspaces, in torch's allocator.  For a small model, at
# most _LIBRARIES_SHARE of its tensors.
_LIBRARIES = {"cpu": 150_000_000, "cuda": 250_000_000}
_LIBRARIES_SHARE = 0.15
# Memory that torch's allocator reserves but cannot use, measured there, as a share of the peak.
_FRAGMENTED = {"cpu": 0.0, "cuda": 0.05}


@dataclass(kw_only=True)
class Plan:
    """Bytes on the device that trains."""

    config: Config
    rehearsal: Rehearsal
    libraries_bytes: int
    process_bytes: int  # what this process uses without a model; 0 on a GPU
    fragmented: float

    @property
    def training_bytes(self) -> int:
        """The peak that a run will report for its steps."""
        return self._with_rest(self.rehearsal.training.peak)

    @property
    def captions_bytes(self) -> int:
        """The peak while captions are encoded; 0 if trained text encoders do that in every step."""
        tensors = self.rehearsal.captions_bytes
        return self._with_rest(tensors) if tensors else 0

    @property
    def pictures_bytes(self) -> int:
        return self._with_rest(self.rehearsal.pictures_bytes)

    @property
    def drawing_bytes(self) -> int:
        """The peak while pictures are drawn; 0 if none are."""
        rehearsal, kept = self.rehearsal, self.rehearsal.training.kept
        if not rehearsal.decoding_bytes:
            return 0
        return self._with_rest(kept + max(rehearsal.denoising_bytes, rehearsal.decoding_bytes))

    @property
    def drawing_aside_bytes(self) -> int:
        """The same if memory is short and the UNet is moved to the host while the VAE decodes."""
        return self._drawing_aside(self.rehearsal.decoding_bytes)

    @property
    def least_drawing_bytes(self) -> int:
        """The same if the VAE decodes in tiles, too."""
        return self._drawing_aside(self.rehearsal.tiled_bytes)

    def _drawing_aside(self, decoding: int) -> int:
        rehearsal, kept = self.rehearsal, self.rehearsal.training.kept
        if not rehearsal.decoding_bytes or self.process_bytes:
            return self.drawing_bytes
        return self._with_rest(
            kept + max(rehearsal.denoising_bytes, decoding - rehearsal.unet_bytes)
        )

    @property
    def needed_bytes(self) -> int:
        """The free memory that a run needs to finish.  Drawing does not count: a run skips it if
        there is too little."""
        return self.reserved(max(self.training_bytes, self.captions_bytes, self.pictures_bytes))

    def fits(self, room: Room) -> bool:
        """Whether a run can finish in this room."""
        return self.needed_bytes <= room.free_bytes

    def reserved(self, peak: int) -> int:
        """The free memory for a peak of this many bytes."""
        return round(peak * (1 + self.fragmented))

    def _with_rest(self, tensors: int) -> int:
        return tensors + self.libraries_bytes + self.process_bytes


def make(config: Config, model: Model, device_type: str) -> Plan:
    """Plan a run of this configuration on a device of this type; `model` needs no weights.

    Raises UserError if the run would refuse the method, its rules or the optimizer.
    """
    process = memory.resident_bytes() if device_type == "cpu" else 0
    rehearsal = rehearse(config, model, device_type)
    share = round(_LIBRARIES_SHARE * rehearsal.training.peak)
    return Plan(
        config=config,
        rehearsal=rehearsal,
        libraries_bytes=min(_LIBRARIES[device_type], share),
        process_bytes=process,
        fragmented=_FRAGMENTED[device_type],
    )
