"""Quantized linears: schemes, canonical form, packings, and how they are produced."""
