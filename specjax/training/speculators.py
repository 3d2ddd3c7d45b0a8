"""EAGLE-3, P-EAGLE and MTP heads as the tensors and config.json of the speculators layout."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Shaped

from specjax.checkpoints import speculators as layout
from specjax.errors import ConfigError
from specjax.models.eagle3 import Eagle3Head
from specjax.models.llama import Llama
from specjax.models.mtp import MTPHead
from specjax.models.peagle import PEagleHead
from specjax.quant.dense_linear import Linear

_NORMS = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
Tensors = dict[str, Shaped[np.ndarray, "..."]]


def folder(
    head, target: Llama, *, name: str | None, num_tokens: int, dtype: str
) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a head and its config.json.

    Args:
        target: what it drafts for; the layout always stores embeddings, also where they are the target's.
        name: of the target.
        num_tokens: drafts of a round.
        dtype: of the tensors, for config.json.

    Raises:
        ConfigError: a head that the layout has no kind for, or whose weights are quantized.
    """
    verifier = target.config.architecture, name
    if isinstance(head, MTPHead):
        settings = {"num_nextn_predict_layers": 1}
        made, kind, config = _mtp(head), "mtp", head.config
    elif isinstance(head, Eagle3Head | PEagleHead):
        body = head.body if isinstance(head, PEagleHead) else head
        made, kind, config = _eagle3(body, target), "eagle3", body.config
        settings = dataclasses.asdict(body.variant) | {
            "draft_vocab_size": len(made["lm_head.weight"]),
            "eagle_aux_hidden_state_layer_ids": list(body.needs),
            "embed_requires_grad": False,
            "target_hidden_size": target.config.hidden_size,
        }
        if isinstance(head, PEagleHead):
            kind = "peagle"
            made["mask_hidden"] = np.asarray(head.mask_hidden[...])[None, None]
            settings["mask_token_id"] = head.mask_token
    else:
        raise ConfigError(
            f"the speculators layout has no {type(head).__name__}; it has EAGLE-3, P-EAGLE and MTP heads"
        )
    layer = layout.layer_config(config)
    return made, layout.head_config(kind, layer, num_tokens, verifier, dtype, **settings)


def _eagle3(head: Eagle3Head, target: Llama) -> Tensors:
    made = linear("fc", head.fc) | norm("norm", head.norm)
    own = head.embed_tokens is not None
    table = head.embed_tokens if own else target.model.embed_tokens
    made["embed_tokens.weight"] = np.asarray(table.weight[...])
    if head.lm_head is None:
        made["lm_head.weight"] = np.asarray(target.output_weight())
    else:
        made |= linear("lm_head", head.lm_head)
    made |= layer_tensors("layers.0", head.midlayer, _NORMS)
    for index, layer in enumerate(head.layers, 1):
        made |= layer_tensors(f"layers.{index}", layer, tuple(layer.norms()))
    if head.input_norm is not None:
        made |= norm("input_norm", head.input_norm)
    for index, each in enumerate(head.fc_norm):
        made |= norm(f"fc_norm.{index}", each)
    return made if head.d2t is None else made | draft_vocabulary(head)


def draft_vocabulary(head: Eagle3Head) -> Tensors:
    """The maps between the vocabularies: offsets of draft tokens, and which of the target's they are."""
    offsets = np.asarray(head.d2t[...], np.int64)
    chosen = np.zeros(head.config.vocab_size, bool)
    chosen[np.arange(len(offsets)) + offsets] = True
    return {"d2t": offsets, "t2d": chosen}


def _mtp(head: MTPHead) -> Tensors:
    prefix = "mtp_layers.0"
    made = linear(f"{prefix}.input_proj", head.input_proj)
    made |= layer_tensors(prefix, head.layer, tuple(head.layer.norms()))
    for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        made |= norm(f"{prefix}.{name}", getattr(head, name))
    if head.embed_tokens is not None:
        made["embed_tokens.weight"] = np.asarray(head.embed_tokens.weight[...])
    return made if head.lm_head is None else made | linear("lm_head", head.lm_head)


def layer_tensors(prefix: str, layer, norms: tuple[str, ...]) -> Tensors:
    """A decoder layer, with those of its norms that are named."""
    made, attention = {}, layer.self_attn
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        made |= linear(f"{prefix}.self_attn.{name}", getattr(attention, name))
    for name in ("q_norm", "k_norm"):
        if getattr(attention, name) is not None:
            made |= norm(f"{prefix}.self_attn.{name}", getattr(attention, name))
    for name in ("gate_proj", "up_proj", "down_proj"):
        made |= linear(f"{prefix}.mlp.{name}", getattr(layer.mlp, name))
    for name in norms:
        made |= norm(f"{prefix}.{name}", getattr(layer, name))
    return made


def linear(name: str, module) -> Tensors:
    """Weight and bias of a linear.

    Raises:
        ConfigError: its weights are quantized.
    """
    if not isinstance(module, Linear):
        raise ConfigError(f"{name} is a {type(module).__name__}: only dense heads can be written")
    made = {f"{name}.weight": np.asarray(module.weight[...])}
    return made if module.bias is None else made | {f"{name}.bias": np.asarray(module.bias[...])}


def norm(name: str, module) -> Tensors:
    """The gain of a norm."""
    return {f"{name}.weight": np.asarray(module.weight[...])}
