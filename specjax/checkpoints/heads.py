"""Draft heads in their upstream layouts (a folder with config.json and weights), checked against their target."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from specjax.checkpoints import hf
from specjax.config import ModelConfig
from specjax.errors import CheckpointError, ConfigError
from specjax.files import base as file_base
from specjax.files import source
from specjax.files.base import TensorSource
from specjax.models import eagle, eagle3, medusa
from specjax.models.llama import Llama

_MEDUSA_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
_MEDUSA_PART = re.compile(r"(?P<head>\d+)\.(?P<layer>\d+)\.(?P<linear>linear\.)?(weight|bias)")

_log = logging.getLogger(__name__)


def load_eagle(path: Path, target: Llama, target_name: str):
    """Loads an EAGLE-1/2 or EAGLE-3 head for `target`, in the target's compute dtype; the tensors tell which.

    Layouts: upstream EAGLE (`fc`, `layers.0` or `midlayer`), SGLang's repacked ones (the same names), and speculators
    (`layers.0` in place of `midlayer`, shapes in `transformer_layer_config`). A `quantization_config` that the head's
    config.json copied from its target does not apply to the head.

    Raises:
        FileNotFoundError: no such folder, or files missing in it.
        ConfigError: the head was made for a target of another shape.
        CheckpointError: its tensors are of no known kind, malformed or incomplete.
    """
    raw = _read_config(path)
    config = _read_shape(path, raw)
    checkpoint = hf.HFCheckpoint(path, config, _open_tensors(path))
    if checkpoint.has("midlayer.hidden_norm.weight"):
        _check_fit(path, config, target.config, target_name, ("vocab_size",))
        return _build_eagle3(checkpoint, raw, target)
    if checkpoint.has("layers.0.self_attn.q_proj.weight"):
        _check_fit(path, config, target.config, target_name, ("hidden_size", "vocab_size"))
        return eagle.build(checkpoint, target.dtype)
    raise CheckpointError(
        f"{path}: not an EAGLE head; neither layers.0.self_attn.q_proj.weight (EAGLE-1/2) nor "
        "midlayer.hidden_norm.weight (EAGLE-3) is in it"
    )


def load_medusa(path: Path, target: Llama) -> tuple[medusa.MedusaHeads, dict[str, list]]:
    """Loads Medusa-1 heads; also returns the trees of its medusa_choices.json by name (empty without one).

    How many heads there are is seen from the tensors; published configurations lack the number or state another.

    Raises:
        FileNotFoundError: no such folder, or files missing in it.
        CheckpointError: a tensor is missing or does not fit the target, or heads have several layers.
    """
    raw = _read_config(path)
    tensors = source.open_source(path, _MEDUSA_FILES)
    count = _count_heads(path, tensors.names())
    for field, found in {"medusa_num_heads": count, "medusa_num_layers": 1}.items():
        if raw.get(field, found) != found:
            _log.warning("%s: %s = %r, the file has %d", path, field, raw[field], found)
    checkpoint = hf.HFCheckpoint(path, target.config, tensors)
    heads = medusa.build(checkpoint, target.config, count, target.dtype)
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


def _read_shape(path: Path, raw: dict) -> ModelConfig:
    """The head's layer as a configuration; heads name architectures of their own."""
    shape = raw.get("transformer_layer_config", raw)
    if not isinstance(shape, dict):
        raise ConfigError(f"{path}: transformer_layer_config = {shape!r}: expected an object")
    try:
        return ModelConfig.from_hf({**shape, "architectures": ["LlamaForCausalLM"]})
    except ConfigError as error:
        raise ConfigError(f"{path / 'config.json'}: {error}") from error


class _UpstreamNames:
    """The tensors of an EAGLE-3 head in the speculators layout under the names of the upstream one."""

    def __init__(self, tensors: TensorSource):
        self._tensors = tensors

    def names(self) -> Sequence[str]:
        return tuple(name.replace("layers.0.", "midlayer.", 1) for name in self._tensors.names())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(self._stored(name))

    def dtype(self, name: str) -> np.dtype:
        return self._tensors.dtype(self._stored(name))

    def read(self, name: str) -> np.ndarray:
        return self._tensors.read(self._stored(name))

    def _stored(self, name: str) -> str:
        return name.replace("midlayer.", "layers.0.", 1)


def _open_tensors(path: Path) -> TensorSource:
    tensors = source.open_source(path)
    return _UpstreamNames(tensors) if "layers.0.hidden_norm.weight" in tensors.names() else tensors


def _build_eagle3(checkpoint: hf.HFCheckpoint, raw: dict, target: Llama) -> eagle3.Eagle3Head:
    layers = target.config.num_layers
    field = "eagle_aux_hidden_state_layer_ids"
    ids = raw.get(field) or (2, layers // 2, layers - 3)
    if not isinstance(ids, list | tuple) or any(type(i) is not int for i in ids):
        raise ConfigError(f"{checkpoint.path}: {field} = {ids!r}: expected a list of layers")
    drafts = raw.get("draft_vocab_size") or checkpoint.config.vocab_size
    if type(drafts) is not int or drafts < 1:
        raise ConfigError(
            f"{checkpoint.path}: draft_vocab_size = {drafts!r}: expected a positive integer"
        )
    if any(not 0 <= i < layers for i in ids) or len(set(ids)) != len(ids):
        raise ConfigError(
            f"{checkpoint.path}: an EAGLE-3 head reads the inputs of layers {list(ids)}; the target has {layers} "
            "(at least 7 are needed for the default choice)"
        )
    for field in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"):
        if raw.get(field):
            raise ConfigError(
                f"{checkpoint.path}: {field}={raw[field]!r} is not supported, only false"
            )
    return eagle3.build(
        checkpoint,
        target.dtype,
        layer_ids=tuple(ids),
        target_width=target.config.hidden_size,
        num_drafts=drafts,
    )


def _read_config(path: Path) -> dict:
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such folder; a draft head is a folder with config.json"
        )
    return file_base.read_json(path / "config.json")


def _check_fit(
    path: Path, head: ModelConfig, target: ModelConfig, target_name: str, fields: tuple[str, ...]
) -> None:
    """A head reads the target's features and token ids, so these must be alike."""
    for field in fields:
        found, wanted = getattr(head, field), getattr(target, field)
        if found != wanted:
            raise ConfigError(
                f"draft head {path}: {field} is {found}, but the target {target_name} has {wanted}; "
                "a head works only with the model that it was trained for"
            )
