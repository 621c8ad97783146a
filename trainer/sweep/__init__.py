"""What a sweep came to: which of its runs was better, in memory, speed, stability and quality.

`planned` knows which runs it is to have, `folders` which it has.  `sweep.md` (`page`) has the
tables (`table`, of `runs`) with what is to be kept in mind of them (`remarks`).  All of it is made
of the runs' folders, so it can be made anew at any time: `python -m trainer.sweep`.
"""

from trainer.sweep import planned
from trainer.sweep.callback import SweepTable
from trainer.sweep.folders import place_of
from trainer.sweep.table import sweep_table

__all__ = ["SweepTable", "place_of", "planned", "sweep_table"]
