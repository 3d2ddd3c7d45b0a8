"""Matmul of e4m3 or e2m1 inputs and e2m1 weights."""
