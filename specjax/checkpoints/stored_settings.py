"""What is stored decides: the settings of a configuration that the tensors of its files contradict.

Where a flag and the file disagree, what is there is loaded and a warning says so once; where that cannot be right, the
tensor is named in an error.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np

from specjax.checkpoints import tensors
from specjax.checkpoints.names import Names, projections_of
from specjax.config import ModelConfig
from specjax.config.fields import homes
from specjax.errors import CheckpointError
from specjax.files.base import TensorSource
from specjax.files.source import RecordedSource

_HEAD, _EMBEDDING = "lm_head", "model.embed_tokens.weight"

_log = logging.getLogger(__name__)


def settled(
    path: Path, config: ModelConfig, hf_config: dict[str, Any], source: TensorSource
) -> ModelConfig:
    """The configuration with what is stored: tied heads, biases; refuses tensors that nothing would read.

    Raises:
        CheckpointError: a tensor of the model is missing in some layers or from the file that an index states, or it
            is there and has no place in the model.
    """
    names = Names(config, source.names())
    if isinstance(source, RecordedSource):
        tied = {f"{names(_HEAD)}.weight"} if config.tie_word_embeddings else ()
        source.check_held(lambda name: names.knows(name) and name not in tied)
    _check_unread(path, config, names)
    config = _with_head(path, config, hf_config, source, names)
    return _with_biases(path, config, source, names)


def _check_unread(path: Path, config: ModelConfig, names: Names) -> None:
    for name in names.unread():
        if names.in_layers(name) and name.endswith((".weight", ".bias", ".qweight", ".codes")):
            raise CheckpointError(
                f"{name} in {path} has no place in {config.architecture} with num_hidden_layers = "
                f"{config.num_layers}, norm_placement = {config.norm_placement!r} and qk_norm = {config.qk_norm!r}: "
                "config.json and weights are of two models"
            )


def _with_head(path, config, hf_config, source, names: Names) -> ModelConfig:
    """Whether the output head is the embedding: the stored head decides."""
    prefix = names(_HEAD)
    stored = names.has_linear(prefix)
    if stored and config.tie_word_embeddings:
        if tensors.same_values(source, f"{prefix}.weight", names(_EMBEDDING)):
            return config
        _log.warning(
            "%s: tie_word_embeddings = true, but %s holds other values than %s: it is the output head",
            *(path, prefix, names(_EMBEDDING)),
        )
        return dataclasses.replace(config, tie_word_embeddings=False)
    if stored or config.tie_word_embeddings:
        return config
    flags = [home.get("tie_word_embeddings") for home in homes(hf_config)]
    if False in flags:
        raise CheckpointError(
            f"{prefix}.weight is missing from {path}, and tie_word_embeddings = false says that the embedding does not "
            "take its place; set it to true if the model has no output head of its own"
        )
    _log.warning(
        "%s: no %s.weight is stored and nothing says tie_word_embeddings: the embedding is the output head",
        *(path, prefix),
    )
    return dataclasses.replace(config, tie_word_embeddings=True)


def _with_biases(path, config: ModelConfig, source, names: Names) -> ModelConfig:
    """The projections with biases, by what is stored."""
    found, projections = [], projections_of(config)
    for leaf, name in projections.items():
        stored = [
            f"{names.place(f'model.layers.{index}.{name}').prefix}.bias"
            for index in range(config.num_layers)
        ]
        missing = [bias for bias in stored if bias not in names.stored]
        expected = config.has_bias(leaf)
        if missing and len(missing) < len(stored):
            if not expected and all(_is_zero(source, b) for b in stored if b not in missing):
                continue
            raise CheckpointError(
                f"{missing[0]} is missing from {path}, but other layers have theirs"
            )
        # Some converters write zeros for layers without a bias.
        zero = not expected and not missing and all(_is_zero(source, bias) for bias in stored)
        if not missing and not zero:
            found.append(leaf)
    expected = [leaf for leaf in projections if config.has_bias(leaf)]
    if found == expected:
        return config
    lost = [leaf for leaf in expected if leaf not in found]
    if lost and config.architecture in _ALWAYS_BIASED:
        name = names.place(f"model.layers.0.{projections[lost[0]]}").prefix
        raise CheckpointError(f"{name}.bias is missing from {path}; {config.architecture} has one")
    _log.warning(
        "%s: config.json promises biases of %s, stored are those of %s, which are loaded",
        *(path, ", ".join(expected) or "nothing", ", ".join(found) or "nothing"),
    )
    return dataclasses.replace(config, biases=tuple(found))


# Architectures whose biases no flag of config.json decides.
_ALWAYS_BIASED = ("Qwen2ForCausalLM", "GPT2LMHeadModel")


def _is_zero(source: TensorSource, name: str) -> bool:
    return not np.any(source.read(name) != 0)
