"""What summary.json says of a run: what was compared, learned and spent."""

from typing import TypedDict


class Summary(TypedDict, total=False):
    """A run's results.  One that failed in its first step or before has only the first two groups
    and an error, and one that failed before it began has less.  In the file, a number that is not
    finite is null.  Keys with `holdout` are there with held-out pictures, those with `ema` with
    method.ema."""

    # Known before the first step.
    name: str
    overrides: list[str]  # of the command line
    seed: int
    steps: int  # done
    eval_loss_before: float  # before the first step; NaN if unknown, or not comparable any more
    holdout_loss_before: float

    # What distinguishes it from others.
    optimizer: str
    lr: float  # at its peak
    method: str
    model: str  # the last part of its path
    device: str
    on_cpu: bool
    ended: str  # when, in ISO 8601

    # What it learned.
    eval_loss_after: float  # of the last weights
    eval_loss_result: float  # of the exported ones, which may be averages
    holdout_loss_after: float
    holdout_loss_result: float
    ema_loss_after: float  # of the averages
    prediction_before: str  # what the UNet predicted originally: epsilon, ...
    prediction: str
    rate_found: float | None  # the factor of lr that the optimizer found; None if it finds none
    zero_gradient: bool  # whether every gradient of the last steps was 0

    # Whether it went well.
    skipped_steps: int
    rollbacks: int | None  # None if there were none: a sweep's table has this column if any run has
    loss_spikes: int
    grad_norm_over_median: float | None  # the largest; None in the first steps
    diverged: bool
    error: str  # of a run that failed
    result_of_step: int  # for a failed run with a result, whose `steps` may differ

    # What it cost, over all sessions.
    pictures: int  # with repetitions
    wall_seconds: float
    seconds: float  # in training steps
    seconds_per_step: float  # the median
    seconds_per_step_quartiles: list[float] | None  # the first and the third; None: too few steps
    images_per_second: float
    optimizer_seconds_per_step: float | None  # None: with the fused backward, or too few steps
    optimizer_state_bytes: int
    peak_memory_bytes: int
    peak_training_bytes: int | None  # None if no step was made
    planned_training_bytes: int | None  # None for a small model
    runs_before_in_process: int  # whose memory may be in a CPU's peaks
