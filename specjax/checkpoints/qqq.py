"""QQQ checkpoints (HandH1998/QQQ, GPTQModel): W4A8, per channel or in groups of 128 with an int8 second level.

Per linear: `B` int32 [K / 16, 2 N] in the tiles of `specjax.checkpoints.marlin`; `s_channel` float32 [1, N]
permuted in blocks of 32; `s_group` float16 [K / 128, N] permuted in blocks of 64, or empty when per channel. Per
channel the nibble is the two's complement of the code q in -7 .. 7 and W = 16 q s_channel (the kernel leaves
nibbles shifted by four bits). In groups it is u = q + 8 and W = clip(round(q s_group)) s_channel.
"""

import dataclasses
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from specjax.checkpoints import codes, marlin, tensors
from specjax.errors import CheckpointError
from specjax.files.base import TensorSource
from specjax.quant import scheme as schemes
from specjax.quant.linear import QuantizedLinear

GROUP_SIZE = 128
_KERNEL_SHIFT = np.float32(16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QQQFormat:
    """Reads the linears of a QQQ checkpoint; `grouped` says groups of 128 rather than per channel."""

    name = "qqq"
    grouped: bool

    @classmethod
    def detect(
        cls, quantization_config: dict | None, source: TensorSource, hf_config: dict
    ) -> Self | None:
        """The format's settings, or None if the configuration is not QQQ's.

        Raises:
            CheckpointError: QQQ with a setting that is not supported; names the field.
        """
        config = quantization_config or {}
        if (config.get("quant_method") or config.get("method")) != "qqq":
            return None
        field = "wbits" if "wbits" in config else "bits"
        tensors.one_of(config.get(field), (4,), field)
        size = tensors.one_of(config.get("group_size"), (-1, GROUP_SIZE), "group_size")
        return cls(grouped=size == GROUP_SIZE)

    def linear(
        self, source: TensorSource, prefix: str, out_features: int, in_features: int, bias: bool
    ) -> QuantizedLinear | None:
        """One linear; None if it is stored dense.

        Raises:
            CheckpointError: a tensor is missing or does not fit.
        """
        if tensors.is_dense(source, prefix):
            return None
        check_tiles(prefix, out_features, in_features)
        words = tensors.read(
            source, f"{prefix}.B", [np.int32], (in_features // 16, 2 * out_features)
        )
        s_channel = tensors.read(source, f"{prefix}.s_channel", tensors.FLOATS, (1, out_features))
        s_group = self.read_group_scales(source, prefix, out_features, in_features)
        bias_array = tensors.read_bias(source, prefix, out_features, bias)
        return unpack_linear(words, s_channel, s_group, bias_array)

    def read_group_scales(
        self, source: TensorSource, prefix: str, out_features: int, in_features: int
    ) -> Float[np.ndarray, "G N"] | None:
        """`s_group` where the configuration promises groups; per channel it must be empty or absent."""
        name = f"{prefix}.s_group"
        if self.grouped:
            schemes.check_group_size(in_features, GROUP_SIZE, prefix)
            return tensors.read(
                source, name, tensors.FLOATS, (in_features // GROUP_SIZE, out_features)
            )
        if tensors.has(source, name) and 0 not in source.shape(name):
            raise CheckpointError(
                f"{name}: has shape {list(source.shape(name))}, but quantization_config.group_size=-1 means "
                "per channel, where it is empty; group_size is probably 128"
            )
        return None

    def tensor(self, source: TensorSource, name: str) -> None:
        """No tensor is renamed or transformed."""
        return None


def check_tiles(prefix: str, out_features: int, in_features: int) -> None:
    """Raises CheckpointError unless the weight consists of whole 64 x 16 tiles."""
    tensors.divisible(prefix, marlin.TILE_N, "outputs of a tile", out_features=out_features)
    tensors.divisible(prefix, marlin.TILE_K, "inputs of a tile", in_features=in_features)


def unpack_linear(
    words: Shaped[np.ndarray, "K16 N2"],
    s_channel: Float[np.ndarray, "1 N"],
    s_group: Float[np.ndarray, "G N"] | None,
    bias: Shaped[Array, "N"] | None,
    rows: slice = slice(None),
) -> QuantizedLinear:
    """The linear of one `B` with its scales, all as stored; only its outputs `rows`."""
    grouped = s_group is not None
    nibbles = marlin.unpack_qqq(words, grouped)[rows]
    channel = marlin.restore_columns(s_channel, marlin.SCALE_ORDER_CHANNEL)[0, rows]
    channel = channel.astype(np.float32)
    if grouped:
        nibbles = nibbles ^ np.uint8(8)
        scales = marlin.restore_columns(s_group, marlin.SCALE_ORDER_GROUPED)[:, rows]
        scales = np.ascontiguousarray(scales.T)
    else:
        scales = (channel * _KERNEL_SHIFT)[:, None]
    scheme = schemes.lookup("w4a8-qqq")
    return QuantizedLinear(
        codes=codes.typed(nibbles, scheme),
        scales=jnp.asarray(scales),
        channel_scales=jnp.asarray(channel) if grouped else None,
        bias=bias,
        scheme=scheme,
        group_size=GROUP_SIZE if grouped else nibbles.shape[1],
    )


def check_linear(linear: QuantizedLinear, prefix: str) -> None:
    """Raises CheckpointError unless the linear is W4A8, per channel or two-level g128, in whole tiles."""
    spec, activations = linear.scheme.weights, linear.scheme.activations
    if linear.channel_scales is not None:
        levels = spec.levels == "qqq" and linear.group_size == GROUP_SIZE
    else:
        levels = linear.group_size == linear.in_features
    coded = spec.kind == "int" and spec.bits == 4 and spec.symmetric and linear.perm is None
    if not (levels and coded and activations is not None and activations.bits == 8):
        raise CheckpointError(
            f"{prefix}: scheme {linear.scheme.name} with group_size={linear.group_size} does not fit format qqq; "
            "it holds w4a8-qqq per channel or in groups of 128"
        )
    check_tiles(prefix, *linear.codes.shape)


def pack_linear(linear: QuantizedLinear, prefix: str) -> dict[str, np.ndarray]:
    """The three tensors of one linear (plus its bias).

    Raises:
        CheckpointError: the format cannot hold the linear, or float16 its group scales.
    """
    check_linear(linear, prefix)
    grouped = linear.channel_scales is not None
    host = codes.to_host(linear.codes)
    empty = np.zeros((0,), np.float16)
    channel = linear.channel_scales if grouped else linear.scales[:, 0]
    channel = np.asarray(channel).astype(np.float32) / (1 if grouped else _KERNEL_SHIFT)
    packed = {
        f"{prefix}.B": marlin.pack_qqq(host ^ np.uint8(8) if grouped else host, grouped),
        f"{prefix}.s_channel": marlin.permute_columns(channel[None], marlin.SCALE_ORDER_CHANNEL),
        f"{prefix}.s_group": marlin.permute_columns(
            codes.to_half(linear.scales, f"{prefix}.scales").T, marlin.SCALE_ORDER_GROUPED
        )
        if grouped
        else empty,
    }
    if linear.bias is not None:
        packed[f"{prefix}.bias"] = np.asarray(linear.bias)
    return packed


def quantization_config(
    linears: dict[str, QuantizedLinear], dense: tuple[str, ...] = ()
) -> dict[str, Any]:
    """`quantization_config` for linears by prefix.

    Raises:
        CheckpointError: some are per channel and some in groups.
    """
    sizes = {GROUP_SIZE if linear.channel_scales is not None else -1 for linear in linears.values()}
    if len(sizes) != 1:
        raise CheckpointError(
            "format qqq holds one group_size, the model has linears of both kinds"
        )
    return {
        "bits": 4,
        "checkpoint_format": "qqq",
        "desc_act": False,
        "format": "qqq",
        "group_size": sizes.pop(),
        "lm_head": "lm_head" in linears,
        "meta": {"quantizer": ["specjax"]},
        "method": "qqq",
        "pack_dtype": "int32",
        "quant_method": "qqq",
        "sym": True,
        "wbits": 4,
    }
