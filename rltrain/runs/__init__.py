"""What a run writes and reads: its folder, metrics, samples, checkpoints."""
