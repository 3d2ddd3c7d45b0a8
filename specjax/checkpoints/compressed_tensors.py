"""compressed-tensors checkpoints (llm-compressor, vLLM): integer W4A16, W8A16, W4A8, W8A8 and FP8.

| `format` | tensors of a linear |
|---|---|
| pack-quantized | `weight_packed` int32 [N, K / p]: p = 32 / bits codes along the inputs, plus 2^(bits - 1) |
| int-quantized | `weight` int8 [N, K], also for 4 bits: `num_bits` tells |
| float-quantized | `weight` float8_e4m3fn [N, K] |

All have `weight_scale` [N, G] (G = 1 per channel); packed ones `weight_shape`; asymmetric ones `weight_zero_point`,
packed along the outputs ([N / p, G] int32) where codes are packed, else int8 [N, G]; act-order `weight_g_idx` int32
[K], the group of each input. W[n, k] = (code - zero) * scale, where code and zero carry the same offset.
"""

import dataclasses
import logging
from typing import Any, Literal, Self

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Int, Shaped, UInt8

from specjax.checkpoints import codes, tensors
from specjax.checkpoints import compressed_tensors_settings as settings
from specjax.errors import CheckpointError
from specjax.files.base import TensorSource
from specjax.quant import packing
from specjax.quant import scheme as schemes
from specjax.quant.linear import QuantizedLinear
from specjax.quant.scheme import WeightSpec

