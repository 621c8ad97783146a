"""The results of a sweep: its runs compared by memory, speed, stability and quality.

`planned` records which runs it should have, `folders` finds those it has.  `sweep.md` (`page`) has
the tables (`table`, from `runs`) and caveats (`remarks`).  All of it is derived from the runs'
folders, so `python -m trainer.sweep` can rebuild it at any time.
"""

from trainer.sweep import planned
from trainer.sweep.callback import SweepTable
from trainer.sweep.folders import place_of
from trainer.sweep.table import sweep_table

__all__ = ["SweepTable", "place_of", "planned", "sweep_table"]
