"""Which drafters are compared: those that flags or a file name, or all that a model has."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from specjax import checkpoints
from specjax.checkpoints.head_folder import HeadFolder
from specjax.drafters import head, registry
from specjax.errors import CheckpointError, ConfigError
from specjax.files import base as file_base
from specjax.files import hub
from specjax.quant import view
from specjax.quant.linear import QuantizedLinear

# Cheaper activations over the same codes, by bits of the weights.
_CHEAPER = {4: ("w4a8", "w4a4"), 8: ("w8a8",)}


def chosen(values: flags.FlagValues) -> list[dict[str, Any]]:
    """The specs of --drafters or --drafters_file, `none` first, without repetitions.

    Raises:
        ConfigError: neither or both flags, a malformed file, or a spec that is none.
    """
    if (values.drafters is None) == (values.drafters_file is None):
        raise ConfigError("give either --drafters=NAME,NAME or --drafters_file=FILE")
    if values.draft_checkpoints and values.drafters != ["all"]:
        raise ConfigError("--draft_checkpoints are for --drafters=all")
    if values.drafters == ["all"]:
        if values.model is None:
            raise ConfigError("--drafters=all needs --model")
        specs = available(values.model, values.draft_checkpoints, values.dequantize)
    elif values.drafters is not None:
        specs = [registry.parse(name) for name in values.drafters]
    else:
        try:
            specs = json.loads(Path(values.drafters_file).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{values.drafters_file}: not valid JSON: {error}") from None
        if not isinstance(specs, list):
            raise ConfigError(f"{values.drafters_file}: expected a list of drafter specs")
        specs = [registry.parse(spec) if isinstance(spec, str) else spec for spec in specs]
        for spec in specs:
            registry.check(spec)
    unique = []
    for spec in [{"kind": "none"}, *specs]:
        if spec not in unique:
            unique.append(spec)
    return unique


def available(
    model: str, draft_checkpoints: Sequence[str] = (), dequantize: str = "auto"
) -> list[dict[str, Any]]:
    """Specs of `none`, `ngram`, the head that ships for the model, `self` where its codes are kept, and the drafters
    that checkpoints make possible: `eagle`, `medusa` or `head` for heads, `lm` and `hierarchical` for models.

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
    """The drafter that a checkpoint is for: "eagle", "medusa", "head" (other kinds of heads) or "lm".

    Raises:
        FileNotFoundError, CheckpointError: it is none of them.
    """
    path = hub.resolve(checkpoint)
    if path.is_file():
        return "lm"
    config = file_base.read_json(path / "config.json")
    if "medusa_num_heads" in config:
        return "medusa"
    folder = HeadFolder(path)
    found = head.find_kind(folder)
    if found is not None:
        return found if found in ("eagle", "medusa") else "eagle" if found == "eagle3" else "head"
    if any(name.startswith("model.layers.0.self_attn.") for name in folder.names):
        return "lm"
    raise CheckpointError(f"{path}: neither a draft head nor a language model")
