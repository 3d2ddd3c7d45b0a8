"""What the Mosaic GPU kernels share: run-time weights, register tricks, the two matmul skeletons."""
