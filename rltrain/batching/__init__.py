"""Groups and advantages to packed micro-batches."""
