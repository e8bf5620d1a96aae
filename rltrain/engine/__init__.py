"""DeepSpeed, and the shards that a checkpoint is made of."""
