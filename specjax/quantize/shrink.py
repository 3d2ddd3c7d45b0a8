"""Cheaper draft heads: an output head over a reduced vocabulary, and int8 weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax.errors import ConfigError
from specjax.models.eagle import EagleHead
from specjax.models.eagle3 import Eagle3Head
from specjax.models.llama import Llama, dense_weight
from specjax.models.prepare import Preparation
from specjax.quant import scheme as schemes
from specjax.quant.dense_linear import Linear
from specjax.quantize import rtn

SCHEMES = ("w8a16",)


def output_rows(
    head: EagleHead, target: Llama, ids: Int[Array, "U"] | None = None
) -> Float[Array, "U D"]:
    """Rows `ids` (None: all) of the matrix that turns the head's features into logits, in the compute dtype."""
    table = (
        target.output_weight() if head.lm_head is None else dense_weight(head.lm_head, target.dtype)
    )
    return (table if ids is None else jnp.take(table, ids, axis=0)).astype(target.dtype)


def with_vocabulary(head: EagleHead | Eagle3Head, target: Llama, ids: Int[Array, "U"]) -> EagleHead:
    """The head with its own output head over the target tokens `ids` (ascending); other arrays are shared.

    Raises:
        ConfigError: the head is of EAGLE-3, which is trained for a draft vocabulary of its own.
    """
    if not isinstance(head, EagleHead) or head.draft_ids is not None:
        raise ConfigError(
            "vocabulary: this head has a draft vocabulary of its own, which it was trained for; leave "
            "'vocabulary' and 'vocabulary_size' out"
        )
    rows = Linear(output_rows(head, target, ids))
    return _replaced(head, lm_head=rows, draft_ids=ids)


def quantized(head: EagleHead | Eagle3Head, target: Llama, scheme: str):
    """The head with its linears and its output head rounded to nearest under `scheme`.

    The output head becomes the draft's own (the target's stays as it is). What runs follows the backend, as for
    targets: on CPUs weight-only codes become dense again at load, so there it costs memory and gains nothing.

    Raises:
        ConfigError: a scheme that draft heads do not take.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"scheme={scheme!r} of a draft head: supported are {', '.join(SCHEMES)}")
    found = schemes.lookup(scheme)
    preparation = Preparation(target.backend, "auto", target.dtype)

    def rounded(node):
        if not isinstance(node, Linear):
            return node
        bias = None if node.bias is None else node.bias[...]
        return preparation.linear(rtn.quantize(node.weight[...], found, bias=bias))

    def all_rounded(module):
        return jax.tree.map(rounded, module, is_leaf=lambda node: isinstance(node, Linear))

    if isinstance(head, Eagle3Head):
        return all_rounded(head)
    # The rotation of a head for a rotated target only turns features; it stays exact.
    return _replaced(
        head,
        fc=all_rounded(head.fc),
        layer=all_rounded(head.layers[0]),
        lm_head=all_rounded(Linear(output_rows(head, target))),
    )


def _replaced(head: EagleHead, **changes) -> EagleHead:
    """The head with other parts; the parts that stay are shared."""
    parts = {
        "fc": head.fc,
        "layer": head.layers[0],
        "embed_tokens": head.embed_tokens,
        "lm_head": head.lm_head,
        "rotation": head.rotation,
        "draft_ids": None if head.draft_ids is None else head.draft_ids[...],
    }
    return EagleHead(head.config, **{**parts, **changes})
