"""`runtime=`: where the loop runs, what it keeps, and when it stops."""

from dataclasses import dataclass

from trainer.config.fields import Interval, interval, one_of, within


@dataclass(kw_only=True)
class RuntimeConfig:
    device: str  #: auto, cpu, cuda or cuda:N
    threads: int | None = within(1, 1024)  #: CPU threads; null leaves torch's choice
    #: Steps, or epochs (1epoch), between checkpoints; 0: only save at the end.
    save_every: Interval = interval()
    #: The newest; older ones are deleted, except the newest known-good one (followed by a good
    #: step; by 50 steps where a run that diverges is to stop or go back, and there the one after it
    #: is kept as well).
    keep_checkpoints: int = within(1)
    #: Step inside the backward pass, with a bucket of gradients alive instead of all of them: the
    #: same weights, bit for bit.  For this family's optimizers.  If the loss is finite but some
    #: gradients are not, only the other elements are updated; without it, the step is skipped.
    fused_backward: bool
    #: Micro-batches of data.batch_size samples per optimizer step, which uses the mean over all
    #: their samples.  Schedules count optimizer steps.  Gradients accumulate in the weights' dtype;
    #: with the fused backward they are all kept until the last micro-batch.
    accumulation: int = within(1, 65536)
    #: Processes that train together, each with its own micro-batches: a step has accumulation x
    #: processes of them.  Set by torchrun, which starts them.
    processes: int = within(1)
    #: Recompute the activations inside a block in the backward pass instead of keeping them: the
    #: same bits, less memory, about a third more time.
    gradient_checkpointing: bool
    channels_last: bool  #: channels-last activations; faster convolutions on a GPU
    #: torch.compile of the repeated transformer blocks: slow first steps, then faster.
    compile: str = one_of("none", "regional")
    #: Consecutive steps without a finite loss and gradient before the run stops.
    max_skipped_steps: int = within(0)
    #: If the loss rises far above what it was and stays there (docs/training.md, "Losses"): warn;
    #: stop; or rollback, to a checkpoint from before, and train on from it with the next batches at
    #: half the learning rate, at most max_rollbacks times.  With rollback, also before a run ends
    #: because of steps that are not finite.
    on_divergence: str = one_of("warn", "stop", "rollback")
    max_rollbacks: int = within(1)  #: after which a run that diverges again stops
    #: Allow `resume` with a configuration that differs from the checkpoint's.  A longer schedule
    #: needs no permission.
    allow_config_change: bool

    @property
    def frees_gradients(self) -> bool:
        """Whether the backward pass frees gradients as they are used."""
        return self.fused_backward and self.accumulation == 1

    @property
    def micro_batches(self) -> int:
        """Micro-batches in an optimizer step, of all processes."""
        return self.accumulation * self.processes
