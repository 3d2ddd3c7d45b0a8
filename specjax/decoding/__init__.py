"""One step's vocabulary: trees, the target's pass over them, sampling."""
