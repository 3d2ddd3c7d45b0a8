"""Matmul of int8 inputs and 4-bit integer weights."""
