"""Training draft heads: text, cached target features, losses, the resumable loop, export in upstream layouts."""
