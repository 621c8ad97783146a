"""How much memory a run will need, and whether it is available."""

from trainer.planner.before_run import announce
from trainer.planner.plan import Plan, make
from trainer.planner.room import Room, card, room_of

__all__ = ["Plan", "Room", "announce", "card", "make", "room_of"]
