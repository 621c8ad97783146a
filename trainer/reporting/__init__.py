"""What a run tells: metrics, curves, trackers, the summary."""
