"""Products of rows with quantized weights: one op over the formats of `formats/`."""
