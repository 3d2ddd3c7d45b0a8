"""Draft heads in their upstream layouts (a folder with config.json and weights), checked against their target."""

from collections.abc import Callable
from pathlib import Path

from specjax.checkpoints import hf, source
from specjax.config import ModelConfig
from specjax.errors import CheckpointError, ConfigError
from specjax.models import eagle
from specjax.models.llama import Llama

# A tensor that only this kind of head has, and how to build it.
_KINDS: dict[str, tuple[str, Callable]] = {
    "eagle": ("layers.0.self_attn.q_proj.weight", eagle.build),
}


def load_head(path: Path, target: Llama, target_name: str):
    """Loads a draft head for `target`, in the target's compute dtype.

    A `quantization_config` that the head's config.json copied from its target does not apply to the head.

    Raises:
        FileNotFoundError: no such folder, or files missing in it.
        ConfigError: the head was made for a target of another shape.
        CheckpointError: its tensors are of no known kind, malformed or incomplete.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; a draft head is a folder with config.json")
    config = ModelConfig.from_hf(source.read_json(path / "config.json"))
    _check_fit(path, config, target.config, target_name)
    checkpoint = hf.HFCheckpoint(path, config, source.open_source(path))
    for tensor, build in _KINDS.values():
        if checkpoint.has(tensor):
            return build(checkpoint, target.dtype)
    raise CheckpointError(
        f"{path}: no known kind of draft head; looked for "
        + ", ".join(f"{tensor} ({kind})" for kind, (tensor, _) in _KINDS.items())
    )


def _check_fit(path: Path, head: ModelConfig, target: ModelConfig, target_name: str) -> None:
    """A head reads the target's features and token ids, so these must be alike."""
    for field in ("hidden_size", "vocab_size"):
        found, wanted = getattr(head, field), getattr(target, field)
        if found != wanted:
            raise ConfigError(
                f"draft head {path}: {field} is {found}, but the target {target_name!r} has {wanted}; "
                "a head works only with the model that it was trained for"
            )
