"""The phases of a run, and the state they share; `trainer/run.py` is the loop."""
