"""Matmul of e4m3 inputs and e4m3 weights."""
