"""Routed depth in numpy float64: every layer over the whole text, hard masks, keys of skipping tokens evicted."""

import numpy as np

from specjax.depth.routed import Routed
from tests import oracle


class Reference(oracle.Oracle):
    """A routed model by its parameters and its routers."""

    def __init__(self, params, config, depth: Routed):
        super().__init__(params, config)
        self.depth = depth

    def decisions(self, index: int, x):
        """Which tokens run through a layer."""
        start = self.depth.config.start_layer
        if index < start:
            return np.ones(len(x), bool)
        router = self.depth.routers[index - start]
        up, down = (
            {"weight": np.asarray(part.weight[...], np.float64), "bias": np.asarray(part.bias[...])}
            for part in (router.up_proj, router.down_proj)
        )
        if router.code_bits is not None:
            low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
            levels = 2**router.code_bits - 1
            x = np.clip(np.round((x - low) / ((high - low) / levels + 1e-7)), 0, levels)
        hidden = x @ up["weight"].T + up["bias"]
        hidden = oracle.rms_norm(hidden, np.asarray(router.norm.weight[...]), router.norm.eps)
        logits = (hidden / (1 + np.exp(-hidden))) @ down["weight"].T + down["bias"]
        return (logits[:, 1] >= logits[:, 0]) | (
            np.arange(len(x)) < self.depth.config.reserved_tokens
        )

    def routed(self, tokens):
        """Logits [T, V], and which tokens ran through which layers [L, T]."""
        x = self.get("model.embed_tokens.weight")[np.asarray(tokens)]
        positions, executed = np.arange(len(x)), []
        for index in range(self.config.num_layers):
            runs = self.decisions(index, x)
            # Its own key keeps the row of a skipping token from being empty; what it yields is not used.
            visible = oracle.causal(len(x)) & (runs | np.eye(len(x), dtype=bool))
            y = self.layer(x, f"model.layers.{index}", positions, visible)
            x = np.where(runs[:, None], y, x)
            executed.append(runs)
        hidden = oracle.rms_norm(x, self.get("model.norm.weight"), self.config.rms_norm_eps)
        return self.head(hidden), np.asarray(executed)

    def greedy(self, text, count: int):
        """`count` greedy tokens after a text."""
        text = list(text)
        for _ in range(count):
            text.append(int(np.argmax(self.routed(text)[0][-1])))
        return text[-count:]
