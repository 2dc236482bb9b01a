"""Stage two: from the cache to a trained network."""

CHECKPOINT_FILE = "checkpoint.pt"
"""What training leaves in a run's folder."""
