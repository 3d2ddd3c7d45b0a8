"""config.json of draft heads in the speculators layout, as its own training code writes and reads it."""

import dataclasses
from typing import Any

from specjax.config import ModelConfig
from specjax.config.architectures import parts
from specjax.errors import ConfigError

# Class of a kind's model, which the layout states under `architectures`.
_CLASSES = {"eagle3": "Eagle3DraftModel", "peagle": "PEagleDraftModel", "mtp": "MTPDraftModel"}
_VERSION = "0.8.0"
_OF_THE_MODEL = ("architectures", "torch_dtype", "transformers_version")


def head_config(
    kind: str,
    layer: dict[str, Any],
    num_tokens: int,
    verifier: tuple[str, str | None],
    dtype: str,
    **settings: Any,
) -> dict[str, Any]:
    """The whole configuration.

    Args:
        kind: one of eagle3, peagle, mtp.
        layer: the decoder layers, as `layer_config` makes it.
        num_tokens: drafts of a round.
        verifier: the target's architecture, and its name or path where it is known.
        dtype: of the tensors.
        settings: the kind's own, e.g. draft_vocab_size and norm_before_residual.
    """
    architecture, name = verifier
    method = {"proposal_type": "greedy", "speculative_tokens": num_tokens}
    method |= {"accept_tolerance": 0.0, "verifier_accept_k": 1}
    return {
        "architectures": [_CLASSES[kind]],
        "speculators_model_type": kind,
        "speculators_version": _VERSION,
        "dtype": dtype,
        "tie_word_embeddings": False,
        **settings,
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {"architectures": [architecture], "name_or_path": name},
        },
    }


def layer_config(config: ModelConfig) -> dict[str, Any]:
    """`transformer_layer_config` of a head's layers.

    Raises:
        ConfigError: the layout cannot state them: layers of several windows.
    """
    windows = config.windows or (None,) * config.num_layers
    sizes = {window for window in windows if window is not None}
    if len(sizes) > 1:
        raise ConfigError(
            f"windows = {windows}: the speculators layout states one sliding_window for all layers"
        )
    # As the architectures read a configuration without windows.
    none = () if config.architecture == "LlamaForCausalLM" else (None,) * config.num_layers
    every = all(config.has_bias(name) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    mlp = all(config.has_bias(name) for name in ("gate_proj", "up_proj", "down_proj"))
    plain = dataclasses.replace(
        *(config,),
        **{"windows": none, "biases": None, "source": None, "depth": None},
        **{"qkv_bias": False, "o_bias": False, "mlp_bias": False, "tie_word_embeddings": False},
    )
    stated = {name: v for name, v in plain.to_hf().items() if name not in _OF_THE_MODEL}
    stated |= {"attention_bias": every} | ({"mlp_bias": mlp} if mlp else {})
    return stated | {
        "layer_types": [parts.FULL if window is None else parts.SLIDING for window in windows],
        "sliding_window": next(iter(sizes), None),
        "use_sliding_window": bool(sizes),
    }
