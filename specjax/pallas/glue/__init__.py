"""What stands between two matmuls of a decoding step, in one launch each where there is a GPU for it.

A step of one sequence is a few hundred launches of a few microseconds; these replace those of which XLA makes several.
"""
