"""QServe checkpoints (DeepCompressor `backend.qserve.convert`): W8A8, and W4A8 "QoQ" per channel or in groups of 128.

| | tensors of a linear | W |
|---|---|---|
| W8A8 | `weight` int8 [N, K], `dequant_scale` [N] | weight * dequant_scale |
| QoQ per channel | `qweight` int8 [N, K / 2], `s1_scales` [N], `s1_szeros` [N] | u s1 - szeros |
| QoQ g128 | `qweight`, `s1_scales`, `s2_scales` int8 [G, N], `s2_zeros` int8 [G, N] | int8(u s2 + s2_zeros) s1 |

Tiles of `qweight` are described in `specjax.checkpoints.marlin`. The columns of `s2_*` are permuted in blocks of 32
outputs: DeepCompressor until February 2025 in the order that the kernels of OmniServe read, since then in another.
Nothing in a file says which; the wrong one makes some u s2 + s2_zeros leave int8, which proves the other.
SpecMQuant's `convert_w4a8_qoq_group` fuses q, k, v and gate, up; both forms are read.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, UInt8

from specjax.checkpoints import codes, fused, marlin, tensors
from specjax.errors import CheckpointError
from specjax.files.base import TensorSource
from specjax.quant import scheme as schemes
from specjax.quant.linear import QuantizedLinear

Order = Literal["omniserve", "deepcompressor"]
_BLOCK = np.arange(32)
S2_ORDERS = {
    "omniserve": _BLOCK.reshape(4, 8).T.reshape(-1),
    "deepcompressor": _BLOCK.reshape(2, 2, 8).transpose(0, 2, 1).reshape(-1),
}
"""Column j of a stored block of 32 is output S2_ORDERS[...][j]: 0, 8, 16, 24, 1, ... or 0, 8, 1, 9, ..., 16, 24, ..."""
GROUP_SIZE = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class QServeFormat:
    """Reads the linears of a QServe checkpoint; `s2_order` is None where no linear is in groups."""

    name = "qserve"
    s2_order: Order | None

    @classmethod
    def detect(
        cls, quantization_config: dict | None, source: TensorSource, hf_config: dict
    ) -> Self | None:
        """The format, or None if no linear has QServe's scales. DeepCompressor writes no quantization_config.

        Raises:
            CheckpointError: the order of the second-level scales is not stated and cannot be proven.
        """
        config = quantization_config or {}
        method = config.get("quant_method")
        parts = {name.rpartition(".")[2] for name in source.names()}
        if method not in (None, "qserve") or not parts & {"s1_scales", "dequant_scale"}:
            return None
        if "s2_scales" not in parts:
            return cls(s2_order=None)
        if "s2_order" in config:
            return cls(s2_order=tensors.one_of(config["s2_order"], tuple(S2_ORDERS), "s2_order"))
        return cls(s2_order=prove_order(source))

    def linear(
        self, source: TensorSource, prefix: str, out_features: int, in_features: int, bias: bool
    ) -> QuantizedLinear | None:
        """One linear, cut out of a fused one where needed; None if it is stored dense.

        Raises:
            CheckpointError: a tensor is missing or does not fit.
        """
        if tensors.is_dense(source, prefix):
            return None
        bias_array = tensors.read_bias(source, prefix, out_features, bias)
        if tensors.has(source, f"{prefix}.dequant_scale"):
            linear = _read_w8a8(source, prefix, out_features, in_features)
        else:
            rows = fused.locate(source, prefix, "s1_scales", out_features)
            tensors.divisible(
                rows.prefix, 32, "side of a tile", out_features=rows.total, in_features=in_features
            )
            grouped = tensors.has(source, f"{rows.prefix}.s2_scales")
            linear = (self._grouped if grouped else _read_per_channel)(source, rows, in_features)
        return dataclasses.replace(linear, bias=bias_array)

    def tensor(self, source: TensorSource, name: str) -> None:
        """No dense tensor is renamed or transformed."""
        return None

    def _grouped(self, source: TensorSource, rows: fused.Rows, in_features: int) -> QuantizedLinear:
        schemes.check_group_size(in_features, GROUP_SIZE, rows.prefix)
        shape = (in_features // GROUP_SIZE, rows.total)
        tiles, ours = rows.tiles(marlin.QSERVE_TILE)
        order = S2_ORDERS[self.s2_order]
        scales, zeros = (
            marlin.restore_columns(
                tensors.read(source, f"{rows.prefix}.{part}", [np.int8], shape)[:, tiles], order
            )[:, ours]
            for part in ("s2_scales", "s2_zeros")
        )
        scheme = schemes.lookup("w4a8-qoq-s16")
        return QuantizedLinear(
            codes=codes.typed(_read_codes(source, rows, in_features), scheme),
            scales=jnp.asarray(np.ascontiguousarray(scales.T)),
            zeros=jnp.asarray(np.ascontiguousarray(zeros.T)),
            channel_scales=jnp.asarray(_read_channel(source, rows, "s1_scales")),
            scheme=scheme,
            group_size=GROUP_SIZE,
        )


def _read_w8a8(
    source: TensorSource, prefix: str, out_features: int, in_features: int
) -> QuantizedLinear:
    weight = tensors.read(source, f"{prefix}.weight", [np.int8], (out_features, in_features))
    scales = tensors.read(source, f"{prefix}.dequant_scale", tensors.FLOATS, (out_features,))
    scheme = schemes.lookup("w8a8-s16")
    return QuantizedLinear(
        codes=codes.typed(weight, scheme),
        scales=jnp.asarray(scales)[:, None],
        scheme=scheme,
        group_size=in_features,
    )


def _read_per_channel(source: TensorSource, rows: fused.Rows, in_features: int) -> QuantizedLinear:
    scheme = schemes.lookup("w4a8-qoq-s16")
    return QuantizedLinear(
        codes=codes.typed(_read_codes(source, rows, in_features), scheme),
        scales=jnp.asarray(_read_channel(source, rows, "s1_scales"))[:, None],
        minima=-jnp.asarray(_read_channel(source, rows, "s1_szeros"))[:, None],
        scheme=scheme,
        group_size=in_features,
    )


def _read_codes(
    source: TensorSource, rows: fused.Rows, in_features: int
) -> UInt8[np.ndarray, "N K"]:
    shape = (rows.total, in_features // 2)
    packed = tensors.read(source, f"{rows.prefix}.qweight", [np.int8], shape)
    tiles, ours = rows.tiles(marlin.QSERVE_TILE)
    return marlin.unpack_qserve(packed[tiles])[ours]


def _read_channel(source: TensorSource, rows: fused.Rows, part: str):
    values = tensors.read(source, f"{rows.prefix}.{part}", tensors.FLOATS, (rows.total,))
    return values[rows.start : rows.start + rows.count]


def prove_order(source: TensorSource) -> Order:
    """The order of the second-level columns, from the first linear for which only one keeps all weights in int8.

    Raises:
        CheckpointError: no linear decides.
    """
    for prefix, total, in_features in _grouped_linears(source):
        rows = fused.Rows(prefix=prefix, start=0, count=total, total=total)
        unpacked = _read_codes(source, rows, in_features)
        scales, zeros = (source.read(f"{prefix}.{part}") for part in ("s2_scales", "s2_zeros"))
        fitting = [
            name
            for name, order in S2_ORDERS.items()
            if _stays_in_int8(
                unpacked, *(marlin.restore_columns(s, order).T for s in (scales, zeros))
            ).all()
        ]
        if len(fitting) == 1:
            return fitting[0]
    raise CheckpointError(
        "s2_scales, s2_zeros: the order of their columns cannot be proven from the weights; state it in config.json as "
        '"quantization_config": {"quant_method": "qserve", "s2_order": ...} with "omniserve" (DeepCompressor until '
        'February 2025, SpecMQuant) or "deepcompressor" (later)'
    )


def _grouped_linears(source: TensorSource) -> Iterator[tuple[str, int, int]]:
    for name in source.names():
        prefix, _, part = name.rpartition(".")
        if part == "s2_scales" and tensors.has(source, f"{prefix}.qweight"):
            total, half = source.shape(f"{prefix}.qweight")
            yield prefix, total, 2 * half


def _stays_in_int8(
    unpacked: UInt8[np.ndarray, "N K"],
    scales: Int[np.ndarray, "N G"],
    zeros: Int[np.ndarray, "N G"],
) -> Bool[np.ndarray, "N G"]:
    """Whether u s2 + offset needs no wrapping, where the file keeps the low eight bits of the offset."""
    grouped = unpacked.reshape(*scales.shape, -1)
    scales, zeros = scales.astype(np.int32), zeros.astype(np.int32)
    low, high = grouped.min(-1) * scales + zeros, grouped.max(-1) * scales + zeros
    # Quantizers subtract 0 .. 255, so a positive stored offset usually stands for itself - 256.
    plain, wrapped = (low >= -128) & (high <= 127), (low >= 128) & (high <= 383)
    return plain | (wrapped & (zeros > 0))


def _kind(linear: QuantizedLinear) -> Literal["w8a8", "channel", "grouped"] | None:
    """Which of the three forms holds a linear, if any."""
    spec, activations = linear.scheme.weights, linear.scheme.activations
    if (
        spec.kind != "int"
        or linear.perm is not None
        or activations is None
        or activations.bits != 8
    ):
        return None
    if linear.group_size == linear.in_features and spec.bits == 8 and spec.symmetric:
        return "w8a8"
    if linear.group_size == linear.in_features and linear.minima is not None:
        return "channel"
    two_level = spec.levels == "qoq" and linear.channel_scales is not None
    return "grouped" if two_level and linear.group_size == GROUP_SIZE else None


def check_linear(linear: QuantizedLinear, prefix: str) -> None:
    """Raises CheckpointError unless the linear is W8A8 or QoQ of a supported group size, in whole tiles."""
    kind = _kind(linear)
    if kind is None:
        raise CheckpointError(
            f"{prefix}: scheme {linear.scheme.name} with group_size={linear.group_size} does not fit format qserve; "
            "it holds w8a8 per channel, and w4a8-qoq per channel or in groups of 128"
        )
    if kind != "w8a8":
        rows, columns = linear.codes.shape
        tensors.divisible(prefix, 32, "side of a tile", out_features=rows, in_features=columns)


def pack_linear(linear: QuantizedLinear, prefix: str) -> dict[str, np.ndarray]:
    """The tensors of one linear (plus its bias); second-level columns in OmniServe's order.

    Raises:
        CheckpointError: the format cannot hold the linear, or float16 its scales.
    """
    check_linear(linear, prefix)
    kind = _kind(linear)

    def half(field: str) -> np.ndarray:
        return codes.to_half(getattr(linear, field), f"{prefix}.{field}")

    host = codes.to_host(linear.codes)
    packed = {"weight": host} if kind == "w8a8" else {"qweight": marlin.pack_qserve(host)}
    if kind == "w8a8":
        packed["dequant_scale"] = half("scales")[:, 0]
    elif kind == "channel":
        packed |= {"s1_scales": half("scales")[:, 0], "s1_szeros": -half("minima")[:, 0]}
    else:
        order = S2_ORDERS["omniserve"]
        packed["s1_scales"] = half("channel_scales")
        for part, array in {"s2_scales": linear.scales, "s2_zeros": linear.zeros}.items():
            packed[part] = marlin.permute_columns(np.asarray(array).T.astype(np.int8), order)
    if linear.bias is not None:
        packed["bias"] = np.asarray(linear.bias)
    return {f"{prefix}.{part}": np.ascontiguousarray(array) for part, array in packed.items()}


def quantization_config(
    linears: dict[str, QuantizedLinear], dense: tuple[str, ...] = ()
) -> dict[str, Any]:
    """`quantization_config` that states what DeepCompressor leaves to the reader."""
    grouped = any(linear.channel_scales is not None for linear in linears.values())
    return {
        "quant_method": "qserve",
        "wbits": sorted({linear.scheme.weights.bits for linear in linears.values()}),
        "group_size": GROUP_SIZE if grouped else -1,
        **({"s2_order": "omniserve"} if grouped else {}),
    }
