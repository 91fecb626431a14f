"""Model files in and out: hub checkpoints, GGUF, downloads; every write is atomic. Knows tensors, not how they run."""
