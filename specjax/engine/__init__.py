"""The loop that decodes, and the batches it runs."""
