"""An emulator of PTX in numpy: kernels as they are handed to the assembler, on a machine without a GPU."""
