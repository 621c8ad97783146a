"""kohya's options as this trainer's.

Their defaults are written out where ours differ, so that the command trains as theirs would.
"""

from trainer.cli import elsewhere
from trainer.kohya import inputs, learning, method, needless, results
from trainer.kohya.reading import ScriptOptions
from trainer.kohya.translation import Translation

_PARTS = (
    *(inputs.model, inputs.pictures, inputs.captions, method.method),
    *(learning.optimizer, learning.length, learning.objective, results.results),
)


def translate(given: ScriptOptions, family: str) -> Translation:
    """The options of this trainer.  Raises UserError if theirs train what it cannot."""
    is_lora = "network_module" in given.options or given.script.endswith("train_network.py")
    made = Translation(family=family, is_lora=is_lora, notes=[*given.notes])
    made.choose(f"experiment={family}{'_lora' if is_lora else ''}")
    for part in _PARTS:
        part(given, made)
    for theirs, ours in elsewhere.SAME.items():
        if (value := given.take(theirs)) is not None:
            made.set(ours, value)
    for theirs, (ours, value) in elsewhere.FLAGS.items():
        if given.take(theirs):
            made.set(ours, value)
    made.notes += [f"{name}: {needless.why(name)}" for name in given.others if needless.why(name)]
    return made
