"""Compiling for a GPU that is not there: kernels and whole programs, on a machine with CPUs only."""
