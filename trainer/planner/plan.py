"""The plan of a run's memory: what its phases take, beside the tensors that a rehearsal counts."""

from dataclasses import dataclass

from trainer import memory
from trainer.config import Config
from trainer.model import Model
from trainer.planner.rehearsal import Rehearsal, rehearse

# What libraries take for their own work while training, as measured with SDXL's UNet: on a CPU
# oneDNN's copies; on an H200 cuDNN's and cuBLAS's workspaces, in torch's allocator.  Of a small
# model at most this share of its tensors.
_LIBRARIES = {"cpu": 150_000_000, "cuda": 250_000_000}
_LIBRARIES_SHARE = 0.15
# What torch's allocator has reserved and cannot use, measured there, as a share of the tensors.
_FRAGMENTED = {"cpu": 0.0, "cuda": 0.05}


@dataclass(kw_only=True)
class Plan:
    """Bytes on the device that trains."""

    config: Config
    rehearsal: Rehearsal
    libraries_bytes: int
    process_bytes: int  # what this process has before a model is loaded; on a CPU it is there too
    fragmented: float

    @property
    def training_bytes(self) -> int:
        """The peak that a run will report as that of its steps."""
        return self._with_rest(self.rehearsal.training.peak)

    @property
    def captions_bytes(self) -> int:
        """The peak while captions are encoded; 0 where trained encoders read them in every step."""
        tensors = self.rehearsal.captions_bytes
        return self._with_rest(tensors) if tensors else 0

    @property
    def pictures_bytes(self) -> int:
        return self._with_rest(self.rehearsal.pictures_bytes)

    @property
    def drawing_bytes(self) -> int:
        """The peak while pictures are drawn; 0 where none are."""
        rehearsal, kept = self.rehearsal, self.rehearsal.training.kept
        if not rehearsal.decoding_bytes:
            return 0
        return self._with_rest(kept + max(rehearsal.denoising_bytes, rehearsal.decoding_bytes))

    @property
    def least_drawing_bytes(self) -> int:
        """The same where memory is short, and the UNet is moved to the host for the VAE's part."""
        rehearsal, kept = self.rehearsal, self.rehearsal.training.kept
        if not rehearsal.decoding_bytes or self.process_bytes:
            return self.drawing_bytes
        return self._with_rest(
            kept + max(rehearsal.denoising_bytes, rehearsal.decoding_bytes - rehearsal.unet_bytes)
        )

    @property
    def needed_bytes(self) -> int:
        """What must be free for the run to come to its end.  Drawing is left out where there is too
        little, and the run goes on."""
        most = max(self.training_bytes, self.captions_bytes, self.pictures_bytes)
        return round(most * (1 + self.fragmented))

    def _with_rest(self, tensors: int) -> int:
        return tensors + self.libraries_bytes + self.process_bytes


def make(config: Config, model: Model, device_type: str) -> Plan:
    """Plan a run of this configuration on a device of this type; `model` needs no weights.

    Raises UserError where the run would refuse the method, its rules or the optimizer.
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
