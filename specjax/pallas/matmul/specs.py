"""Weights of real models, at which the matmul kernels are compiled, tested and timed."""

import dataclasses

import jax
import jax.numpy as jnp

from specjax import errors
from specjax.pallas.matmul import packed
from specjax.pallas.matmul.form import PackedWeight
from specjax.pallas.matmul.formats import registry
from specjax.pallas.matmul.formats.base import Format, Variant
from specjax.pallas.matmul.weight import Canonical

# Outputs and inputs of the projections, those that share their input fused.
MODELS = {
    "llama3-8b": dict(qkv=(6144, 4096), o=(4096, 4096), gate_up=(28672, 4096), down=(4096, 14336)),
    "llama3-70b": dict(
        qkv=(10240, 8192), o=(8192, 8192), gate_up=(57344, 8192), down=(8192, 28672)
    ),
    "smollm2-135m": dict(qkv=(960, 576), o=(576, 576), gate_up=(3072, 576), down=(576, 1536)),
}
# Inputs that are no multiple of the widest pipeline step: SmolLM2-135M, Gemma 3 270M, down of Llama-2-7B.
UNEVEN_INPUTS = (576, 640, 11008)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """A weight, and the inputs that it is multiplied by.

    Attributes:
        name: "<model>/<projection>", or "<model>/<projection>/<variant>", or that and "/<inputs> inputs".
        n, k: outputs and inputs.
        format: of the codes.
        variant: group size, parts and inputs.
    """

    name: str
    n: int
    k: int
    format: Format
    variant: Variant

    @property
    def operand_bits(self) -> int:
        """16 for float inputs, 8 for integer ones."""
        return 16 if self.variant.input_bits == 16 else 8

    @property
    def group_size(self) -> int:
        """Inputs per scale."""
        return self.k if self.variant.group_size == -1 else self.variant.group_size

    def canonical(self) -> dict[str, jax.ShapeDtypeStruct | None]:
        """The abstract arrays of the canonical weight by name (see `Canonical`)."""
        variant, table = self.variant, (self.n, self.k // self.group_size)
        two_level = self.format.two_level and variant.group_size != -1
        return dict(
            codes=jax.ShapeDtypeStruct((self.n, self.k), self.format.code_dtype),
            scales=jax.ShapeDtypeStruct(table, variant.scale_dtype),
            zeros=jax.ShapeDtypeStruct(table, jnp.int8) if variant.zeros else None,
            minima=jax.ShapeDtypeStruct(table, jnp.float16) if variant.minima else None,
            channel_scales=jax.ShapeDtypeStruct((self.n,), jnp.float32) if two_level else None,
        )

    def pack(self, arrays: dict[str, jax.Array | None]) -> PackedWeight:
        """The packed form of canonical arrays."""
        weight = Canonical(**arrays, group_size=self.group_size, levels=self.format.levels)
        return packed.pack(weight, self.operand_bits)

    def weight(self) -> PackedWeight:
        """The packed weight's abstract arrays."""
        return jax.eval_shape(self.pack, self.canonical())

    def arguments(self, rows: int, dtype=jnp.float16) -> dict:
        """Abstract arguments of `mosaic.matmul` by name; `dtype` is that of float inputs."""
        if self.operand_bits == 16:
            return dict(x=jax.ShapeDtypeStruct((rows, self.k), dtype), weight=self.weight())
        arguments = dict(
            x=jax.ShapeDtypeStruct((rows, self.k), f"int{self.variant.input_bits}"),
            x_scale=jax.ShapeDtypeStruct((rows, 1), jnp.float32),
            weight=self.weight(),
        )
        if self.variant.minima:
            sums = (rows, self.k // self.group_size)
            arguments["x_sums"] = jax.ShapeDtypeStruct(sums, jnp.float32)
        return arguments


def ops() -> tuple[str, ...]:
    """The products that have kernels: those of which formats state variants."""
    found = (f.op(variant.input_bits) for f in registry.formats() for variant in f.variants())
    return tuple(dict.fromkeys(found))


def of(op: str) -> dict[str, Spec]:
    """The weights at which an op is compiled, tested and timed, by name.

    A variant without a name is every projection of every model, others an 8B output projection; those whose
    kernels read group sums have it with `UNEVEN_INPUTS`, too.

    Raises:
        ConfigError: no format states such a product.
    """
    specs = {}
    for format in registry.formats():
        for variant in format.variants():
            if format.op(variant.input_bits) == op:
                specs |= _plain(format, variant) if not variant.name else _named(format, variant)
    if not specs:
        raise errors.ConfigError(f"op={op!r} is unknown; known ops: {', '.join(ops())}")
    return specs


def _named(format: Format, variant: Variant) -> dict[str, Spec]:
    outputs, inputs = MODELS["llama3-8b"]["o"]
    name = f"llama3-8b/o/{variant.name}"
    specs = {name: Spec(name=name, n=outputs, k=inputs, format=format, variant=variant)}
    if variant.group_size == -1 or not (variant.zeros or variant.minima):
        return specs
    for inputs in UNEVEN_INPUTS:
        longer, fitting = f"{name}/{inputs} inputs", _fitting(variant, inputs)
        specs[longer] = Spec(name=longer, n=outputs, k=inputs, format=format, variant=fitting)
    return specs


def _plain(format: Format, variant: Variant) -> dict[str, Spec]:
    specs = {}
    for model, projections in MODELS.items():
        for projection, (outputs, inputs) in projections.items():
            name, fitting = f"{model}/{projection}", _fitting(variant, inputs)
            specs[name] = Spec(name=name, n=outputs, k=inputs, format=format, variant=fitting)
    return specs


def _fitting(variant: Variant, inputs: int) -> Variant:
    """With half the group where that of 128 does not divide the inputs."""
    if variant.group_size == 128 and inputs % 128:
        return dataclasses.replace(variant, group_size=64)
    return variant
