"""e4m3 codes under one level of scales. No kernel reads them: XLA runs their products.

Products with e4m3 inputs are exact in float32 and accumulate in float32.
"""

import dataclasses

from specjax.pallas.matmul.formats.base import Format


@dataclasses.dataclass(frozen=True, kw_only=True)
class FP8(Format):
    """Floating-point codes of 8 bits."""

    code_dtype: str = "float8_e4m3fn"

    def _quantized_op(self, input_bits: int) -> str:
        del input_bits
        return "matmul_fp8"

    def backends(self, input_bits: int) -> tuple[str, ...]:
        return ("mosaic", "xla") if input_bits == 16 else ("xla",)


FORMATS = (FP8(),)
