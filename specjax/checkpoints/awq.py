"""AWQ checkpoints of the `gemm` layout (AutoAWQ, GPTQModel), 4 bits with zero points.

Per linear: `qweight` int32 [K, N / 8] and `qzeros` int32 [K / g, N / 8] pack along the outputs, `scales` [K / g,
N]. Nibble p (lowest first) of a word holds output ORDER[p] of its eight. Zeros are stored as they are: W[n, k] =
(code - zero) * scale.
"""

import dataclasses
from typing import Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8

from specjax.checkpoints import codes, tensors
from specjax.files.base import TensorSource
from specjax.quant import scheme as schemes
from specjax.quant.linear import QuantizedLinear

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_LOW_NIBBLES = np.uint32(0x0F0F0F0F)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQFormat:
    """Reads the linears of an AWQ checkpoint; `group_size` inputs share a scale, -1 stands for all."""

    name = "awq"
    group_size: int

    @classmethod
    def detect(
        cls, quantization_config: dict | None, source: TensorSource, hf_config: dict
    ) -> Self | None:
        """The format's settings, or None if the configuration is not AWQ's.

        Raises:
            CheckpointError: AWQ with a setting that is not supported; names the field.
        """
        config = quantization_config
        if config is None or not _is_awq(config):
            return None
        # quant_config.json of AutoAWQ says w_bit, q_group_size and version GEMM.
        layout = config.get("version") or config.get("checkpoint_format") or config.get("format")
        tensors.one_of(str(layout or "gemm").lower(), ("gemm",), "version")
        tensors.one_of(config.get("bits", config.get("w_bit")), (4,), "bits")
        tensors.one_of(config.get("zero_point", True), (True,), "zero_point")
        size = config.get("group_size", config.get("q_group_size"))
        return cls(group_size=tensors.group_size(size, "group_size"))

    def linear(
        self, source: TensorSource, prefix: str, out_features: int, in_features: int, bias: bool
    ) -> QuantizedLinear | None:
        """One linear; None if it is stored dense.

        Raises:
            CheckpointError: a tensor is missing or does not fit.
        """
        if tensors.is_dense(source, prefix):
            return None
        group_size = schemes.check_group_size(in_features, self.group_size, prefix)
        groups = in_features // group_size
        tensors.divisible(prefix, 8, "codes of one int32", out_features=out_features)
        tensors.divisible(prefix, 4, "packing of AWQ", in_features=in_features)
        shapes = {"qweight": in_features, "qzeros": groups}
        words, zero_words = (
            tensors.read(source, f"{prefix}.{part}", [np.int32], (rows, out_features // 8))
            for part, rows in shapes.items()
        )
        scales = tensors.read(source, f"{prefix}.scales", tensors.FLOATS, (groups, out_features))
        scheme = schemes.lookup("w4a16-asym")
        return QuantizedLinear(
            codes=codes.typed(unpack_codes(words), scheme),
            scales=jnp.asarray(np.ascontiguousarray(scales.T)),
            zeros=jnp.asarray(unpack_rows(zero_words).T.astype(np.int8)),
            bias=tensors.read_bias(source, prefix, out_features, bias),
            scheme=scheme,
            group_size=group_size,
        )

    def tensor(self, source: TensorSource, name: str) -> None:
        """No tensor is renamed or transformed."""
        return None


def unpack_rows(words: Int[np.ndarray, "R N8"]) -> UInt8[np.ndarray, "R N"]:
    """Nibbles in output order, rows as stored."""
    nibbles = codes.split_nibbles(words).reshape(words.shape[0], -1, 8)
    return nibbles[:, :, np.argsort(ORDER)].reshape(words.shape[0], -1)


def unpack_codes(words: Int[np.ndarray, "K N8"]) -> UInt8[np.ndarray, "N K"]:
    """As `unpack_rows`, transposed. Four inputs are gathered in a word first: transposing bytes would be 3x slower."""
    rows, columns = words.shape
    quads = np.ascontiguousarray(words).view(np.uint8).reshape(rows // 4, 4, 4 * columns)
    quads = np.ascontiguousarray(quads.transpose(0, 2, 1)).view(np.uint32)[..., 0]
    quads = np.ascontiguousarray(quads.T).reshape(columns, 4, rows // 4)
    split = np.empty((columns, 8, rows // 4), np.uint32)
    split[:, ORDER[0::2]] = quads & _LOW_NIBBLES
    split[:, ORDER[1::2]] = (quads >> np.uint32(4)) & _LOW_NIBBLES
    return split.reshape(8 * columns, rows // 4).view(np.uint8)


def _is_awq(config: dict) -> bool:
    method = config.get("quant_method") or config.get("method")
    return method == "awq" or (method is None and "w_bit" in config)
