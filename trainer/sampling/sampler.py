"""Pictures from the model in training: each time the same prompts from the same noise."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from trainer.config import LogConfig
from trainer.data import Sample, free_rows
from trainer.models.model import Model
from trainer.objective.encoding import Encoded
from trainer.sampling import pictures, prompts
from trainer.sampling.drawer import Drawer


@dataclass(kw_only=True)
class Sampler(Drawer):
    """Draws what a run shows."""

    samples: list[Sample]  # whose captions are drawn; none if there are prompts

    def originals(self) -> list[Image.Image]:
        """The pictures that the captions belong to, as the model sees them; none for prompts."""
        originals = [pictures.of_pixels(sample.read_pixels()) for sample in self.samples]
        free_rows()
        return originals

    def captions(self) -> list[str]:
        """The prompts or captions as they were given."""
        return [prompt.line for prompt in self.prompts]


def of_run(
    model: Model, data: Encoded, config: LogConfig, batch_size: int, stop: Sequence[int] = ()
) -> Sampler:
    """What draws for a run: `log.prompts`, or else the first `log.sample_count` captions of the
    dataset, each at its picture's size."""
    dataset = data.dataset
    count = 0 if config.prompts else config.sample_count
    samples = [dataset.samples[row] for row in dataset.shown[:count]]
    drawn = prompts.of_config(config, dataset.config.largest_resolution) or [
        prompts.of_caption(sample.caption, place, prompts.usual(config), sample.bucket)
        for place, sample in enumerate(samples)
    ]
    return Sampler(
        model=model,
        read=data.read,
        prompts=drawn,
        batch_size=batch_size,
        stop=stop,
        samples=samples,
    )