Layout = Literal["pack-quantized", "int-quantized", "float-quantized"]
_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressedTensorsFormat:
    """Reads the linears of a compressed-tensors checkpoint; `ignore` lists modules that are stored dense."""

    name = "compressed-tensors"
    groups: tuple[settings.Group, ...]
    ignore: tuple[str, ...]

    @classmethod
    def detect(
        cls, quantization_config: dict | None, source: TensorSource, hf_config: dict
    ) -> Self | None:
        """The format's settings, or None if the configuration is not compressed-tensors'.

        Raises:
            CheckpointError: a setting is not supported; names the field.
        """
        config = quantization_config or hf_config.get("compression_config") or {}
        if config.get("quant_method") != "compressed-tensors":
            return None
        for field in ("sparsity_config", "transform_config"):
            value = tensors.mapping(config.get(field), field)
            if value and value.get("format") != "dense":
                raise CheckpointError(
                    f"quantization_config.{field}={value!r} is not supported; supported: empty"
                )
        if config.get("kv_cache_scheme"):
            _log.warning(
                "quantization_config.kv_cache_scheme is not applied: the cache stays in the compute dtype"
            )
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError(f"quantization_config.config_groups={groups!r} holds no group")
        return cls(
            groups=tuple(
                settings.parse_group(n, g, config.get("format")) for n, g in groups.items()
            ),
            ignore=tensors.names(config.get("ignore"), "ignore"),
        )

    def linear(
        self, source: TensorSource, prefix: str, out_features: int, in_features: int, bias: bool
    ) -> QuantizedLinear | None:
        """One linear; None if `ignore` or the groups' targets leave it dense.

        Raises:
            CheckpointError: a tensor is missing or does not fit its group's settings.
        """
        group = self._group(prefix)
        if group is None:
            return None
        if tensors.is_dense(source, prefix):
            raise CheckpointError(
                f"{prefix}.weight: holds floating-point weights, but quantization_config targets it; "
                "compress the checkpoint, or add the module to quantization_config.ignore"
            )
        group_size = schemes.check_group_size(in_features, group.group_size, prefix)
        shape = (out_features, in_features)
        read = _read_packed if group.layout == "pack-quantized" else _read_plain
        unpacked = read(source, prefix, group.scheme.weights, shape)
        perm = _read_perm(source, prefix, group, in_features, group_size)
        if perm is not None:
            unpacked = np.take(unpacked, perm, axis=1)
        table = (out_features, in_features // group_size)
        return QuantizedLinear(
            codes=codes.typed(unpacked, group.scheme),
            scales=jnp.asarray(_read_scales(source, prefix, table, group.per_tensor)),
            zeros=_read_zeros(source, prefix, group.scheme.weights, table),
            perm=None if perm is None else jnp.asarray(perm),
            bias=tensors.read_bias(source, prefix, out_features, bias),
            scheme=group.scheme,
            group_size=group_size,
        )

    def tensor(self, source: TensorSource, name: str) -> None:
        """No tensor is renamed or transformed."""
        return None

    def _group(self, prefix: str) -> settings.Group | None:
        """The group of a linear: names and patterns before the class `Linear`; None if it stays dense."""
        if any(settings.matches(target, prefix) for target in self.ignore):
            return None
        for group in self.groups:
            if any(settings.matches(target, prefix) for target in group.targets):
                return group
        return next((group for group in self.groups if "Linear" in group.targets), None)


def _read_packed(
    source: TensorSource, prefix: str, spec: WeightSpec, shape: tuple[int, int]
) -> UInt8[np.ndarray, "N K"]:
    name = f"{prefix}.weight_shape"
    if tensors.has(source, name):
        stated = tuple(int(n) for n in source.read(name))
        if stated != shape:
            raise CheckpointError(f"{name}: says {list(stated)}, the model needs {list(shape)}")
    rows, columns = shape
    words = tensors.read(
        source, f"{prefix}.weight_packed", [np.int32], (rows, -(-columns // (32 // spec.bits)))
    )
    return codes.unpack_words(words, spec.bits, spec.symmetric)[:, :columns]


def _read_plain(
    source: TensorSource, prefix: str, spec: WeightSpec, shape: tuple[int, int]
) -> Shaped[np.ndarray, "N K"]:
    name = f"{prefix}.weight"
    if spec.kind == "float":
        return tensors.read(source, name, [_FLOAT8], shape)
    weight = tensors.read(source, name, [np.int8], shape)
    if spec.bits == 8:
        return weight if spec.symmetric else weight.view(np.uint8) ^ np.uint8(0x80)
    low, high = int(weight.min()), int(weight.max())
    if low < -8 or high > 7:
        raise CheckpointError(
            f"{name}: holds {low if low < -8 else high}, but num_bits=4 means codes of -8..7"
        )
    return weight.view(np.uint8) & 15 if spec.symmetric else (weight + np.int8(8)).view(np.uint8)


def _read_scales(
    source: TensorSource, prefix: str, table: tuple[int, int], per_tensor: bool
) -> Shaped[np.ndarray, "N G"]:
    name = f"{prefix}.weight_scale"
    if not per_tensor and not (tensors.has(source, name) and source.shape(name) == table[:1]):
        return tensors.read(source, name, tensors.FLOATS, table)
    scales = tensors.read(source, name, tensors.FLOATS, tuple(source.shape(name)))
    if per_tensor and scales.size != 1:
        raise CheckpointError(
            f"{name}: shape is {list(scales.shape)}, strategy=tensor needs one value"
        )
    return np.array(np.broadcast_to(scales.reshape(-1, 1), table))


def _read_zeros(source: TensorSource, prefix: str, spec: WeightSpec, table: tuple[int, int]):
    if spec.symmetric:
        return None
    name, (rows, groups) = f"{prefix}.weight_zero_point", table
    if tensors.has(source, name) and source.dtype(name) == np.int8:
        zeros = tensors.read(source, name, [np.int8], table).astype(np.int16)
        return jnp.asarray(codes.narrow_zeros(zeros + 2 ** (spec.bits - 1)))
    packed_rows = -(-rows // (32 // spec.bits))
    words = tensors.read(source, name, [np.int32], (packed_rows, groups))
    return jnp.asarray(
        codes.narrow_zeros(codes.unpack_words(words.T, spec.bits, False)[:, :rows].T)
    )


def _read_perm(
    source: TensorSource, prefix: str, group: settings.Group, in_features: int, group_size: int
) -> Int[np.ndarray, "K"] | None:
    name = f"{prefix}.weight_g_idx"
    if not tensors.has(source, name):
        if group.needs_g_idx:
            raise CheckpointError(f"{name}: missing, but weights.actorder=group needs it")
        return None
    g_idx = tensors.read(source, name, [np.int32, np.int64], (in_features,))
    if np.all(g_idx == -1):
        return None
    return codes.group_order(g_idx, group_size, name)


def check_linear(linear: QuantizedLinear, prefix: str) -> None:
    """Raises CheckpointError unless the scheme has one level, no minima, and a kind that the format holds."""
    _layout(linear, prefix)


def pack_linear(linear: QuantizedLinear, prefix: str) -> dict[str, np.ndarray]:
    """The tensors of one linear (plus its bias), as llm-compressor writes them.

    Raises:
        CheckpointError: the scheme has a second level, minima, or a kind that the format does not hold.
    """
    layout, spec = _layout(linear, prefix), linear.scheme.weights
    host = codes.to_host(linear.codes)
    if linear.perm is not None:
        host = np.take(host, np.argsort(np.asarray(linear.perm)), axis=1)
    packed = {f"{prefix}.weight_scale": np.asarray(linear.scales)}
    if layout == "pack-quantized":
        packed[f"{prefix}.weight_packed"] = codes.pack_words(host, spec.bits, spec.symmetric)
        packed[f"{prefix}.weight_shape"] = np.array(host.shape, np.int64)
    elif layout == "float-quantized":
        packed[f"{prefix}.weight"] = host
    else:
        packed[f"{prefix}.weight"] = _signed(host, spec)
    if linear.zeros is not None:
        zeros = codes.zero_points(linear.zeros, spec.bits, f"{prefix}.zeros")
        packed[f"{prefix}.weight_zero_point"] = (
            codes.pack_words(zeros.T, spec.bits, False).T
            if layout == "pack-quantized"
            else zeros.astype(np.int8) - np.int8(8)
        )
    if linear.perm is not None:
        perm = np.asarray(linear.perm)
        packed[f"{prefix}.weight_g_idx"] = (np.argsort(perm) // linear.group_size).astype(np.int32)
    if linear.bias is not None:
        packed[f"{prefix}.bias"] = np.asarray(linear.bias)
    return packed


def _signed(host: Shaped[np.ndarray, "N K"], spec: WeightSpec) -> Int[np.ndarray, "N K"]:
    """Host codes as int8 values with the offset of the format."""
    if spec.bits == 8:
        return host if spec.symmetric else (host ^ np.uint8(0x80)).view(np.int8)
    return packing.sign_extend(host if spec.symmetric else host ^ np.uint8(8))


def _layout(linear: QuantizedLinear, prefix: str) -> Layout:
    spec, activations = linear.scheme.weights, linear.scheme.activations
    plain = linear.channel_scales is None and linear.minima is None
    if not plain or (spec.kind == "float" and spec.bits != 8):
        raise CheckpointError(
            f"{prefix}: scheme {linear.scheme.name} does not fit format compressed-tensors; it holds one-level "
            "w4a16, w8a16, w4a8, w8a8, w4a4 and fp8"
        )
    if spec.kind == "float":
        return "float-quantized"
    return "pack-quantized" if activations is None else "int-quantized"


def quantization_config(
    linears: dict[str, QuantizedLinear], dense: tuple[str, ...] = ()
) -> dict[str, Any]:
    """`quantization_config` for linears by prefix; `dense` linears are ignored.

    Linears with equal settings share a group; a single group targets the class `Linear`, several name their modules.
    """
    groups: dict[str, tuple[dict, list[str]]] = {}
    for prefix, linear in linears.items():
        group = _group_config(linear, _layout(linear, prefix))
        groups.setdefault(repr(group), (group, []))[1].append(prefix)
    layouts = {group["format"] for group, _ in groups.values()}
    return {
        "config_groups": {
            f"group_{i}": {**group, "targets": ["Linear"] if len(groups) == 1 else targets}
            for i, (group, targets) in enumerate(groups.values())
        },
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "ignore": list(dense),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _group_config(linear: QuantizedLinear, layout: Layout) -> dict[str, Any]:
    spec, activations = linear.scheme.weights, linear.scheme.activations
    grouped = linear.group_size != linear.in_features

    def arguments(kind, bits, symmetric, **other):
        return {"num_bits": bits, "type": kind, "symmetric": symmetric, **other}

    return {
        "format": layout,
        "weights": arguments(
            *(spec.kind, spec.bits, spec.symmetric),
            strategy="group" if grouped else "channel",
            group_size=linear.group_size if grouped else None,
            dynamic=False,
            actorder=None if linear.perm is None else "group",
        ),
        "input_activations": None
        if activations is None
        else arguments(activations.kind, activations.bits, True, strategy="token", dynamic=True),
        "output_activations": None,
    }
