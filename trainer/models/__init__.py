"""The model that is trained, and how it runs."""
