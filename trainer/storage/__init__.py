"""A run's folder on disk: checkpoints, results, and who may write there."""
