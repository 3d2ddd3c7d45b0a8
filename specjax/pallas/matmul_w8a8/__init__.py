"""Matmul of int8 (or int4) inputs and int8 weights."""
