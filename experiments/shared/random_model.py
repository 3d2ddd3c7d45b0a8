"""Models of real shapes with random weights, and an acceptance rule that imposes how much is accepted.

They say how fast a loop is, and nothing about text: what they measure is labelled synthetic.
"""

import dataclasses
import zlib
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from specjax import language_model
from specjax.aot import shapes
from specjax.decoding import sampling as sample
from specjax.decoding import tree as trees
from specjax.engine.engine import Programs
from specjax.engine.program import CommandBuffers
from specjax.errors import ConfigError
from specjax.models import llama
from specjax.models.llama import Llama
from specjax.models.prepare import Preparation
from specjax.pallas import dispatch
from specjax.quant.dense_linear import Linear
from specjax.verify import base
from specjax.verify.greedy import Greedy

# Standard deviation of codes that are uniform over -8 .. 7, and over -128 .. 127.
_CODE_SPREAD = {4: 4.6, 8: 74.0}


class RandomCheckpoint(shapes.ShapeCheckpoint):
    """Parameters drawn when they are asked for, with the spread of a fresh network."""

    def _key(self, name: str):
        return jax.random.key(zlib.crc32(name.encode()))

    def tensor(self, name: str, shape: tuple[int, ...]):
        if "norm" in name:
            return jnp.ones(shape, self.dtype)
        spread = 0.02 if "embed" in name else shape[-1] ** -0.5
        return _normal(self._key(name), shape, spread, self.dtype)

    def linear(self, prefix, out_features, in_features, bias):
        linear = super().linear(prefix, out_features, in_features, bias)
        if isinstance(linear, Linear):
            weight = self.tensor(f"{prefix}.weight", (out_features, in_features))
            return Linear(weight, None if linear.bias is None else linear.bias[...])
        spec = linear.scheme.weights
        scale = in_features**-0.5 / _CODE_SPREAD[spec.bits]
        changes = {"codes": _codes(self._key(prefix), linear.codes.shape, str(linear.codes.dtype))}
        if linear.channel_scales is None:
            changes["scales"] = jnp.full_like(linear.scales, scale)
        else:  # the first level leaves about eight times the code
            changes["scales"] = jnp.full_like(linear.scales, 8)
            changes["channel_scales"] = jnp.full_like(linear.channel_scales, scale / 8)
        if linear.zeros is not None and linear.channel_scales is None:
            changes["zeros"] = jnp.full_like(linear.zeros, 1 << (spec.bits - 1))
        return dataclasses.replace(linear, **changes)


def _normal(key, shape, spread, dtype):
    draw = jax.jit(
        lambda key: (jax.random.normal(key, shape, dtype) * jnp.asarray(spread, dtype)).astype(
            dtype
        )
    )
    return draw(key)


def _codes(key, shape, dtype: str):
    """Uniform over all codes."""

    def draw(key):
        if dtype.endswith("4"):
            return (jax.random.bits(key, shape, jnp.uint8) & jnp.uint8(15)).astype(jnp.uint4)
        return jax.random.bits(key, shape, jnp.uint8)

    unsigned = jax.jit(draw)(key)
    return unsigned if dtype.startswith("u") else jax.lax.bitcast_convert_type(unsigned, dtype)


@dataclasses.dataclass(kw_only=True)
class RandomModel(language_model.LanguageModel):
    """A language model whose drafters are random too."""

    def drafter(self, spec):
        """A drafter of this shape; see `specjax.aot.shapes.drafter`."""
        if not isinstance(spec, dict):
            return super().drafter(spec)
        checkpoint = RandomCheckpoint(self.config, None, -1, self.module.dtype)
        return shapes.drafter(spec, checkpoint, self.module)


def load(
    shape: str,
    *,
    scheme: str | None,
    group_size: int,
    dtype: str,
    backend: dispatch.Backend,
    dequantize: str,
    command_buffers: CommandBuffers = "loop",
    num_layers: int | None = None,
) -> RandomModel:
    """A model of a real shape, prepared layer by layer; `num_layers` of them, default all.

    Raises:
        ConfigError: unknown shape or scheme, or a group size that does not fit.
    """
    config = shapes.lookup(shape)
    if num_layers is not None:
        config = dataclasses.replace(config, num_layers=num_layers)
    scheme = None if scheme in (None, "dense") else scheme
    checkpoint = RandomCheckpoint(config, scheme, group_size, dtype)
    preparation = Preparation(backend, dequantize, jnp.dtype(dtype))
    module = llama.build(checkpoint, jnp.dtype(dtype), preparation.layer)
    module = Llama(config, module.model, preparation.linear(module.lm_head))
    programs = Programs(command_buffers)
    return RandomModel(name=f"random:{shape}", config=config, module=module, programs=programs)


def prompt(length: int, vocab_size: int) -> list[int]:
    """Random token ids."""
    return jax.random.randint(jax.random.key(0), (length,), 0, vocab_size).tolist()


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """Accepts the deepest path of the tree up to a length drawn so that its mean is `mean`; costs what `Greedy` does.

    Attributes:
        mean: acceptance length, the bonus token included, as far as trees are that deep.
    """

    lossless: ClassVar[bool] = False
    reads_q: ClassVar[bool] = False
    mean: float

    def __call__(self, tree, q, logits, keys, sampling) -> base.Verified:
        """See `base.Acceptor`."""
        real = Greedy()(tree, q, logits, keys, sampling)
        found = base.deepest(tree, jnp.ones(tree.tokens.shape, bool))
        draws = jax.vmap(jax.random.uniform)(sample.wrap(keys))
        whole = int(self.mean)
        wanted = whole + (draws < self.mean - whole).astype(jnp.int32)
        length = jnp.clip(wanted, 1, found.length)
        # The bonus is the target's token after the last node that is kept, as it would be.
        best = sample.most_likely(logits)
        node = jnp.take_along_axis(found.path, length[:, None] - 1, axis=1)
        next_token = jnp.take_along_axis(best, node, axis=1)[:, 0]
        # Where nothing was drafted both rules agree; reading the real one keeps its work in the program.
        length = jnp.where(trees.num_draft_tokens(tree) > 0, length, real.length)
        return base.verified(tree, found.path, length, next_token)


def synthetic(mean: float) -> Synthetic:
    """The rule, checked.

    Raises:
        ConfigError: a mean below 1: every step yields a token.
    """
    if mean < 1:
        raise ConfigError(
            f"synthetic_acceptance={mean}: at least 1, since every step yields a token"
        )
    return Synthetic(mean)


def check(values: Any) -> None:
    """Checks the flags of random models against the others.

    Raises:
        ConfigError: they contradict each other.
    """
    if (values.model is None) == (values.random_weights is None):
        raise ConfigError("give either --model or --random_weights")
    if values.random_weights is None and values.synthetic_acceptance is not None:
        raise ConfigError(
            "--synthetic_acceptance needs --random_weights: real models have real rates"
        )
    if (values.random_weights is None) == (values.prompts_file is None):
        raise ConfigError(
            "--prompts_file belongs to --model; --random_weights makes prompts of --prompt_tokens"
        )
