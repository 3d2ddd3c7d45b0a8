"""Matmul of float inputs and 4-bit weights."""
