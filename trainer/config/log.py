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
    every: int = within(1)  # steps
    # Steps, or epochs (1epoch); 0: only before the first step and after the last.
    eval_every: Interval = interval()
    # Number of fixed (picture, timestep, noise) triples that eval/loss averages over.
    eval_points: int = within(1)
    sample_every: Interval = interval()  # as eval_every
    sample_count: int = within(0)  # pictures in a sample grid, from the first captions of the data
    # Prompts to draw instead: squares of data.resolution (the largest of data.resolutions), unless
    # a prompt has kohya's options: "a cat --w 832 --h 1216 --n blurred --d 7 --l 5 --s 30"
    # (width, height, negative prompt, seed, guidance_scale, sample_steps).
    prompts: list[str]
    prompts_file: str | None  # a text file with one prompt per line
    negative_prompt: str  # only used if guidance_scale is above 1
    sample_steps: int = within(1, 1000)
    guidance_scale: float = within(0, 100)
    wandb: WandbConfig | None
    # Also write event files to the run's folder: tensorboard --logdir runs shows all runs.
    tensorboard: bool
