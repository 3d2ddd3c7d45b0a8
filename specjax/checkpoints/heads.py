"""Draft heads in their upstream layouts (a folder with config.json and weights), checked against their target."""

import logging
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import jax.numpy as jnp

from specjax.checkpoints import head_settings
from specjax.checkpoints.head_folder import HeadFolder, check_fit
from specjax.config import ModelConfig
from specjax.errors import CheckpointError
from specjax.files import base as file_base
from specjax.models import eagle, eagle3, medusa
from specjax.models.llama import Llama

_MEDUSA_PART = re.compile(r"(?P<head>\d+)\.(?P<layer>\d+)\.(?P<linear>linear\.)?(weight|bias)")

# Settings of an EAGLE-3 head that other values would make another network (ModelOpt's eagle_config).
_EAGLE3_ONLY = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "parallel_draft_step": 1,
    "eagle_decoder_type": "llama",
}

_log = logging.getLogger(__name__)


def load_eagle(path: Path, target: Llama, target_name: str, window: int | None = None):
    """Loads an EAGLE-1/2 or EAGLE-3 head for `target`, in the target's compute dtype; the tensors tell which.

    Layouts: upstream EAGLE (`fc`, `layers.0` or `midlayer`), SGLang's repacked ones (the same names), DeepSpec (flat,
    `layers.0`) and speculators (shapes in `transformer_layer_config`). A `quantization_config` that the head's
    config.json copied from its target does not apply to the head.

    Args:
        window: tokens that its attention sees at most; None: what its settings say.

    Raises:
        FileNotFoundError: no such folder, or files missing in it.
        ConfigError: the head was made for a target of another shape, or a setting is not supported.
        CheckpointError: its tensors are of no known kind, malformed or incomplete, or not all of them are part of it.
    """
    folder = HeadFolder(path, window)
    if is_eagle3(folder) and is_parallel(folder):
        raise CheckpointError(
            f"{path}: a P-EAGLE head, which the drafter 'head' opens, not 'eagle'"
        )
    if is_eagle3(folder):
        head = open_eagle3(folder, target)
    elif is_eagle(folder):
        head = open_eagle(folder, target)
    else:
        raise CheckpointError(
            f"{path}: not an EAGLE head (the drafter 'head' opens other kinds); neither fc.weight beside "
            "layers.0.self_attn.q_proj.weight (EAGLE-1/2) nor midlayer.hidden_norm.weight (EAGLE-3) is in it"
        )
    folder.finish()
    return head


def is_eagle(folder: HeadFolder) -> bool:
    """Whether a folder holds an EAGLE-1/2 head."""
    needed, foreign = {"layers.0.self_attn.q_proj.weight", "fc.weight"}, {"hidden_norm.weight"}
    return needed <= folder.names and not foreign & folder.names and not is_eagle3(folder)


def open_eagle(folder: HeadFolder, target: Llama) -> eagle.EagleHead:
    """An EAGLE-1/2 head; see `load_eagle`."""
    config = folder.shape()
    check_fit(folder, config, target.config, "hidden_size", "vocab_size")
    return _sharing(eagle.build(folder.checkpoint(config), target.dtype), target)


def is_eagle3(folder: HeadFolder) -> bool:
    """Whether a folder holds an EAGLE-3 head, of any variant, P-EAGLE too."""
    stored = any(f"{n}.hidden_norm.weight" in folder.names for n in ("midlayer", "layers.0"))
    # Heads of EAGLE-1/2 have no final norm, and those that draft blocks norm all features in one place.
    stored |= {"fc.weight", "norm.weight"} <= folder.names and "hidden_norm.weight" not in (
        folder.names
    )
    return folder.says in ("eagle3", "peagle") or (folder.says is None and stored)


def is_parallel(folder: HeadFolder) -> bool:
    """Whether an EAGLE-3 head drafts all tokens in one pass (P-EAGLE)."""
    stated = folder.says == "peagle" or folder.flag("parallel_drafting")
    return stated or "mask_hidden" in folder.names


def open_eagle3(
    folder: HeadFolder, target: Llama, default_layers: str = "llama"
) -> eagle3.Eagle3Head:
    """An EAGLE-3 head; see `load_eagle`.

    Args:
        default_layers: model type of its layers where the speculators layout does not state it.
    """
    config = folder.shape(default_layers)
    check_fit(folder, config, target.config, "vocab_size")
    for name, supported in _EAGLE3_ONLY.items():
        folder.refuse(name, supported)
    folder.refuse("target_hidden_size", target.config.hidden_size)
    folder.refuse("num_target_layers", target.config.num_layers)
    ids = head_settings.layer_ids(folder, target.config.num_layers)
    num_drafts, d2t = head_settings.draft_offsets(folder, config.vocab_size)
    own = {name: f"{name}.weight" in folder.names for name in ("embed_tokens", "lm_head")}
    check_shared(folder, config, target, own, num_drafts)
    renamed = {"layers.0.": "midlayer."} if "midlayer.hidden_norm.weight" in folder.names else {}
    head = eagle3.build(
        folder.checkpoint(config, renamed),
        target.dtype,
        layer_ids=ids,
        target_width=target.config.hidden_size,
        num_drafts=num_drafts,
        d2t=d2t,
        variant=variant(folder),
        own_head=own["lm_head"],
    )
    return _sharing(head, target)


