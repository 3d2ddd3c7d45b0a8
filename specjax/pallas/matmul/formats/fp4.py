"""e2m1 codes under one level of scales. No kernel reads them: XLA runs their products.

Products with e4m3 or e2m1 inputs are exact in float32 and accumulate in float32, group by group.
"""

import dataclasses

from specjax.pallas.matmul.formats.base import Format


@dataclasses.dataclass(frozen=True, kw_only=True)
class FP4(Format):
    """Floating-point codes of 4 bits."""

    code_dtype: str = "float4_e2m1fn"

    def _quantized_op(self, input_bits: int) -> str:
        del input_bits
        return "matmul_fp4"

    def backends(self, input_bits: int) -> tuple[str, ...]:
        return ("mosaic", "triton", "xla") if input_bits == 16 else ("xla",)


FORMATS = (FP4(),)
