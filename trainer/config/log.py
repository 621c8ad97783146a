"""`log=`: what is reported, where and how often."""

from dataclasses import dataclass

from trainer.config.fields import Interval, interval, one_of, within


@dataclass(kw_only=True)
class WandbConfig:
    project: str
    mode: str = one_of("offline", "online", "disabled")
    entity: str | None


@dataclass(kw_only=True)
class LogConfig:
    """What is reported, and how often."""

    every: int = within(1)  # steps
    # Steps, or epochs (1epoch); 0 is only before the first step and after the last.
    eval_every: Interval = interval()
    # Fixed (picture, timestep, noise) triples that eval/loss is the mean of.
    eval_points: int = within(1)
    sample_every: Interval = interval()  # as eval_every
    sample_count: int = within(0)  # pictures in a sample grid: the first captions of the data
    # What is drawn instead: squares of data.resolution (of the largest of data.resolutions), or as
    # a prompt itself says, in kohya's way: "a cat --w 832 --h 1216 --n blurred --d 7 --l 5 --s 30"
    # (width, height, negative prompt, seed, guidance_scale, sample_steps).
    prompts: list[str]
    prompts_file: str | None  # a text file of them, one a line
    negative_prompt: str  # what guidance leads away from; used where guidance_scale is above 1
    sample_steps: int = within(1, 1000)
    guidance_scale: float = within(0, 100)
    wandb: WandbConfig | None
    # Event files in the run's folder too: tensorboard --logdir runs shows all runs.
    tensorboard: bool
