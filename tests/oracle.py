"""Llama and EAGLE-1/2 heads in numpy float64, written from the papers' formulas: what the tests compare with.

One sequence at a time, no cache: attention takes a [T, T] visibility matrix, so that trees are the general case.
"""

import math

import numpy as np


def inv_freq(rope, head_dim: int) -> np.ndarray:
    """Angle per position of each rotated pair; llama3 scaling by wavelength, as its paper's code states it."""
    plain = 1.0 / rope.theta ** (np.arange(0, head_dim, 2) / head_dim)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "default":
        return plain
    original = rope.original_max_position_embeddings
    scaled = []
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength < original / rope.high_freq_factor:
            scaled.append(frequency)
        elif wavelength > original / rope.low_freq_factor:
            scaled.append(frequency / rope.factor)
        else:
            smooth = (original / wavelength - rope.low_freq_factor) / (
                rope.high_freq_factor - rope.low_freq_factor
            )
            scaled.append((1 - smooth) * frequency / rope.factor + smooth * frequency)
    return np.asarray(scaled)


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms_norm(x, gain, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * gain


def rotate(x, positions, frequencies):
    """Rotary embedding of [T, heads, C], pairs (i, i + C/2)."""
    angles = positions[:, None] * frequencies
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def causal(length: int) -> np.ndarray:
    """Visibility of plain text."""
    return np.tril(np.ones((length, length), bool))


class Oracle:
    """Forward passes over parameters given by Hugging Face name.

    Args:
        params: name -> array; converted to float64 on use.
        config: `specjax.config.ModelConfig`.
    """

    def __init__(self, params, config):
        self.params, self.config = params, config

    def get(self, name):
        return np.asarray(self.params[name], np.float64)

    def linear(self, x, prefix):
        y = x @ self.get(f"{prefix}.weight").T
        return y + self.get(f"{prefix}.bias") if f"{prefix}.bias" in self.params else y

    def attention(self, x, prefix, positions, visible):
        c = self.config
        frequencies = inv_freq(c.rope, c.head_dim)
        q, k, v = (
            self.linear(x, f"{prefix}.{name}_proj").reshape(len(x), -1, c.head_dim)
            for name in "qkv"
        )
        q, k = rotate(q, positions, frequencies), rotate(k, positions, frequencies)
        out = np.empty_like(q)
        for head in range(c.num_heads):
            shared = head // (c.num_heads // c.num_kv_heads)
            scores = q[:, head] @ k[:, shared].T / math.sqrt(c.head_dim)
            out[:, head] = softmax(np.where(visible, scores, -np.inf)) @ v[:, shared]
        return self.linear(out.reshape(len(x), -1), f"{prefix}.o_proj")

    def layer(self, x, prefix, positions, visible, normed=True):
        """One decoder layer; `normed` False leaves the input norm out (EAGLE-1/2)."""
        c = self.config
        y = (
            rms_norm(x, self.get(f"{prefix}.input_layernorm.weight"), c.rms_norm_eps)
            if normed
            else x
        )
        x = x + self.attention(y, f"{prefix}.self_attn", positions, visible)
        y = rms_norm(x, self.get(f"{prefix}.post_attention_layernorm.weight"), c.rms_norm_eps)
        gate, up = (self.linear(y, f"{prefix}.mlp.{name}_proj") for name in ("gate", "up"))
        return x + self.linear(gate / (1 + np.exp(-gate)) * up, f"{prefix}.mlp.down_proj")

    def llama(self, tokens, positions=None, visible=None):
        """Logits [T, V] and final-norm rows [T, D]; plain text by default."""
        tokens = np.asarray(tokens)
        positions = np.arange(len(tokens)) if positions is None else positions
        visible = causal(len(tokens)) if visible is None else visible
        x = self.get("model.embed_tokens.weight")[tokens]
        for index in range(self.config.num_layers):
            x = self.layer(x, f"model.layers.{index}", positions, visible)
        hidden = rms_norm(x, self.get("model.norm.weight"), self.config.rms_norm_eps)
        return self.head(hidden), hidden

    def head(self, hidden):
        tied = self.config.tie_word_embeddings
        return hidden @ self.get("model.embed_tokens.weight" if tied else "lm_head.weight").T

    def eagle(self, features, tokens, table, positions=None, visible=None):
        """Predicted features [T, D] of an EAGLE-1/2 head: row t joins feature t and the token after it.

        Args:
            table: the target's embedding [V, D].
        """
        positions = np.arange(len(tokens)) if positions is None else positions
        visible = causal(len(tokens)) if visible is None else visible
        pair = np.concatenate(
            [np.asarray(table, np.float64)[np.asarray(tokens)], features], axis=-1
        )
        return self.layer(self.linear(pair, "fc"), "layers.0", positions, visible, normed=False)
