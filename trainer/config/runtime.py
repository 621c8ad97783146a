"""`runtime=`: where the loop runs, what it keeps, and when it stops."""

from dataclasses import dataclass

from trainer.config.fields import Interval, interval, one_of, within


@dataclass(kw_only=True)
class RuntimeConfig:
    """Where the loop runs, what it keeps, and when it stops."""

    device: str  # auto, cpu, cuda or cuda:N
    threads: int | None = within(1, 1024)  # CPU threads; null leaves torch's choice
    # Steps from one checkpoint to the next, or epochs (1epoch); 0 saves only at the end.
    save_every: Interval = interval()
    # Older ones are deleted, except the newest that a whole step has followed.
    keep_checkpoints: int = within(1)
    # Step inside the backward pass, with a bucket of gradients alive instead of all of them: the
    # same weights, bit for bit.  For this family's optimizers.  Under a finite loss, elements with
    # a gradient that is not are left alone, and the others are stepped, where the step would be
    # skipped otherwise.
    fused_backward: bool
    # Micro-batches of data.batch_size samples for one optimizer step, whose gradient is that of the
    # mean over all their samples.  Schedules count optimizer steps.  Gradients are added up in the
    # weights' dtype; with the fused backward they are all kept until the last micro-batch.
    accumulation: int = within(1)
    # Compute activations inside a block again in the backward pass instead of keeping them: the
    # same bits, less memory, about a third more time.
    gradient_checkpointing: bool
    channels_last: bool  # channels-last activations; faster convolutions on a GPU
    # torch.compile of the repeated transformer blocks: a while for the first steps, then faster.
    compile: str = one_of("none", "regional")
    # Steps in a row without a finite loss and gradient before the run stops.
    max_skipped_steps: int = within(0)
    # Let `resume` go on with a configuration that differs from the checkpoint's.
    allow_config_change: bool
