"""What a declaration of an architecture says: how config fields become settings, and what tensors are called."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

Settings = dict[str, Any]
NOTHING: Mapping[str, Any] = MappingProxyType({})

# Linears that files may store as one, by the name of the fused one: their rows stand below each other.
FUSED = MappingProxyType(
    {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names of the tensors in files, where they are not Llama's.

    Everywhere else parameters have the names of this library: Llama's, with `attention_output_norm` and
    `mlp_output_norm` for norms behind a block, and `model.embed_positions` for learned positions.

    Attributes:
        prefixes: stored beginnings of names by the library's ("model.layers" -> "transformer.h").
        leaves: stored names of what a layer holds, by the library's.
        fused: linears that the files hold as one, by the library's name of the fused one.
        transposed: dense weights are [in, out] (Conv1D).
        buffers: names in files that hold no parameter and may be left unread.
    """

    prefixes: Mapping[str, str] = NOTHING
    leaves: Mapping[str, str] = NOTHING
    fused: tuple[str, ...] = ()
    transposed: bool = False
    buffers: str = r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)"

    def stored(self, name: str) -> str:
        """The name in files of a parameter or linear, given by the library's name."""
        match = re.fullmatch(r"(model\.layers\.\d+\.)(.+)", name)
        if match:
            leaf = next(
                (
                    found + match[2][len(own) :]
                    for own, found in self.leaves.items()
                    if match[2] == own or match[2].startswith(f"{own}.")
                ),
                match[2],
            )
            name = match[1] + leaf
        for own, found in self.prefixes.items():
            if name == own or name.startswith(f"{own}."):
                return found + name[len(own) :]
        return name


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One class of models.

    Attributes:
        name: of the class in transformers, as `architectures` of a config.json says it.
        model_type: as config.json says it.
        settings: the fields of `ModelConfig` that this architecture decides, from the fields of a config.json.
        aliases: its names of generic fields, by these ("hidden_size" -> "n_embd").
        defaults: values of generic fields that a config.json may leave out.
        layout: names of tensors.
        also: other classes and model types that are the same language model.
        note: what README's table says of it.
    """

    name: str
    model_type: str
    settings: Callable[[Settings], Settings]
    aliases: Mapping[str, str] = NOTHING
    defaults: Mapping[str, Any] = NOTHING
    layout: Layout = field(default_factory=Layout)
    also: tuple[str, ...] = ()
    note: str = ""
