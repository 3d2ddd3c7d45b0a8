"""Every way of drafting that a model has."""

from collections.abc import Sequence
from typing import Any

import jax

from specjax import checkpoints
from specjax.errors import CheckpointError
from specjax.files import base as file_base
from specjax.files import hub, source
from specjax.quant import view
from specjax.quant.linear import QuantizedLinear

# Cheaper activations over the same codes, by bits of the weights.
_CHEAPER = {4: ("w4a8", "w4a4"), 8: ("w8a8",)}


def available(
    model: str, draft_checkpoints: Sequence[str] = (), dequantize: str = "auto"
) -> list[dict[str, Any]]:
    """Specs of `none`, `ngram`, the head that ships for the model, `self` where its codes are kept, and the drafters
    that checkpoints make possible: `eagle` or `medusa` for heads, `lm` and `hierarchical` for models.

    Args:
        model: path or name of the target.
        draft_checkpoints: paths or names of heads and draft models.
        dequantize: as in `specjax.load`. Self-speculation needs codes; where the backend would make them dense, it
            would slow plain decoding down, so there it is left out unless this is "fold" or "never".
    Raises:
        FileNotFoundError, CheckpointError: a checkpoint cannot be read.
    """
    specs: list[dict[str, Any]] = [{"kind": "none"}, {"kind": "ngram"}]
    if hub.shipped_head(model) is not None:
        specs.append({"kind": "eagle"})
    keeps_codes = dequantize in ("fold", "never") or (
        dequantize == "auto" and jax.default_backend() != "cpu"
    )
    linear = first_linear(model)
    if keeps_codes and linear is not None and linear.scheme.weights.kind == "int":
        schemes = _CHEAPER.get(linear.scheme.weights.bits, ())
        specs += [{"kind": "self", "scheme": scheme} for scheme in schemes]
    for checkpoint in draft_checkpoints:
        kind = kind_of(checkpoint)
        specs.append({"kind": kind, "model": checkpoint})
        if kind == "lm":
            inner = {"kind": "ngram"}
            specs.append({"kind": "hierarchical", "model": checkpoint, "inner": inner})
    return specs


def first_linear(model: str) -> QuantizedLinear | None:
    """The first linear of a checkpoint's first layer as it is stored; None for dense checkpoints."""
    checkpoint = checkpoints.open_checkpoint(hub.resolve(model))
    config = checkpoint.config
    linear = checkpoint.linear(
        "model.layers.0.self_attn.q_proj",
        config.num_heads * config.head_dim,
        config.hidden_size,
        config.qkv_bias,
    )
    found = view.quantized_linears(linear)
    return found[0][1] if found else None


def kind_of(checkpoint: str) -> str:
    """The drafter that a checkpoint is for: "eagle", "medusa" or "lm".

    Raises:
        FileNotFoundError, CheckpointError: it is none of them.
    """
    path = hub.resolve(checkpoint)
    if path.is_file():
        return "lm"
    config = file_base.read_json(path / "config.json")
    if "medusa_num_heads" in config:
        return "medusa"
    names = set(source.open_source(path).names())
    if "model.embed_tokens.weight" in names and "model.layers.0.self_attn.q_proj.weight" in names:
        return "lm"
    if "fc.weight" in names:
        return "eagle"
    if any(name.startswith("model.layers.0.self_attn.") for name in names):
        return "lm"
    raise CheckpointError(f"{path}: neither a draft head (EAGLE, Medusa) nor a language model")
