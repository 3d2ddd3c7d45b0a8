"""What a quantized linear multiplies: how its weights are coded and how its inputs are rounded.

A scheme is a static value composed of two specifications, never a class or file of its own. Names
such as `w4a8-qqq` are derived from the value; `SCHEMES` holds the documented ones and `lookup` also
finds every supported combination (for example `w4a4-qqq`, the view of QQQ codes under 4-bit
activations).
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from specjax import errors
from specjax.pallas.matmul.formats import registry
from specjax.pallas.matmul.formats.base import Format

Kind = Literal["int", "float"]

_CODE_DTYPES = {
    ("int", 4, True): jnp.int4,
    ("int", 4, False): jnp.uint4,
    ("int", 8, True): jnp.int8,
    ("int", 8, False): jnp.uint8,
    ("float", 8, True): jnp.float8_e4m3fn,
    ("float", 4, True): jnp.float4_e2m1fn,
}


def _code_range(dtype: jnp.dtype) -> tuple[float, float]:
    info = (jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype)
    return float(info.min), float(info.max)


@dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """How weights are coded.

    Attributes:
        kind: integer codes, or floating-point codes (e4m3 for 8 bits, e2m1 for 4).
        bits: 4 or 8.
        symmetric: codes are signed and zero is zero; otherwise they are unsigned and come with
            zeros or minima.
        levels: "single" multiplies codes by floating-point scales. "qqq" and "qoq" (integer, 4
            bits) may have a second level whose result is an int8 weight; the formulas are in
            `specjax.pallas.matmul.formats`, and any other name is that of a format registered there.
    """

    kind: Kind = "int"
    bits: int
    symmetric: bool = True
    levels: str = "single"

    def __post_init__(self):
        if (self.kind, self.bits, self.symmetric) not in _CODE_DTYPES:
            raise errors.ConfigError(
                f"weights of kind={self.kind!r}, bits={self.bits!r}, symmetric={self.symmetric!r} "
                "are not supported; supported: int 4 and 8 bits (symmetric or not), "
                "float 4 and 8 bits (symmetric)"
            )
        if registry.find(str(self.code_dtype), self.levels) is None:
            raise errors.ConfigError(
                f"levels={self.levels!r} with bits={self.bits}, symmetric={self.symmetric} is not "
                "supported; 'qqq' is symmetric 4 bits, 'qoq' asymmetric 4 bits, 'single' any"
            )

    @property
    def code_dtype(self) -> jnp.dtype:
        """The dtype of the codes: int4 and e2m1 arrays hold two per byte on the device."""
        return jnp.dtype(_CODE_DTYPES[self.kind, self.bits, self.symmetric])

    @property
    def two_level(self) -> bool:
        """Scales of groups make int8 weights where there is more than one group."""
        return registry.find(str(self.code_dtype), self.levels).two_level

    @property
    def code_range(self) -> tuple[float, float]:
        """Smallest and largest code (largest finite magnitudes for floating-point codes)."""
        return _code_range(self.code_dtype)


@dataclass(frozen=True, kw_only=True)
class ActivationSpec:
    """How inputs are rounded: dynamically, one symmetric scale per token (row).

    Attributes:
        kind: integer codes, or floating-point codes (e4m3 for 8 bits, e2m1 for 4).
        bits: 4 or 8.
        scale_dtype: float32, or float16 for the arithmetic of QServe, which stores scales and row
            sums in half precision.
        full_range: integer codes use -128 as well as 127: the scale is amax / 127.5 (4 bits: 7.5)
            and the largest magnitude is clipped by half a code, as compressed-tensors defines it.
    """

    kind: Kind = "int"
    bits: int
    scale_dtype: Literal["float32", "float16"] = "float32"
    full_range: bool = False

    def __post_init__(self):
        if self.kind not in ("int", "float") or self.bits not in (4, 8):
            raise errors.ConfigError(
                f"activations of kind={self.kind!r}, bits={self.bits!r} are not supported; "
                "supported: int or float, 4 or 8 bits, or None for unquantized"
            )
        if self.scale_dtype not in ("float32", "float16"):
            raise errors.ConfigError(
                f"activations scale_dtype={self.scale_dtype!r} is not supported; "
                "supported: float32, float16"
            )
        if self.full_range and self.kind == "float":
            raise errors.ConfigError("activations full_range=True is for integer codes only")

    @property
    def code_dtype(self) -> jnp.dtype:
        return jnp.dtype(_CODE_DTYPES[self.kind, self.bits, True])

    @property
    def levels(self) -> float:
        """What the largest magnitude of a row maps to: 127, 7, 448 (e4m3) or 6 (e2m1).

        127.5 and 7.5 with `full_range`, before codes are clipped to `code_range`.
        """
        return self.code_range[1] + (0.5 if self.full_range else 0)

    @property
    def code_range(self) -> tuple[float, float]:
        """Smallest and largest code (largest finite magnitudes for floating-point codes)."""
        return _code_range(self.code_dtype)


def _fit(weights: WeightSpec, activations: ActivationSpec | None) -> bool:
    if activations is None:
        return True
    if weights.kind == "float":
        return activations.kind == "float" and activations.bits >= weights.bits
    return activations.kind == "int" and (weights.bits == 4 or weights.symmetric)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What a linear multiplies; without `activations` it is weight-only.

    Attributes:
        weights: how the stored codes are read.
        activations: how inputs are rounded, or None.
    """

    weights: WeightSpec
    activations: ActivationSpec | None = None

    def __post_init__(self):
        if not _fit(self.weights, self.activations):
            raise errors.ConfigError(
                f"weights {self.weights} cannot be multiplied by activations {self.activations}; "
                "supported: equal kinds, float activations of at least the weights' bits, "
                "symmetric codes for int 8-bit weights"
            )

    @property
    def name(self) -> str:
        """`w4a16`, `w4a8-qqq`, `fp8`, ...: equal schemes have equal names and the reverse."""
        weights, bits = self.weights, 16 if self.activations is None else self.activations.bits
        if weights.kind == "float":
            plain = 8 if weights.bits == 8 else 16
            name = f"fp{weights.bits}" + ("" if bits == plain else f"-a{bits}")
        else:
            name = f"w{weights.bits}a{bits}"
            if weights.levels != "single":
                name += f"-{weights.levels}"
            elif not weights.symmetric:
                name += "-asym"
        if self.activations is not None and self.activations.full_range:
            name += "-full"
        if self.activations is not None and self.activations.scale_dtype == "float16":
            name += "-s16"
        return name

    def __str__(self) -> str:
        return self.name


