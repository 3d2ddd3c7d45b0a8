"""The tokens over which a head's loss is taken, and the target's logits of them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.models.llama import Llama


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The tokens over which the loss is taken.

    Attributes:
        ids: token ids, ascending.
        index: place of each token id in `ids`, or -1.
        output: rows of the target's output head for `ids`.
    """

    ids: Int[Array, "U"]
    index: Int[Array, "V"]
    output: Float[Array, "U D"]


def of_target(target: Llama, ids: Int[np.ndarray, "U"]) -> Vocabulary:
    """The rows of the target's output head for these tokens."""
    index = np.full(target.config.vocab_size, -1, np.int32)
    index[ids] = np.arange(len(ids))
    output = target.output_weight()[jnp.asarray(ids)]
    return Vocabulary(ids=jnp.asarray(ids), index=jnp.asarray(index), output=output)


def logits(vocab: Vocabulary, features: Float[Array, "B T D"]) -> Float[Array, "B T U"]:
    """Logits of the target's output head, which is not trained; float32."""
    return _frozen_matmul(features.astype(vocab.output.dtype), vocab.output)


@jax.custom_vjp
def _frozen_matmul(x: Float[Array, "B T D"], weight: Float[Array, "U D"]) -> Float[Array, "B T U"]:
    """x W^T in float32. Backwards, too, both factors have the compute dtype, where JAX would multiply in float32."""
    return jnp.einsum("btd,ud->btu", x, weight, preferred_element_type=jnp.float32)


def _frozen_forward(x, weight):
    return _frozen_matmul(x, weight), weight


def _frozen_backward(weight, gradient):
    return gradient.astype(weight.dtype) @ weight, jnp.zeros_like(weight)


_frozen_matmul.defvjp(_frozen_forward, _frozen_backward)
