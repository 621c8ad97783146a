"""The model: where its parts come from, and how they run."""
