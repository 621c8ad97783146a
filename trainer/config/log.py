"""`log=`: what is reported, where and how often."""

from dataclasses import dataclass

from trainer.config.fields import Interval, interval, one_of, within


@dataclass(kw_only=True)
class WandbConfig:
    """Weights & Biases."""

    project: str  #: that the run is logged to
    #: offline writes to the run's folder, for `wandb sync`; online uploads at once.
    mode: str = one_of("offline", "online", "disabled")
    entity: str | None  #: a user or a team; null: the account's default


@dataclass(kw_only=True)
class LogConfig:
    every: int = within(1)  #: steps between reports
    #: Steps, or epochs (1epoch), between evaluations; 0: only before the first step and after the
    #: last.
    eval_every: Interval = interval()
    #: Number of fixed (picture, timestep, noise) triples that eval/loss averages over.
    eval_points: int = within(1)
    #: Steps, or epochs, between drawings; 0: only before the first step and after the last.
    sample_every: Interval = interval()
    sample_count: int = within(0)  #: pictures in a sample grid, from the first captions of the data
    #: Prompts to draw instead: squares of data.resolution (the largest of data.resolutions), unless
    #: a prompt has kohya's options: "a cat --w 832 --h 1216 --n blurred --d 7 --l 5 --s 30"
    #: (width, height, negative prompt, seed, guidance_scale, sample_steps).
    prompts: list[str]
    prompts_file: str | None  #: a text file with one prompt per line
    negative_prompt: str  #: of drawn pictures; only used if guidance_scale is above 1
    sample_steps: int = within(1, 1000)  #: denoising steps of a drawn picture
    guidance_scale: float = within(0, 100)  #: of drawn pictures; up to 1 there is no guidance
    wandb: WandbConfig | None  #: chosen with log=wandb
    #: Also write event files to the run's folder: tensorboard --logdir runs shows all runs.
    tensorboard: bool
