"""Stage two: from the region cache to a trained network."""

CHECKPOINT_FILE = "checkpoint.pt"
"""Name of the file that holds the trained network, in a run's folder."""
