"""specjax's own format: canonical linears as they are in memory, so that loading is reading.

A Hugging Face folder whose config.json has `quantization_config` {"quant_method": "specjax", "format_version": 1,
"linears": {prefix: {"scheme": name, "group_size": g}}}. Linear `prefix` is stored as `<prefix>.codes` ([N, K], or
where codes have 4 bits uint8 [N, ceil(K / 2)], the first code of a pair in the low nibble) and one tensor per
further array of `specjax.quant.linear.QuantizedLinear`, under its field name and in its dtype.
"""

import dataclasses
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from specjax.checkpoints import codes, tensors
from specjax.errors import CheckpointError, ConfigError
from specjax.files.base import TensorSource
from specjax.quant import scheme as schemes
from specjax.quant.linear import QuantizedLinear
from specjax.quant.scheme import Scheme

FORMAT_VERSION = 1
_OPTIONAL = ("zeros", "minima", "channel_scales", "perm", "bias")
_INTEGERS = (np.int8, np.uint8, np.int16, np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecjaxFormat:
    """Reads the linears of a folder in specjax's format; `linears` maps prefixes to (scheme, group size)."""

    name = "specjax"
    linears: dict[str, tuple[Scheme, int]]

    @classmethod
    def detect(
        cls, quantization_config: dict | None, source: TensorSource, hf_config: dict
    ) -> Self | None:
        """The format's table of linears, or None if the configuration is another's.

        Raises:
            CheckpointError: another version, a malformed table, or a linear of it that the files lack.
        """
        config = quantization_config or {}
        if config.get("quant_method") != "specjax":
            return None
        tensors.one_of(config.get("format_version"), (FORMAT_VERSION,), "format_version")
        linears = {
            prefix: _parse_entry(prefix, entry) for prefix, entry in config["linears"].items()
        }
        names = frozenset(source.names())
        for prefix in linears:
            if f"{prefix}.codes" not in names:
                raise CheckpointError(f"{prefix}.codes: missing from the checkpoint")
        return cls(linears=linears)

    def linear(
        self, source: TensorSource, prefix: str, out_features: int, in_features: int, bias: bool
    ) -> QuantizedLinear | None:
        """One linear; None if it is stored dense.

        Raises:
            CheckpointError: a tensor is missing or does not fit.
        """
        if prefix not in self.linears:
            return None
        scheme, size = self.linears[prefix]
        group_size = schemes.check_group_size(in_features, size, prefix)
        table = (out_features, in_features // group_size)
        shapes = dict(zeros=table, minima=table, channel_scales=table[:1], perm=(in_features,))
        shapes["bias"] = table[:1]
        dtypes = dict(zeros=_INTEGERS, perm=_INTEGERS)
        arrays = {
            field: jnp.asarray(
                tensors.read(
                    *(source, f"{prefix}.{field}", dtypes.get(field, tensors.FLOATS)),
                    shapes[field],
                )
            )
            for field in _OPTIONAL
            if tensors.has(source, f"{prefix}.{field}")
        }
        if ("bias" in arrays) != bias:
            raise CheckpointError(
                f"{prefix}.bias: {'present' if 'bias' in arrays else 'missing'}, which the configuration contradicts"
            )
        scales = (*tensors.FLOATS, np.int8) if "channel_scales" in arrays else tensors.FLOATS
        codes_array = _read_codes(source, f"{prefix}.codes", scheme, (out_features, in_features))
        scales_array = jnp.asarray(tensors.read(source, f"{prefix}.scales", scales, table))
        try:
            return QuantizedLinear(
                codes=codes_array,
                scales=scales_array,
                scheme=scheme,
                group_size=group_size,
                **arrays,
            )
        except ConfigError as error:
            raise CheckpointError(f"{prefix}: {error}") from error

    def tensor(self, source: TensorSource, name: str) -> None:
        """No dense tensor is renamed or transformed."""
        return None


def _parse_entry(prefix: str, entry: Any) -> tuple[Scheme, int]:
    try:
        return schemes.lookup(entry["scheme"]), int(entry["group_size"])
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"quantization_config.linears[{prefix!r}]={entry!r}: {error}"
        ) from error


def _read_codes(source: TensorSource, name: str, scheme: Scheme, shape: tuple[int, int]):
    spec, (rows, columns) = scheme.weights, shape
    if spec.bits == 8:
        return jnp.asarray(tensors.read(source, name, [spec.code_dtype], shape))
    packed = tensors.read(source, name, [np.uint8], (rows, -(-columns // 2)))
    return codes.typed(codes.split_nibbles(packed)[:, :columns], scheme)


def check_linear(linear: QuantizedLinear, prefix: str) -> None:
    """Every linear fits."""


def pack_linear(linear: QuantizedLinear, prefix: str) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The arrays of one linear under their file names."""
    host = codes.to_host(linear.codes)
    if linear.scheme.weights.bits == 4:
        host = codes.join_nibbles(np.pad(host, ((0, 0), (0, host.shape[1] % 2))))
    packed = {f"{prefix}.codes": host, f"{prefix}.scales": np.asarray(linear.scales)}
    for field in _OPTIONAL:
        if (array := getattr(linear, field)) is not None:
            packed[f"{prefix}.{field}"] = np.asarray(array)
    return packed


def quantization_config(
    linears: dict[str, QuantizedLinear], dense: tuple[str, ...] = ()
) -> dict[str, Any]:
    """`quantization_config` for linears by prefix."""
    return {
        "quant_method": "specjax",
        "format_version": FORMAT_VERSION,
        "linears": {
            prefix: {
                "scheme": linear.scheme.name,
                "group_size": -1 if linear.group_size == linear.in_features else linear.group_size,
            }
            for prefix, linear in linears.items()
        },
    }
