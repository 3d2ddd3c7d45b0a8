"""Checkpoint files of other tools, opened into one interface: `open_checkpoint(path)`."""

from pathlib import Path

from specjax.checkpoints.base import Checkpoint
from specjax.errors import CheckpointError


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a Hugging Face folder (dense or quantized) or a .gguf file; the format is found from
    the files.

    Configuration, completeness and sizes are checked here; weights are read one by one later.

    Raises:
        FileNotFoundError: the path, its config.json or its weights do not exist.
        ConfigError: the model is of an unsupported kind; the field is named.
        CheckpointError: a file is malformed, truncated or of an unknown kind.
    """
    from specjax.checkpoints import gguf, hf, inventory

    if path.is_dir():
        checkpoint = hf.open_folder(path)
        checkpoint.source.forget()
    elif not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    elif path.suffix == ".gguf":
        checkpoint = gguf.open_file(path)
    else:
        raise CheckpointError(
            f"{path}: expected a folder with a config.json, or a .gguf file; for a weight file, "
            "pass the folder that holds it"
        )
    inventory.check_layers(checkpoint)
    return checkpoint


__all__ = ["Checkpoint", "open_checkpoint"]
