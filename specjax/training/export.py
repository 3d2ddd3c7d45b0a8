"""Trained heads as folders in the upstream layouts, which `specjax.checkpoints.heads` reads again."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from specjax.drafters import draft_vocabulary
from specjax.files import writer
from specjax.models import layers
from specjax.models.eagle3 import Eagle3Head
from specjax.models.medusa import MedusaHeads
from specjax.quant.dense_linear import Linear

_SHARD_BYTES = 5 << 30


def write(
    head,
    path: Path,
    *,
    dtype=jnp.bfloat16,
    ranking: draft_vocabulary.TokenRanking | None = None,
    facts: dict[str, Any],
    overwrite: bool,
) -> None:
    """Writes config.json, the weights, and `facts` as training.json; the folder appears whole or not at all.

    Args:
        ranking: tokens that an EAGLE-1/2 head was trained to draft, written beside it; None is all.

    Raises:
        CheckpointError: the folder exists and is not empty, and `overwrite` is not given.
    """
    medusa = isinstance(head, MedusaHeads)
    tensors = _medusa(head) if medusa else _eagle(head)
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
        writer.write_json(folder / "config.json", _config(head, dtype))
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
    tensors = _linear("fc", head.fc)
    if not isinstance(head, Eagle3Head):
        return tensors | _layer("layers.0", head.layers[0])
    tensors |= _layer("midlayer", head.midlayer)
    tensors |= _norm("midlayer.hidden_norm", head.midlayer.hidden_norm)
    tensors |= _norm("norm", head.norm) | _linear("lm_head", head.lm_head)
    if head.d2t is not None:
        offsets = np.asarray(head.d2t[...], np.int64)
        chosen = np.zeros(head.config.vocab_size, bool)
        chosen[np.arange(len(offsets)) + offsets] = True
        tensors |= {"d2t": offsets, "t2d": chosen}
    return tensors


def _layer(prefix: str, layer) -> dict:
    tensors = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        tensors |= _linear(f"{prefix}.self_attn.{name}", getattr(layer.self_attn, name))
    for name in ("gate_proj", "up_proj", "down_proj"):
        tensors |= _linear(f"{prefix}.mlp.{name}", getattr(layer.mlp, name))
    for name in ("input_layernorm", "post_attention_layernorm"):
        if getattr(layer, name) is not None:
            tensors |= _norm(f"{prefix}.{name}", getattr(layer, name))
    return tensors


def _medusa(heads: MedusaHeads) -> dict:
    tensors = {}
    for i, head in enumerate(heads.heads):
        tensors |= _linear(f"{i}.0.linear", head.linear) | _linear(f"{i}.1", head.lm_head)
    return tensors


def _linear(name: str, linear: Linear) -> dict:
    tensors = {f"{name}.weight": np.asarray(linear.weight[...])}
    return (
        tensors if linear.bias is None else tensors | {f"{name}.bias": np.asarray(linear.bias[...])}
    )


def _norm(name: str, norm: layers.RMSNorm) -> dict:
    return {f"{name}.weight": np.asarray(norm.weight[...])}


def _cast(array: Shaped[np.ndarray, "..."], dtype) -> Shaped[np.ndarray, "..."]:
    floating = np.issubdtype(array.dtype, np.floating)
    return array.astype(jnp.dtype(dtype)) if floating else array
