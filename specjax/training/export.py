"""Trained heads as folders, which `specjax.drafters.head` opens again: in the upstream layouts, or in speculators'."""

from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from specjax.drafters import draft_vocabulary
from specjax.errors import ConfigError
from specjax.files import writer
from specjax.models.eagle3 import Eagle3Head, Variant
from specjax.models.llama import Llama
from specjax.models.medusa import MedusaHeads
from specjax.training import speculators
from specjax.training.speculators import layer_tensors, linear, norm

Layout = Literal["upstream", "speculators"]
_SHARD_BYTES = 5 << 30
_NUM_TOKENS = 5


def write(
    head,
    path: Path,
    *,
    dtype=jnp.bfloat16,
    ranking: draft_vocabulary.TokenRanking | None = None,
    facts: dict[str, Any],
    overwrite: bool,
    layout: Layout = "upstream",
    target: Llama | None = None,
    target_name: str | None = None,
    num_tokens: int = _NUM_TOKENS,
) -> None:
    """Writes config.json, the weights, and `facts` as training.json; the folder appears whole or not at all.

    Args:
        ranking: tokens that an EAGLE-1/2 head was trained to draft, written beside it; None is all.
        layout: "upstream" is the layout of EAGLE's and Medusa's own code; "speculators" takes EAGLE-3, P-EAGLE and MTP
            heads, of which upstream's holds the classic EAGLE-3 only.
        target: what the head drafts for; the speculators layout needs it.
        target_name: stated there as the verifier.
        num_tokens: stated there as the drafts of a round.

    Raises:
        CheckpointError: the folder exists and is not empty, and `overwrite` is not given.
        ConfigError: the layout cannot hold such a head.
    """
    medusa = isinstance(head, MedusaHeads)
    if layout == "speculators":
        if target is None:
            raise ConfigError(
                "layout='speculators': the target is needed, whose embeddings it stores"
            )
        stated = {"name": target_name, "num_tokens": num_tokens, "dtype": jnp.dtype(dtype).name}
        tensors, config = speculators.folder(head, target, **stated)
    else:
        tensors, config = _medusa(head) if medusa else _eagle(head), _config(head, dtype)
    cast = {name: _cast(array, dtype) for name, array in tensors.items()}
    with writer.whole_folder(path, overwrite) as folder:
        writer.write_shards(
            folder,
            cast.items(),
            shard_bytes=_SHARD_BYTES,
            header_bytes=writer.header_space(list(cast), 1),
        )
        if medusa:
            (folder / "model.safetensors").rename(folder / "medusa_lm_head.safetensors")
        writer.write_json(folder / "config.json", config)
        if ranking is not None:
            draft_vocabulary.write(ranking, folder / draft_vocabulary.FILE_NAME)
        writer.write_json(folder / "training.json", facts)


def _config(head, dtype) -> dict[str, Any]:
    if isinstance(head, MedusaHeads):
        return {"medusa_num_heads": len(head.heads), "medusa_num_layers": 1}
    config = head.config.to_hf() | {"num_hidden_layers": 1, "torch_dtype": jnp.dtype(dtype).name}
    if not isinstance(head, Eagle3Head):
        return config | {"bias": head.fc.bias is not None}
    return config | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": head.lm_head.out_features,
        "eagle_aux_hidden_state_layer_ids": list(head.needs),
    }


def _eagle(head) -> dict[str, Shaped[np.ndarray, "..."]]:
    if not isinstance(head, Eagle3Head):
        layer = head.layers[0]
        return linear("fc", head.fc) | layer_tensors("layers.0", layer, tuple(layer.norms()))
    if head.variant != Variant() or len(head.layers) or head.lm_head is None:
        raise ConfigError(
            f"layout='upstream' holds EAGLE-3 heads of one layer without {head.variant} and with an output head of "
            "their own; use layout='speculators'"
        )
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    tensors = linear("fc", head.fc) | layer_tensors("midlayer", head.midlayer, norms)
    tensors |= norm("norm", head.norm) | linear("lm_head", head.lm_head)
    if head.embed_tokens is not None:
        tensors["embed_tokens.weight"] = np.asarray(head.embed_tokens.weight[...])
    return tensors if head.d2t is None else tensors | speculators.draft_vocabulary(head)


def _medusa(heads: MedusaHeads) -> dict:
    tensors = {}
    for i, head in enumerate(heads.heads):
        tensors |= linear(f"{i}.0.linear", head.linear) | linear(f"{i}.1", head.lm_head)
    return tensors


def _cast(array: Shaped[np.ndarray, "..."], dtype) -> Shaped[np.ndarray, "..."]:
    floating = np.issubdtype(array.dtype, np.floating) or array.dtype == jnp.bfloat16
    return array.astype(jnp.dtype(dtype)) if floating else array
