"""What DSpark adds to a block of drafts: a term that depends on the token drafted before, and how sure a draft is."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from specjax.models import layers as nn
from specjax.quant.dense_linear import Linear

Kind = Literal["vanilla", "gated", "rnn"]
KINDS: tuple[Kind, ...] = ("vanilla", "gated", "rnn")


class Markov(nnx.Module):
    """A low-rank term of the logits of a slot, given the token before it.

    Attributes:
        kind: "vanilla" is w2 w1[token]; "gated" gates w1[token] by the slot's state; "rnn" also carries a state of its
            own from slot to slot.
        w1: embedding of tokens of the target [V, R].
        w2: from rank R to the draft vocabulary [U, R].
        mix: of [state; w1[token]] to a gate ("gated"), or of [own state; w1[token]; state] to gate, candidate and
            output ("rnn"); None for "vanilla".
    """

    def __init__(self, kind: Kind, w1: nn.Embedding, w2: Linear, mix: Linear | None = None):
        self.kind, self.w1, self.w2, self.mix = kind, w1, w2, mix

    def begin(self, hidden: Float[Array, "B D"]) -> Float[Array, "B R"]:
        """What is carried into the first slot."""
        return jnp.zeros((hidden.shape[0], self.w1.weight.shape[1]), hidden.dtype)

    def __call__(
        self, carry: Float[Array, "B R"], hidden: Float[Array, "B D"], previous: Int[Array, "B"]
    ) -> tuple[Float[Array, "B R"], Float[Array, "B U"]]:
        """(what is carried on, the term in float32) of a slot with state `hidden` behind the token `previous`."""
        row = self.w1(previous).astype(hidden.dtype)
        if self.kind == "gated":
            row = row * jax.nn.sigmoid(self.mix(jnp.concatenate([hidden, row], axis=-1)))
        elif self.kind == "rnn":
            mixed = self.mix(jnp.concatenate([carry, row, hidden], axis=-1))
            gate, candidate, output = jnp.split(mixed, 3, axis=-1)
            gate = jax.nn.sigmoid(gate)
            carry = gate * carry + (1 - gate) * jnp.tanh(candidate)
            row = jnp.tanh(output)
        return carry, self.w2(row).astype(jnp.float32)


class Confidence(nnx.Module):
    """How probable it is that the target keeps a draft, given that it kept those before.

    Attributes:
        proj: from the slot's state, with `w1` from [state; w1[token before]], to a logit.
        w1: see `Markov`; None: the state alone is read.
    """

    def __init__(self, proj: Linear, w1: nn.Embedding | None):
        self.proj, self.w1 = proj, w1

    def __call__(self, hidden: Float[Array, "B D"], previous: Int[Array, "B"]) -> Float[Array, "B"]:
        """The logit of that probability; float32."""
        if self.w1 is not None:
            hidden = jnp.concatenate([hidden, self.w1(previous).astype(hidden.dtype)], axis=-1)
        return self.proj(hidden)[..., 0].astype(jnp.float32)
