"""GPTQ checkpoints (AutoGPTQ, GPTQModel; `checkpoint_format` gptq = v1 and gptq_v2), 4 and 8 bits.

Per linear: `qweight` int32 [K / p, N] packs p = 32 / bits codes along the inputs, lowest bits first; `scales` [G,
N]; `qzeros` int32 [G, N / p] packs along the outputs; `g_idx` int32 [K] is the group of each input. The weight is
W[n, k] = (code - zero[g_idx[k], n]) * scales[g_idx[k], n]. Version 1 stores `qzeros` minus 0x11111111 (8 bits:
0x01010101) as whole words, so a zero of 0 borrows from its neighbour, exactly as GPTQModel writes and reads it.
"""

import dataclasses
import re
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped, UInt8

from specjax.checkpoints import codes, tensors
from specjax.errors import CheckpointError
from specjax.files.base import TensorSource
from specjax.quant import scheme as schemes
from specjax.quant.linear import QuantizedLinear

_PACKED = "codes of one int32"
# What a rule of `dynamic` must not change.
_FIXED = {"format": None, "checkpoint_format": None, "quant_method": "gptq", "method": "gptq"}
_FIXED |= {"pack_dtype": "int32"}
_ZERO_OFFSET = {4: np.uint32(0x11111111), 8: np.uint32(0x01010101)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQFormat:
    """Reads the linears of a GPTQ checkpoint.

    Attributes:
        bits: 4 or 8.
        group_size: inputs per scale, -1 for all.
        sym: what the configuration says about zeros; None where it says nothing.
        desc_act: whether the configuration promises act-order.
        static_groups: whether act-order kept the groups in input order, so that `g_idx` may be absent.
        version: 1 or 2.
        dynamic: (regex, overrides) of GPTQModel's per-module settings; overrides None leaves the module dense.
    """

    name = "gptq"
    bits: int
    group_size: int
    sym: bool | None
    desc_act: bool
    static_groups: bool
    version: int
    dynamic: tuple[tuple[str, tuple[tuple[str, Any], ...] | None], ...] = ()

    @classmethod
    def detect(
        cls, quantization_config: dict | None, source: TensorSource, hf_config: dict
    ) -> Self | None:
        """The format's settings, or None if the configuration is not GPTQ's.

        Raises:
            CheckpointError: GPTQ with a setting that is not supported; names the field.
        """
        config = quantization_config
        if config is None or not _is_gptq(config):
            return None
        layout = config.get("checkpoint_format") or config.get("format") or "gptq"
        tensors.one_of(layout, ("gptq", "gptq_v2"), "checkpoint_format")
        tensors.one_of(config.get("pack_dtype", "int32"), ("int32",), "pack_dtype")
        meta = tensors.mapping(config.get("meta"), "meta")
        static = config.get("static_groups", meta.get("static_groups"))
        return cls(
            bits=tensors.one_of(config.get("bits"), (4, 8), "bits"),
            group_size=tensors.group_size(config.get("group_size", -1), "group_size"),
            sym=tensors.flag(config.get("sym"), "sym"),
            desc_act=bool(tensors.flag(config.get("desc_act"), "desc_act")),
            static_groups=bool(tensors.flag(static, "static_groups")),
            version=2 if layout == "gptq_v2" else 1,
            dynamic=_dynamic(tensors.mapping(config.get("dynamic"), "dynamic"), layout),
        )

    def linear(
        self, source: TensorSource, prefix: str, out_features: int, in_features: int, bias: bool
    ) -> QuantizedLinear | None:
        """One linear; None if it is stored dense.

        Raises:
            CheckpointError: a tensor is missing or does not fit; `sym` contradicts `qzeros`; `g_idx` is no grouping.
        """
        if tensors.is_dense(source, prefix):
            return None
        settings = self._settings(prefix)
        group_size = schemes.check_group_size(in_features, settings.group_size, prefix)
        per_word = 32 // settings.bits
        tensors.divisible(
            prefix, per_word, _PACKED, in_features=in_features, out_features=out_features
        )
        groups = in_features // group_size
        words = tensors.read(
            source, f"{prefix}.qweight", [np.int32], (in_features // per_word, out_features)
        )
        scales = tensors.read(source, f"{prefix}.scales", tensors.FLOATS, (groups, out_features))
        zeros = settings._zeros(source, prefix, groups, out_features)
        symmetric = settings._is_symmetric(zeros, f"{prefix}.qzeros")
        perm = settings._perm(source, prefix, in_features, group_size)
        unpacked = codes.unpack_words(words.T, settings.bits, symmetric)
        scheme = schemes.lookup(f"w{settings.bits}a16" + ("" if symmetric else "-asym"))
        return QuantizedLinear(
            codes=codes.typed(
                unpacked if perm is None else np.take(unpacked, perm, axis=1), scheme
            ),
            scales=jnp.asarray(np.ascontiguousarray(scales.T)),
            zeros=None if symmetric else jnp.asarray(codes.narrow_zeros(zeros)),
            perm=None if perm is None else jnp.asarray(perm),
            bias=tensors.read_bias(source, prefix, out_features, bias),
            scheme=scheme,
            group_size=group_size,
        )

    def tensor(self, source: TensorSource, name: str) -> None:
        """No tensor is renamed or transformed."""
        return None

    def _settings(self, prefix: str) -> Self:
        """These settings with GPTQModel's per-module overrides applied; the first matching pattern decides."""
        for pattern, overrides in self.dynamic:
            if re.match(pattern, prefix):
                if overrides is None:
                    raise CheckpointError(
                        f"quantization_config.dynamic says {prefix} is not quantized, but {prefix}.weight is missing"
                    )
                return dataclasses.replace(self, **dict(overrides))
        return self

    def _zeros(
        self, source: TensorSource, prefix: str, groups: int, out_features: int
    ) -> UInt8[np.ndarray, "N G"]:
        per_word = 32 // self.bits
        words = tensors.read(
            source, f"{prefix}.qzeros", [np.int32], (groups, out_features // per_word)
        )
        return unpack_zeros(words, self.bits, self.version)

    def _is_symmetric(self, zeros: UInt8[np.ndarray, "N G"], name: str) -> bool:
        if self.sym is False:
            return False
        middle = 2 ** (self.bits - 1)
        symmetric = bool(np.all(zeros == middle))
        if self.sym and not symmetric:
            found = int(zeros[zeros != middle][0])
            hint = ""
            if np.all(zeros == (middle + 1 if self.version == 1 else middle - 1)):
                other = "gptq_v2" if self.version == 1 else "gptq"
                hint = f'; checkpoint_format is probably "{other}"'
            raise CheckpointError(
                f"{name}: holds a zero point of {found}, but quantization_config.sym=true needs {middle} "
                f"everywhere{hint}"
            )
        return symmetric

    def _perm(
        self, source: TensorSource, prefix: str, in_features: int, group_size: int
    ) -> Int[np.ndarray, "K"] | None:
        name = f"{prefix}.g_idx"
        if not tensors.has(source, name):
            if self.desc_act and not self.static_groups and group_size != in_features:
                raise CheckpointError(
                    f"{name}: missing, but quantization_config.desc_act=true without static_groups needs it"
                )
            return None
        g_idx = tensors.read(source, name, [np.int32, np.int64], (in_features,))
        return codes.group_order(g_idx, group_size, name)


def unpack_zeros(
    words: Int[np.ndarray, "G Np"], bits: int, version: int
) -> UInt8[np.ndarray, "N G"]:
    """Zero points in code units (0 .. 2^bits - 1) from `qzeros`."""
    words = np.ascontiguousarray(words).view(np.uint32)
    if version == 1:
        words = words + _ZERO_OFFSET[bits]
    zeros = codes.split_nibbles(words) if bits == 4 else words.view(np.uint8)
    return np.ascontiguousarray(zeros.T)


def pack_zeros(
    zeros: Shaped[np.ndarray, "N G"], bits: int, version: int
) -> Int[np.ndarray, "G Np"]:
    """Inverse of `unpack_zeros`."""
    zeros = np.ascontiguousarray(zeros.T).astype(np.uint8)
    packed = codes.join_nibbles(zeros) if bits == 4 else zeros
    words = packed.view(np.uint32)
    if version == 1:
        words = words - _ZERO_OFFSET[bits]
    return words.view(np.int32)


def check_linear(linear: QuantizedLinear, prefix: str) -> None:
    """Raises CheckpointError unless the linear is weight-only W4 or W8, without minima, in whole words."""
    spec = linear.scheme.weights
    one_level = spec.levels == "single" and linear.minima is None
    if spec.kind != "int" or not one_level or linear.scheme.activations is not None:
        raise CheckpointError(
            f"{prefix}: scheme {linear.scheme.name} does not fit format gptq; it holds w4a16 and w8a16 (symmetric or "
            "with zeros)"
        )
    rows, columns = linear.codes.shape
    tensors.divisible(prefix, 32 // spec.bits, _PACKED, in_features=columns, out_features=rows)


def pack_linear(linear: QuantizedLinear, prefix: str) -> dict[str, np.ndarray]:
    """The four tensors of one linear (plus its bias), as GPTQModel writes version 1.

    Raises:
        CheckpointError: the format cannot hold the linear, or float16 its scales.
    """
    check_linear(linear, prefix)
    spec, bits, columns = linear.scheme.weights, linear.scheme.weights.bits, linear.in_features
    host = codes.to_host(linear.codes)
    g_idx = (np.arange(columns) // linear.group_size).astype(np.int32)
    if linear.perm is not None:
        order = np.argsort(np.asarray(linear.perm))
        host, g_idx = np.take(host, order, axis=1), g_idx[order]
    zeros = np.full(linear.scales.shape, 2 ** (bits - 1), np.uint8)
    if linear.zeros is not None:
        zeros = codes.zero_points(linear.zeros, bits, f"{prefix}.zeros")
    packed = {
        f"{prefix}.qweight": np.ascontiguousarray(codes.pack_words(host, bits, spec.symmetric).T),
        f"{prefix}.qzeros": pack_zeros(zeros, bits, version=1),
        f"{prefix}.scales": codes.to_half(linear.scales, f"{prefix}.scales").T,
        f"{prefix}.g_idx": g_idx,
    }
    if linear.bias is not None:
        packed[f"{prefix}.bias"] = np.asarray(linear.bias)
    return packed


def quantization_config(
    linears: dict[str, QuantizedLinear], dense: tuple[str, ...] = ()
) -> dict[str, Any]:
    """`quantization_config` for linears by prefix.

    Raises:
        CheckpointError: they differ in bits, group size or symmetry, which the format states once for all.
    """
    settings = {
        (l.scheme.weights.bits, -1 if l.group_size == l.in_features else l.group_size)
        for l in linears.values()
    }
    if len(settings) != 1:
        found = ", ".join(f"{bits} bits group {size}" for bits, size in sorted(settings))
        raise CheckpointError(f"format gptq holds one bits and group_size, the model has {found}")
    bits, group_size = settings.pop()
    permuted = any(l.perm is not None for l in linears.values())
    return {
        "bits": bits,
        "checkpoint_format": "gptq",
        "desc_act": permuted,
        "format": "gptq",
        "group_size": group_size,
        "lm_head": "lm_head" in linears,
        "meta": {"quantizer": ["specjax"], "static_groups": False, "true_sequential": True},
        "method": "gptq",
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "sym": all(l.scheme.weights.symmetric for l in linears.values()),
    }


def _is_gptq(config: dict) -> bool:
    method = config.get("quant_method") or config.get("method")
    if method is None:
        # quantize_config.json of AutoGPTQ before 0.5 does not name its method.
        return "bits" in config and "desc_act" in config
    return method == "gptq"


def _dynamic(
    rules: dict, layout: str
) -> tuple[tuple[str, tuple[tuple[str, Any], ...] | None], ...]:
    """GPTQModel's `dynamic`: {"-:regex": {}} leaves modules dense, {"regex" or "+:regex": {...}} overrides."""
    parsed = []
    for key, overrides in rules.items():
        field = f"dynamic[{key!r}]"
        pattern = tensors.pattern(key[2:] if key[:2] in ("-:", "+:") else key, field)
        settings = None if key.startswith("-:") else _override(overrides, layout, field)
        parsed.append((pattern, settings))
    return tuple(parsed)


def _override(overrides: Any, layout: str, field: str) -> tuple[tuple[str, Any], ...]:
    """Settings of one rule that say how codes are read; those of the quantizer (damping and the like) say nothing."""
    overrides = tensors.mapping(overrides, field)
    for name, wanted in _FIXED.items():
        if name in overrides:
            supported = (layout,) if name in ("format", "checkpoint_format") else (wanted,)
            tensors.one_of(overrides[name], supported, f"{field}.{name}")
    kept = {}
    if overrides.get("bits") is not None:
        kept["bits"] = tensors.one_of(overrides["bits"], (4, 8), f"{field}.bits")
    if overrides.get("group_size") is not None:
        kept["group_size"] = tensors.group_size(overrides["group_size"], f"{field}.group_size")
    for name in ("sym", "desc_act"):
        if overrides.get(name) is not None:
            kept[name] = tensors.flag(overrides[name], f"{field}.{name}")
    return tuple(kept.items())
