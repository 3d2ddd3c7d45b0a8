"""Weights of real models, at which the matmul kernels are compiled, tested and timed."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from specjax.pallas.matmul import packed

# Outputs and inputs of the projections, those that share their input fused.
MODELS = {
    "llama3-8b": dict(qkv=(6144, 4096), o=(4096, 4096), gate_up=(28672, 4096), down=(4096, 14336)),
    "llama3-70b": dict(
        qkv=(10240, 8192), o=(8192, 8192), gate_up=(57344, 8192), down=(8192, 28672)
    ),
    "smollm2-135m": dict(qkv=(960, 576), o=(576, 576), gate_up=(3072, 576), down=(576, 1536)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """A weight.

    Attributes:
        name: "<model>/<projection>", or "<model>/<projection>/<variant>".
        n, k: outputs and inputs.
        group_size: inputs per scale; -1 per channel.
        code_bits: 4 or 8.
        operand_bits: 16 for float inputs, 8 for integer ones.
        input_bits: of integer inputs.
        signed: of the codes.
        zeros, minima: the weight has them.
        levels: "single", "qqq" or "qoq"; the latter two with a second level.
        scale_dtype: of the canonical scales.
    """

    name: str
    n: int
    k: int
    group_size: int = 128
    code_bits: int = 4
    operand_bits: int = 16
    input_bits: int = 8
    signed: bool = True
    zeros: bool = False
    minima: bool = False
    levels: str = "single"
    scale_dtype: str = "float16"

    def weight(self) -> packed.PackedWeight:
        """The packed weight's abstract arrays."""
        size = self.k if self.group_size == -1 else self.group_size
        table = (self.n, self.k // size)
        code_dtype = f"{'int' if self.signed else 'uint'}{self.code_bits}"
        abstract = dict(
            codes=jax.ShapeDtypeStruct((self.n, self.k), code_dtype),
            scales=jax.ShapeDtypeStruct(table, self.scale_dtype),
            zeros=jax.ShapeDtypeStruct(table, jnp.int8) if self.zeros else None,
            minima=jax.ShapeDtypeStruct(table, jnp.float16) if self.minima else None,
            channel_scales=None,
        )
        if self.levels != "single":
            abstract["channel_scales"] = jax.ShapeDtypeStruct((self.n,), jnp.float32)

        def pack(arrays):
            weight = packed.Canonical(**arrays, group_size=size, levels=self.levels)
            return packed.pack(weight, self.operand_bits)

        return jax.eval_shape(pack, abstract)

    def arguments(self, rows: int, dtype=jnp.float16) -> tuple:
        """Abstract positional arguments of the op's `mosaic.matmul`; `dtype` is that of float inputs."""
        if self.operand_bits == 16:
            return jax.ShapeDtypeStruct((rows, self.k), dtype), self.weight()
        codes = jax.ShapeDtypeStruct((rows, self.k), f"int{self.input_bits}")
        return codes, jax.ShapeDtypeStruct((rows, 1), jnp.float32), self.weight()


def of_models(variants: dict[str, dict], **common) -> dict[str, Spec]:
    """Every projection of every model, plus `variants` (fields by name) of an 8B output projection."""
    specs = {spec.name: spec for spec in _plain(common)}
    outputs, inputs = MODELS["llama3-8b"]["o"]
    for variant, fields in variants.items():
        name = f"llama3-8b/o/{variant}"
        specs[name] = Spec(name=name, n=outputs, k=inputs, **common | fields)
    return specs


def _plain(common: dict) -> Iterator[Spec]:
    for model, projections in MODELS.items():
        for projection, (outputs, inputs) in projections.items():
            fields = dict(common)
            if fields.get("group_size", 128) == 128 and inputs % 128:
                fields["group_size"] = 64
            yield Spec(name=f"{model}/{projection}", n=outputs, k=inputs, **fields)
