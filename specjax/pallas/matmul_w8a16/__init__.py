"""Matmul of float inputs and 8-bit weights."""
