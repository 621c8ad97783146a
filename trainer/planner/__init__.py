"""Before a run: how much memory it will take, and whether that is there."""

from trainer.planner.before_run import announce
from trainer.planner.plan import Plan, make
from trainer.planner.room import Room, card, room_of

__all__ = ["Plan", "Room", "announce", "card", "make", "room_of"]