def _sharing[Head](head: Head, target: Llama) -> Head:
    """The head without a copy of the target's embeddings, which most files have: a gigabyte for large vocabularies."""
    own, theirs = head.embed_tokens, target.model.embed_tokens.weight[...]
    alike = own is not None and (own.weight.shape, own.weight.dtype) == (theirs.shape, theirs.dtype)
    if alike and bool(jnp.array_equal(own.weight[...], theirs)):
        head.embed_tokens = None
    return head


def variant(folder: HeadFolder) -> eagle3.Variant:
    """Which EAGLE-3 a head is: the flags of config.json; of norms that have tensors, the tensors count."""
    flags = {field.name: folder.flag(field.name) for field in fields(eagle3.Variant)}
    for name, tensor in {
        "norm_before_fc": "input_norm.weight",
        "fc_norm": "fc_norm.0.weight",
    }.items():
        if tensor in folder.names and not flags[name]:
            _log.warning("%s: %s is stored, so %s is taken to be true", folder.path, tensor, name)
            flags[name] = True
    if flags["norm_before_fc"] and flags["fc_norm"]:
        raise folder.error("norm_before_fc = True beside fc_norm = True: one of them is supported")
    return eagle3.Variant(**flags)


def check_shared(
    folder: HeadFolder, config: ModelConfig, target: Llama, own: dict[str, bool], num_drafts: int
) -> None:
    """Refuses heads that would use the target's embeddings or output head and do not fit them."""
    width, wanted = config.hidden_size, target.config.hidden_size
    for name, stored in own.items():
        if not stored and width != wanted:
            raise CheckpointError(
                f"{folder.path}: {name}.weight is missing, and the target's, of width {wanted}, does not fit the "
                f"head's hidden_size {width}"
            )
    if not own["lm_head"] and num_drafts != config.vocab_size:
        raise CheckpointError(
            f"{folder.path}: lm_head.weight is missing; a draft vocabulary of {num_drafts} tokens needs its own"
        )


def load_medusa(path: Path, target: Llama) -> tuple[medusa.MedusaHeads, dict[str, list]]:
    """Loads Medusa-1 heads; also returns the trees of its medusa_choices.json by name (empty without one).

    How many heads there are is seen from the tensors; published configurations lack the number or state another.

    Raises:
        FileNotFoundError: no such folder, or files missing in it.
        CheckpointError: a tensor is missing or does not fit the target, or heads have several layers.
    """
    return open_medusa(HeadFolder(path), target)


def open_medusa(folder: HeadFolder, target: Llama) -> tuple[medusa.MedusaHeads, dict[str, list]]:
    """As `load_medusa`."""
    path, tensors = folder.path, folder.tensors
    count = _count_heads(path, tensors.names())
    for field, found in {"medusa_num_heads": count, "medusa_num_layers": 1}.items():
        if folder.raw.get(field, found) != found:
            _log.warning("%s: %s = %r, the file has %d", path, field, folder.raw[field], found)
    heads = medusa.build(folder.checkpoint(target.config), target.config, count, target.dtype)
    if left := tensors.unread():
        raise CheckpointError(f"{path}: {left[0]} is no part of Medusa heads with one layer each")
    return heads, _read_choices(path / "medusa_choices.json")


def _count_heads(path: Path, names: Sequence[str]) -> int:
    """Heads `i.0.linear`, `i.1`; as many as there are numbers."""
    parts = [match for name in names if (match := _MEDUSA_PART.fullmatch(name))]
    if not parts:
        raise CheckpointError(
            f"{path}: no Medusa head; 0.0.linear.weight is not in it (found {', '.join(names[:3])})"
        )
    deep = [match.string for match in parts if match["layer"] != "0" and match["linear"]]
    if deep:
        raise CheckpointError(
            f"{path}: {deep[0]} is a second layer of a head; supported are heads with one layer each"
        )
    return max(int(match["head"]) for match in parts) + 1


def _read_choices(path: Path) -> dict[str, list]:
    if not path.is_file():
        return {}
    choices = file_base.read_json(path)
    for name, tree in choices.items():
        whole = isinstance(tree, list) and all(
            isinstance(node, list)
            and node
            and all(type(rank) is int and rank >= 0 for rank in node)
            for node in tree
        )
        if not whole:
            raise CheckpointError(f"{path}: {name} is not a list of paths of ranks")
    return choices