def _weight_spec(format: Format) -> WeightSpec:
    by_dtype = {jnp.dtype(dtype): key for key, dtype in _CODE_DTYPES.items()}
    kind, bits, symmetric = by_dtype[jnp.dtype(format.code_dtype)]
    return WeightSpec(kind=kind, bits=bits, symmetric=symmetric, levels=format.levels)


def _all_schemes() -> dict[str, Scheme]:
    weights = [_weight_spec(format) for format in registry.formats()]
    specs = itertools.product((8, 4), ("float32", "float16"))
    activations = [
        ActivationSpec(kind=kind, bits=bits, scale_dtype=dtype, full_range=full)
        for bits, dtype in specs
        for kind, full in (("int", False), ("int", True), ("float", False))
    ]
    combinations = [
        Scheme(weights=weight, activations=activation)
        for weight, activation in itertools.product(weights, [None, *activations])
        if _fit(weight, activation)
    ]
    return {scheme.name: scheme for scheme in combinations}


_ALL = _all_schemes()

SCHEMES: dict[str, Scheme] = {
    name: _ALL[name]
    for name in (
        *("w8a16", "w4a16", "w4a16-asym", "w8a8", "w4a8", "w4a8-qqq", "w4a8-qoq", "w4a4"),
        *("fp8", "fp8-a16", "fp4", "fp4-a8", "fp4-a4"),
    )
}


def lookup(name: str) -> Scheme:
    """The scheme of this name.

    Raises:
        ConfigError: there is none; the message lists the documented names.
    """
    if name not in _ALL:
        raise errors.ConfigError(f"scheme={name!r} is unknown; known schemes: {', '.join(SCHEMES)}")
    return _ALL[name]


def check_group_size(in_features: int, group_size: int, name: str = "linear") -> int:
    """The number of input features that share a scale; -1 stands for all of them (per channel).

    Raises:
        ConfigError: `group_size` does not divide `in_features`; the message lists group sizes that
            do.
    """
    size = in_features if group_size == -1 else group_size
    if size <= 0 or in_features % size:
        fitting = [str(g) for g in (32, 64, 128, 256) if in_features % g == 0]
        raise errors.ConfigError(
            f"{name}: group_size={group_size} does not divide in_features={in_features}; "
            f"group sizes that do: {', '.join([*fitting, '-1 (per channel)'])}"
        )
    return size
