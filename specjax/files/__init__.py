"""Named tensors in files: reading one at a time, writing whole or not at all."""
