"""Where a file holds the parameters of a model: names of its architecture, prefixes of its tool, fused linears."""

import dataclasses
import functools
import re

from specjax.config import ModelConfig
from specjax.config.architectures import FUSED, Layout

_EMBEDDING = "model.embed_tokens.weight"
# What tools put in front of the language model's names or leave out: it holds vision models too, or is saved without
# its head.
_ROOTS = (
    ("", ""),
    ("", "language_model."),
    ("model.", "model.language_model."),
    ("model.", ""),
    ("transformer.", ""),
)
_LINEARS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_NORMS = (
    *("input_layernorm", "post_attention_layernorm", "attention_output_norm", "mlp_output_norm"),
    *("self_attn.q_norm", "self_attn.k_norm"),
)


def projections_of(config: ModelConfig) -> dict[str, str]:
    """The linears of a decoder layer: name of the leaf -> name below the layer."""
    names = {name.rpartition(".")[2]: name for name in _LINEARS}
    return {leaf: n for leaf, n in names.items() if config.gated_mlp or leaf != "gate_proj"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a linear lies.

    Attributes:
        prefix: of the stored linear.
        start: its first output in what is stored.
        total: outputs stored; None where it is stored by itself.
    """

    prefix: str
    start: int = 0
    total: int | None = None


class Names:
    """Names in a file by the library's names (see `specjax.config.architectures.Layout`).

    Attributes:
        layout: names of the architecture.
        stored: all names in the file.
    """

    def __init__(self, config: ModelConfig, stored):
        self._config = config
        self.layout: Layout = config.declaration.layout
        self.stored = frozenset(stored)
        self._prefixes = frozenset(name.rpartition(".")[0] for name in self.stored)
        wanted = self.layout.stored(_EMBEDDING)
        found = (root for root in _ROOTS if self._rooted(wanted, root) in self.stored)
        self._root = next(found, _ROOTS[0])

    @staticmethod
    def _rooted(name: str, root: tuple[str, str]) -> str:
        plain, stored = root
        return stored + name[len(plain) :] if name.startswith(plain) else name

    def __call__(self, name: str) -> str:
        """The name in the file of a parameter, or the prefix of a linear."""
        plain = self.layout.stored(name)
        # Vision models have their head in the language model or beside it.
        if plain.partition(".")[0] == "lm_head" and self.has_linear("lm_head"):
            return plain
        return self._rooted(plain, self._root)

    def has_linear(self, prefix: str) -> bool:
        """Whether any tensor of a linear is stored, by the linear's prefix in the file."""
        return prefix in self._prefixes

    def place(self, prefix: str) -> Place:
        """Where a linear lies: by itself, or as rows of a fused one."""
        own = self(prefix)
        if self.has_linear(own):
            return Place(prefix=own)
        parent, _, leaf = prefix.rpartition(".")
        parent, _, block = parent.rpartition(".")
        for fused in self.layout.fused:
            members = FUSED[fused]
            stored = self(f"{parent}.{fused}")
            if f"{block}.{leaf}" in members and self.has_linear(stored):
                sizes = [self.outputs(member) for member in members]
                index = members.index(f"{block}.{leaf}")
                return Place(prefix=stored, start=sum(sizes[:index]), total=sum(sizes))
        return Place(prefix=own)

    def outputs(self, leaf: str) -> int:
        """Outputs of a projection ("self_attn.q_proj") that may be fused."""
        config = self._config
        if leaf.startswith("mlp."):
            return config.intermediate_size
        heads = config.num_heads if leaf.endswith("q_proj") else config.num_kv_heads
        return heads * config.head_dim

    @functools.cached_property
    def _known(self) -> frozenset[str]:
        """Prefixes in the file of all that the model may have."""
        names = ["model.embed_tokens", "model.embed_positions", "model.norm", "lm_head"]
        for index in range(self._config.num_layers):
            leaves = (*_LINEARS, *self._layer_norms(), *FUSED)
            names += [f"model.layers.{index}.{leaf}" for leaf in leaves]
        return frozenset(map(self, names))

    def _layer_norms(self) -> tuple[str, ...]:
        config, found = self._config, []
        if config.norm_placement != "after":
            found += _NORMS[:2]
        if config.norm_placement != "before":
            found += _NORMS[2:4]
        return (*found, *(_NORMS[4:] if config.qk_norm is not None else ()))

    def knows(self, name: str) -> bool:
        """Whether a tensor, by its name in the file, is one that the model may have."""
        return name.rpartition(".")[0] in self._known

    def unread(self) -> list[str]:
        """Tensors that the model has no use for, without buffers, sorted."""
        layers = re.escape(self("model.layers.0.")[: -len("0.")])
        router = re.compile(rf"{layers}\d+\.router\..+")
        skipped = re.compile(self.layout.buffers)
        return sorted(
            name
            for name in self.stored
            if not self.knows(name)
            and not skipped.fullmatch(name)
            and not (self._config.depth is not None and router.fullmatch(name))
        )

    def in_layers(self, name: str) -> bool:
        """Whether a tensor is one of a decoder layer's."""
        return name.startswith(self("model.layers.0.")[: -len("0.")])
