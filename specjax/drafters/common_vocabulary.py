"""Draft models padded to other vocabulary sizes than the target (Qwen2.5: 151,936 and 152,064 rows)."""

from dataclasses import replace

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from specjax.errors import ConfigError
from specjax.models.llama import Llama
from specjax.text import tokenizer

# Rows by which models of one family differ where their tokenizers are not there to compare (llama.cpp's limit).
_PADDING = 128


class CommonVocabulary(Llama):
    """A draft model that speaks of the target's tokens only: logits of its width, -inf where it has no row of its own.

    Attributes:
        rows: token ids below are common to both; the draft model drafts no others.
    """

    def __init__(self, draft: Llama, vocab_size: int):
        """Shares all arrays with `draft`; `vocab_size` is the target's."""
        config = replace(draft.config, vocab_size=vocab_size)
        super().__init__(config, draft.model, draft.lm_head, draft.depth)
        known = draft.rows if isinstance(draft, CommonVocabulary) else draft.config.vocab_size
        self.rows = min(known, vocab_size)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Output head on final-norm rows; float32, -inf for tokens that are not common."""
        own = super().logits(hidden)[..., : self.rows]
        missing = [(0, 0)] * (own.ndim - 1) + [(0, self.config.vocab_size - self.rows)]
        return jnp.pad(own, missing, constant_values=-jnp.inf)


class ClippedEmbedding(nnx.Module):
    """An embedding that takes ids beyond its table (the target may say them) as the last one."""

    def __init__(self, table):
        self.table = table

    @property
    def weight(self):
        return self.table.weight

    def __call__(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        return self.table(jnp.minimum(tokens, self.weight.shape[0] - 1))


def clip(draft: Llama) -> None:
    """Makes the embedding of a model that was loaded for drafting, and is nobody else's, take any id."""
    draft.model.embed_tokens = ClippedEmbedding(draft.model.embed_tokens)


def fitted(draft: Llama, vocab_size: int) -> Llama:
    """A draft model that drafts over a vocabulary of `vocab_size`."""
    return draft if draft.config.vocab_size == vocab_size else CommonVocabulary(draft, vocab_size)


def check(target, draft) -> None:
    """Refuses a draft model whose token ids mean something else.

    Args:
        target, draft: loaded models (`specjax.loading.LoadedModel`).
    Raises:
        ConfigError: the tokenizers differ, or are not known and the vocabularies differ by more than padding.
    """
    sizes = target.config.vocab_size, draft.config.vocab_size
    known = [tokenizer.usable(model.tokenizer) for model in (target, draft)]
    if None in known:
        if abs(sizes[0] - sizes[1]) > _PADDING:
            raise ConfigError(
                f"draft model {draft.name!r} has vocab_size {sizes[1]}, the target {target.name!r} has {sizes[0]}: "
                f"more than {_PADDING} rows of padding apart, and no tokenizers to compare; use a draft model of the "
                "same family"
            )
        return
    conflict = known[0].conflict(known[1])
    if conflict is not None:
        number, ours, theirs = conflict
        raise ConfigError(
            f"draft model {draft.name!r} has another tokenizer than the target {target.name!r}: token {number} is "
            f"{theirs!r} there and {ours!r} here; use a draft model of the same family"
        )
