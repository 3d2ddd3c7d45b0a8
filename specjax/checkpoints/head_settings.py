"""Settings that several kinds of draft heads have: the layers they read, their draft vocabulary, how far they draft."""

import logging
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from specjax.checkpoints.head_folder import HeadFolder
from specjax.errors import CheckpointError

# Ids of states: i is the input of layer i, 0 the embeddings, L the last layer's output before the final norm.
_STATES = ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids")
# Ids of layers whose output is read: -1 is the embeddings (z-lab, JetSpec, SpecForge's block heads, DeepSpec).
_OUTPUTS = "target_layer_ids"

_log = logging.getLogger(__name__)


def layer_ids(
    folder: HeadFolder, num_layers: int, default: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """The target's states that a head reads, in its order: i is the input of layer i, `num_layers` the last output.

    Files name states or the layers that put them out, by family; the field tells which. Where none is there it is
    `default`, else 2, L // 2 and L - 3, as all EAGLE-3 trainers choose.

    Raises:
        ConfigError: not a list of distinct layers of the target.
    """
    states, outputs = folder.setting(*_STATES), folder.setting(_OUTPUTS)
    if states is not None and outputs is not None:
        raise folder.error(f"{_STATES[0]} = {states!r} beside {_OUTPUTS} = {outputs!r}: state one")
    field, found, shift = _STATES[0], states, 0
    if outputs is not None:
        field, found, shift = _OUTPUTS, outputs, 1
    asked = folder.layer_ids
    if asked is not None:
        field, found, shift = "layer_ids", asked, 0
    elif states == [1, num_layers // 2 - 1, num_layers - 4]:
        _log.warning(
            "%s: %s = %s is read as inputs of these layers, as vLLM does; where it names outputs (SpecForge, ModelOpt) "
            "the option layer_ids=%s says so",
            *(folder.path, field, states, [i + 1 for i in states]),
        )
    if found is None or found == []:
        found = default or (2, num_layers // 2, num_layers - 3)
        shift = 0
    whole = isinstance(found, list | tuple) and found and all(type(i) is int for i in found)
    if not whole:
        raise folder.error(f"{field} = {found!r}: expected a list of layers")
    ids = tuple(i + shift for i in found)
    if any(not 0 <= i <= num_layers for i in ids) or len(set(ids)) != len(ids):
        raise folder.error(
            f"{field} = {list(found)} reads the inputs of layers {list(ids)}; the target has {num_layers} (at least 7 "
            "are needed for the default choice)"
        )
    return ids


def draft_offsets(folder: HeadFolder, vocab_size: int) -> tuple[int, Int[Array, "U"] | None]:
    """Size U of the draft vocabulary, and target id minus draft id of each of its tokens; None: they are the same.

    Raises:
        ConfigError: draft_vocab_size is no size.
        CheckpointError: `d2t` and `t2d`, which says the same, are missing, of another length, or contradict each other.
    """
    mask = np.asarray(folder.tensors.read("t2d")) if "t2d" in folder.names else None
    if "d2t" in folder.names:
        offsets = np.asarray(folder.tensors.read("d2t"))
    elif mask is not None:
        offsets = np.flatnonzero(mask) - np.arange(np.count_nonzero(mask))
    else:
        offsets = None
    default = vocab_size if offsets is None else len(offsets)
    size = folder.size("draft_vocab_size", default=default)
    if offsets is None:
        if size != vocab_size:
            raise CheckpointError(
                f"{folder.path}: d2t is missing, but draft_vocab_size {size} is not the vocabulary's {vocab_size}"
            )
        return size, None
    if offsets.shape != (size,) or not np.issubdtype(offsets.dtype, np.integer):
        raise CheckpointError(
            f"{folder.path}: d2t is {offsets.dtype.name} of shape {offsets.shape}, expected integers of ({size},)"
        )
    ids = np.arange(size) + offsets
    if ids.min() < 0 or ids.max() >= vocab_size or len(np.unique(ids)) < size:
        raise CheckpointError(
            f"{folder.path}: d2t does not name {size} different tokens of the vocabulary of {vocab_size}"
        )
    if mask is not None and not np.array_equal(np.flatnonzero(mask), ids):
        raise CheckpointError(f"{folder.path}: d2t and t2d name different draft tokens")
    return size, jnp.asarray(offsets, jnp.int32)


def draft_length(folder: HeadFolder, *names: str, default: int) -> int:
    """Tokens that a head drafts a round: what its proposal method says, or the fields `names`, or the default.

    Raises:
        ConfigError: it is no positive integer.
    """
    stated = _proposal(folder).get("speculative_tokens")
    found = stated if stated is not None else folder.setting(*names) if names else None
    if found is None:
        return default
    if type(found) is not int or found < 1:
        raise folder.error(f"speculative_tokens = {found!r}: expected a positive integer")
    return found


def _proposal(folder: HeadFolder) -> dict[str, Any]:
    """The proposal method of the speculators layout that is the default, else the first."""
    config = folder.raw.get("speculators_config")
    methods = config.get("proposal_methods") if isinstance(config, dict) else None
    methods = [m for m in methods or [] if isinstance(m, dict)]
    chosen = config.get("default_proposal_method") if methods else None
    named = [m for m in methods if m.get("proposal_type") == chosen]
    return (named or methods or [{}])[0]
