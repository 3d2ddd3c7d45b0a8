"""Making codes: rounding methods, calibration layer by layer, rotations, the self-check."""
