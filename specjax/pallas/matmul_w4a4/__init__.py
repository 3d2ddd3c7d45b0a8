"""Matmul of int4 inputs and 4-bit integer weights."""
