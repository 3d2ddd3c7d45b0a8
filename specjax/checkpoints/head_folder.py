"""The folder of a draft head: its settings, wherever a layout keeps them, and its tensors, all of which are read."""

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specjax.checkpoints import hf, inventory
from specjax.config import ModelConfig
from specjax.config import fields as read
from specjax.config.architectures import parts
from specjax.errors import CheckpointError, ConfigError
from specjax.files import base as file_base
from specjax.files import find, source
from specjax.files.base import TensorSource

MEDUSA_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
# Objects of a config.json that hold settings of a head, besides the top level.
_OBJECTS = ("eagle_config", "dflash_config", "transformer_layer_config")
_CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_LAYER = re.compile(r"(?:mtp_)?layers\.(\d+)\.")

_log = logging.getLogger(__name__)


class HeadFolder:
    """A folder with config.json and weights; nothing but the names of tensors is read at first.

    Attributes:
        path: the folder.
        raw: its config.json.
        tensors: its weights.
        names: of its tensors.

    Args:
        window: tokens that each layer sees at most, whatever the settings say; None: what they say.
        layer_ids: states of the target that the head reads; None: those of its settings.
    """

    def __init__(
        self,
        path: Path,
        window: int | None = None,
        layer_ids: Sequence[int] | None = None,
    ):
        if not path.is_dir():
            raise FileNotFoundError(
                f"{path}: no such folder; a draft head is a folder with config.json"
            )
        self.path, self._window, self._layer_ids = path, window, layer_ids
        self._asked = {"window": window, "layer_ids": layer_ids}
        self.raw: dict[str, Any] = file_base.read_json(path / "config.json")
        has_medusa = any((path / name).is_file() for name in MEDUSA_FILES)
        files = MEDUSA_FILES if has_medusa else find.STANDARD_NAMES
        self.tensors = source.open_source(path, files)
        self.names = frozenset(self.tensors.names())
        self._elsewhere = False

    @property
    def says(self) -> str | None:
        """The kind that a config.json of the speculators layout names."""
        return self.raw.get("speculators_model_type")

    @property
    def classes(self) -> tuple[str, ...]:
        """The names under `architectures`."""
        named = self.raw.get("architectures") or ()
        return (named,) if isinstance(named, str) else tuple(map(str, named))

    @property
    def layer_ids(self) -> Sequence[int] | None:
        """The states that the caller names."""
        self._asked.pop("layer_ids", None)
        return self._layer_ids

    def unused(self) -> str | None:
        """What the caller asked for and no reader has looked at, "window=8"; None where there is nothing."""
        left = [f"{name}={v!r}" for name, v in self._asked.items() if v is not None]
        return ", ".join(left) or None

    def error(self, text: Any) -> ConfigError:
        """An error about this folder's settings."""
        return ConfigError(f"{self.path / 'config.json'}: {text}")

    def setting(self, *names: str) -> Any:
        """The value of a setting, by any of its names in any of its homes; None where none states it."""
        homes = {"": self.raw} | {
            f"{name}.": self._checked(read.mapping, name, self.raw.get(name)) for name in _OBJECTS
        }
        found = {f"{home}{name}": held.get(name) for home, held in homes.items() for name in names}
        return read.settle(found)

    def flag(self, *names: str, default: bool = False) -> bool:
        """True or false."""
        return self._checked(read.flag, {names[0]: self.setting(*names)}, names[0], default)

    def size(self, *names: str, default: int | None = None) -> int:
        """A positive integer."""
        return self._checked(read.size, {names[0]: self.setting(*names)}, names[0], default)

    def token(self, *names: str, vocab_size: int) -> int:
        """A token id below `vocab_size`."""
        found = self.setting(*names)
        if type(found) is not int or not 0 <= found < vocab_size:
            raise self.error(f"{names[0]} = {found!r}: expected a token id below {vocab_size}")
        return found

    def _checked(self, reader, *arguments):
        try:
            return reader(*arguments)
        except ConfigError as error:
            raise self.error(error) from error

    def refuse(self, name: str, supported: Any) -> None:
        """Refuses a setting that changes results, where it is stated and is not `supported`."""
        found = self.setting(name)
        if found is not None and found != supported:
            raise self.error(f"{name} = {found!r} is not supported, only {supported!r}")

    def shape(self, default: str = "llama") -> ModelConfig:
        """The head's layers as a configuration.

        Flat files name the class of the head, and often the model type of their target: which layers they have is seen
        from the tensors. In the speculators layout `transformer_layer_config` says it.

        Args:
            default: model type of layers where the speculators layout does not state it.
        """
        nested = self.raw.get("transformer_layer_config")
        fields = self._checked(read.mapping, "transformer_layer_config", nested)
        fields = fields if nested is not None else self.raw
        normed = any(name.endswith("self_attn.q_norm.weight") for name in self.names)
        kind = "qwen3" if normed else "llama"
        if nested is not None:
            kind = fields.get("model_type") or (kind if normed else default)
            if kind not in _CLASSES:
                raise self.error(
                    f"transformer_layer_config.model_type = {kind!r}: supported are {', '.join(_CLASSES)}"
                )
        stated = {name: value for name, value in fields.items() if name != "layer_types"}
        if nested is None:
            stated["num_hidden_layers"] = self._num_layers()
        if fields.get("layer_types") is not None:
            stated |= {"use_sliding_window": False}
        own = {"architectures": [_CLASSES[kind]], "model_type": kind}
        config = self._checked(ModelConfig.from_hf, stated | own)
        if fields.get("layer_types") is not None:
            counted = {**fields, "num_hidden_layers": config.num_layers}
            config = dataclasses.replace(config, windows=self._windows(counted))
        self._asked.pop("window", None)
        if self._window is not None:
            stated = config.windows or (None,) * config.num_layers
            windows = tuple(min(w or self._window, self._window) for w in stated)
            config = dataclasses.replace(config, windows=windows)
        return dataclasses.replace(config, biases=self._biases(config), depth=None)

    def _num_layers(self) -> int:
        """Layers of a flat file: those stored, since many repeat their target's configuration."""
        found = [int(match[1]) + 1 for name in self.names if (match := _LAYER.match(name))]
        count = max(found, default=1)
        stated = self.setting("draft_num_hidden_layers", "num_hidden_layers")
        if stated not in (None, count):
            _log.warning(
                "%s: num_hidden_layers = %r, the file has %d layers; these are taken",
                *(self.path, stated, count),
            )
        return count

    def _windows(self, fields: dict[str, Any]) -> tuple[int | None, ...]:
        window = fields.get("sliding_window")
        if window is not None:
            window = self._checked(read.size, fields, "sliding_window")
        types = [parts.FULL] * fields["num_hidden_layers"]
        return self._checked(parts.typed_windows, fields, types, window)

    def _biases(self, config: ModelConfig) -> tuple[str, ...]:
        """Projections that are stated to have a bias, or have one."""
        stored = {
            name.split(".")[-2]
            for name in self.names
            if name.endswith("_proj.bias")
            and name.split(".")[-3:-2] in (["self_attn"], ["mlp"])
            and np.any(self.tensors.read(name))
        }
        return tuple(n for n in _PROJECTIONS if config.has_bias(n) or n in stored)

    def checkpoint(
        self, config: ModelConfig, renamed: Mapping[str, str] | None = None
    ) -> hf.HFCheckpoint:
        """Its tensors for the builders of networks.

        Args:
            renamed: prefix that a builder asks for -> prefix in the file.
        """
        tensors = _Renamed(self.tensors, renamed) if renamed else self.tensors
        return hf.HFCheckpoint(self.path, config, tensors)

    def leave_to_loader(self) -> None:
        """Says that another loader has read the tensors, and answers for those that it has not."""
        self._elsewhere = True

    def finish(self) -> None:
        """Refuses tensors that nothing has read, once the head is built: parts of it that were dropped.

        Raises:
            CheckpointError: naming them.
        """
        if self._elsewhere:
            return
        if left := inventory.unread_of_head(self.tensors):
            raise CheckpointError(
                f"{self.path}: {', '.join(left[:3])}{', ...' if len(left) > 3 else ''}: no part of such a head as its "
                "config.json describes it; without it the head would draft something else"
            )


class _Renamed:
    """Tensors of which some stand under other names."""

    def __init__(self, tensors: TensorSource, prefixes: Mapping[str, str]):
        self._tensors, self._prefixes = tensors, prefixes

    def names(self) -> Sequence[str]:
        back = {stored: wanted for wanted, stored in self._prefixes.items()}
        return tuple(_replaced(name, back) for name in self._tensors.names())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(_replaced(name, self._prefixes))

    def dtype(self, name: str) -> np.dtype:
        return self._tensors.dtype(_replaced(name, self._prefixes))

    def read(self, name: str) -> np.ndarray:
        return self._tensors.read(_replaced(name, self._prefixes))


def _replaced(name: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def check_fit(folder: HeadFolder, head: ModelConfig, target: ModelConfig, *fields: str) -> None:
    """Refuses a head made for a target of another shape: it reads its features and token ids.

    Raises:
        ConfigError: naming the field.
    """
    for field in fields:
        found, wanted = getattr(head, field), getattr(target, field)
        if found != wanted:
            raise ConfigError(
                f"draft head {folder.path}: {field} is {found}, but the target has {wanted}; "
                "a head works only with the model that it was trained for"
            )
