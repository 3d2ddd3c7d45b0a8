"""Sources and model folders for checkpoint tests."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from specjax.files import source as sources
from specjax.models import llama
from specjax.quant.linear import QuantizedLinear
from tests import paths

LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ARRAYS = ("codes", "scales", "zeros", "minima", "channel_scales", "perm", "bias")


class MemorySource:
    """Tensors in a dictionary."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        self._tensors = dict(tensors)

    def names(self):
        return tuple(self._tensors)

    def shape(self, name):
        return tuple(self._tensors[name].shape)

    def dtype(self, name):
        return self._tensors[name].dtype

    def read(self, name):
        return self._tensors[name]


def under(prefix: str, parts: dict[str, np.ndarray]) -> MemorySource:
    return MemorySource({f"{prefix}.{part}": array for part, array in parts.items()})


def read_all(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file, copied."""
    file = sources.open_file(path)
    return {name: np.array(file.read(name)) for name in file.names()}


def save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes with the safetensors library."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    safetensors.numpy.save_file(contiguous, path, {"format": "pt"})


def tiny_tensors() -> dict[str, np.ndarray]:
    """The dense tensors of tiny-fp16."""
    return read_all(paths.fixture("tiny-fp16") / "model.safetensors")


def write(
    folder: Path,
    tensors: dict[str, np.ndarray],
    quantization_config: dict | None,
    file: str = "model.safetensors",
    **config_fields,
) -> Path:
    """A model folder with the shape of tiny-fp16."""
    folder.mkdir(exist_ok=True)
    config = json.loads((paths.fixture("tiny-fp16") / "config.json").read_text()) | config_fields
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    (folder / "config.json").write_text(json.dumps(config))
    save(folder / file, tensors)
    return folder


def build(checkpoint, dtype=jnp.float32) -> llama.Llama:
    return llama.build(checkpoint, dtype)


def linear_at(model: llama.Llama, prefix: str):
    """The linear of a model by its Hugging Face prefix."""
    node = model
    for name in prefix.split("."):
        node = node[int(name)] if name.isdigit() else getattr(node, name)
    return node


def host(array) -> np.ndarray | None:
    """A device array as plain numpy, 4-bit codes as int8 or uint8."""
    if array is None:
        return None
    if array.dtype in (jnp.int4, jnp.uint4):
        return np.asarray(array.astype(jnp.int8 if array.dtype == jnp.int4 else jnp.uint8))
    return np.asarray(array)


def assert_same_linear(found: QuantizedLinear, expected: QuantizedLinear) -> None:
    """Bit equality of every array, and of the static fields."""
    assert (found.scheme, found.group_size) == (expected.scheme, expected.group_size)
    for field in ARRAYS:
        ours, theirs = host(getattr(found, field)), host(getattr(expected, field))
        assert (ours is None) == (theirs is None), field
        if ours is not None:
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, field
            assert ours.tobytes() == theirs.tobytes(), field


def check_golden_weights(model: llama.Llama, name: str, atol_ulp: float = 1.0) -> int:
    """Compares with `dequant.*` of a golden in units of the last place of float16; returns how many there were.

    Goldens in tests/fixtures have every 13th row.
    """
    golden = sources.open_file(paths.golden(f"{name}.safetensors"))
    weights = [n for n in golden.names() if n.startswith("dequant.")]
    for tensor in weights:
        expected = golden.read(tensor).astype(np.float32)
        prefix = tensor.removeprefix("dequant.").removesuffix(".weight")
        found = np.asarray(linear_at(model, prefix).dequantize())
        found = found[:: -(-len(found) // len(expected))]
        ulp = np.spacing(np.abs(expected).astype(np.float16)).astype(np.float32)
        assert np.max(np.abs(found - expected) / ulp) <= atol_ulp, tensor
    return len(weights)
