"""EAGLE-3's variants against numpy: norms, several layers, windows, and chains that feed the head its own output."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.models import cache as kv
from specjax.models import eagle3, layers
from specjax.models.eagle3 import Variant
from tests import oracle, tiny

LENGTH, DRAFTS, WINDOW = 9, 3, 5
VARIANTS = {
    "classic": Variant(),
    "normed residual, fc_norm, normed output": Variant(
        norm_before_residual=True, fc_norm=True, norm_output=True
    ),
    "norm before fc, normed output": Variant(norm_before_fc=True, norm_output=True),
}


@pytest.fixture(autouse=True)
def hurry(hurried):
    """Numbers are compared within a tolerance that holds with fewer optimizations too."""


class Reference(oracle.Oracle):
    """The head's formulas over whole texts, row by row of a chain."""

    def __init__(self, params, config, variant: Variant, table):
        super().__init__(params, config)
        self.variant, self.table = variant, np.asarray(table, np.float64)

    def norm(self, x, name):
        return oracle.rms_norm(x, self.get(f"{name}.weight"), self.config.rms_norm_eps)

    def fuse(self, features):
        if self.variant.norm_before_fc:
            features = self.norm(features, "input_norm")
        if self.variant.fc_norm:
            parts = np.split(features, 2, axis=-1)
            normed = [self.norm(x, f"fc_norm.{j}") for j, x in enumerate(parts)]
            features = np.concatenate(normed, axis=-1)
        return self.linear(features, "fc")

    def rows(self, hidden, tokens):
        """Output of every row; each sees those before it, in its layer's window."""
        positions = np.arange(len(tokens))
        visible = oracle.causal(len(tokens))
        normed = self.norm(hidden, "layers.0.hidden_norm")
        embedded = self.norm(self.table[tokens], "layers.0.input_layernorm")
        pair = np.concatenate([embedded, normed], axis=-1)
        residual = normed if self.variant.norm_before_residual else hidden
        x = residual + self.attention(pair, "layers.0.self_attn", positions, visible)
        y = self.norm(x, "layers.0.post_attention_layernorm")
        gate, up = (self.linear(y, f"layers.0.mlp.{name}_proj") for name in ("gate", "up"))
        x = x + self.linear(gate / (1 + np.exp(-gate)) * up, "layers.0.mlp.down_proj")
        near = visible & (positions > positions[:, None] - WINDOW)
        return self.layer(x, "layers.1", positions, near)

    def chain(self, features, tokens, drafts):
        """Logits [DRAFTS, U], one draft after the other."""
        hidden, logits = self.fuse(features), []
        for index in range(DRAFTS):
            out = self.rows(hidden, tokens)[-1]
            normed = self.norm(out, "norm")
            logits.append(normed @ self.get("lm_head.weight").T)
            fed = normed if self.variant.norm_output else out
            hidden = np.concatenate([hidden, fed[None]])
            tokens = np.append(tokens, drafts[index])
        return np.stack(logits)


@jax.jit
def chain(head, target, features, tokens, drafts):
    """The same through the head's cache."""
    cache = kv.init(head.config, 1, 32, head.dtype, num_layers=head.num_layers)
    block = layers.causal_block(tokens, jnp.zeros((1,), jnp.int32))
    rows, cache = head(head.fuse(features), block, cache, target)
    row, logits = rows[:, -1:], []
    for index in range(DRAFTS):
        logits.append(head.logits(row[:, 0], target))
        start = jnp.full((1,), LENGTH + index, jnp.int32)
        block = layers.causal_block(drafts[:, index : index + 1], start)
        row, cache = head(row, block, cache, target)
    return jnp.stack(logits, axis=1)


# Recorded rounds of upstream code have the others, without a second layer and its window.
FAST = "normed residual, fc_norm, normed output"


@pytest.mark.parametrize(
    "name", [n if n == FAST else pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS]
)
def test_chains_are_the_formulas(name):
    config = dataclasses.replace(tiny.config(), num_layers=2, windows=(None, WINDOW))
    source, target = tiny.RandomCheckpoint(config, 5), tiny.model(tiny.config(num_layers=1))
    sizes = {"target_width": config.hidden_size, "num_drafts": 12}
    made = eagle3.build(source, jnp.float32, layer_ids=(0, 1), variant=VARIANTS[name], **sizes)
    rng = np.random.default_rng(1)
    features = rng.standard_normal((LENGTH, 2 * config.hidden_size)).astype(np.float32)
    tokens, drafts = (rng.integers(0, config.vocab_size, n) for n in (LENGTH, DRAFTS))
    table = target.model.embed_tokens.weight[...]
    expected = Reference(source.params, config, VARIANTS[name], table).chain(
        *(features, tokens, drafts)
    )
    given = (jnp.asarray(x, d)[None] for x, d in ((features, jnp.float32), (tokens, jnp.int32)))
    found = chain(made, target, *given, jnp.asarray(drafts, jnp.int32)[None])[0]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
