"""Pictures and captions: where they come from, what is read of them, which make up a batch."""

from trainer.data.dataset import Dataset, load
from trainer.data.plan import Pick
from trainer.data.sample import Sample
from trainer.data.store import Entries, Entry, Store
from trainer.data.tables import free_rows

__all__ = ["Dataset", "Entries", "Entry", "Pick", "Sample", "Store", "free_rows", "load"]
