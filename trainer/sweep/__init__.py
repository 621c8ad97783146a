"""The results of a sweep: its runs compared by memory, speed, stability and quality.

`job` makes one of its runs, `planned` records which it should have, `folders` finds those it has.
`sweep.md` (`page`) has the tables (`table`, from `runs`) and caveats (`remarks`).  All of it is
derived from the runs' folders, so `python -m trainer.sweep` can rebuild it at any time.
"""

from trainer.sweep.callback import SweepTable
from trainer.sweep.table import sweep_table
