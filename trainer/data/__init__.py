"""Pictures and captions: finding and reading them, caching their encodings, forming batches."""

from trainer.data.dataset import Dataset, load
from trainer.data.entries import Entries, Entry
from trainer.data.plan import Pick
from trainer.data.sample import Sample
from trainer.data.store import Store
from trainer.data.tables import free_rows
