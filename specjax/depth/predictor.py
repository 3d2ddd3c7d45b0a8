"""The Predictor of SpaDec: how likely a node of a draft tree is to be accepted, seen from an early layer."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from specjax.errors import CheckpointError, ConfigError
from specjax.files import base as file_base
from specjax.files import source, writer

CONFIG_NAME, WEIGHTS_NAME = "predictor_config.json", "predictor.safetensors"


class Predictor(nnx.Module):
    """Logistic regression on the hidden state that enters layer `layer`."""

    def __init__(self, weight: Float[Array, "D"], bias: Float[Array, ""], layer: int):
        self.weight, self.bias = nnx.Param(weight), nnx.Param(bias)
        self.layer = layer

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "..."]:
        """Probability that a node is accepted; float32."""
        product = jnp.sum(x.astype(jnp.float32) * self.weight[...], axis=-1)
        return jax.nn.sigmoid(product + self.bias[...])


def save(predictor: Predictor, folder: Path, facts: dict, *, overwrite: bool = False) -> None:
    """Writes a folder with the weights, the layer and `facts` (how it was made) in one step.

    Raises:
        CheckpointError: the folder exists and is not empty, and `overwrite` is not given.
    """
    tensors = {
        "weight": np.asarray(predictor.weight[...], np.float32),
        "bias": np.asarray(predictor.bias[...], np.float32),
    }
    with writer.whole_folder(folder, overwrite) as temporary:
        writer.write_shards(
            temporary,
            tensors.items(),
            shard_bytes=1 << 30,
            header_bytes=writer.header_space(list(tensors), 1),
        )
        (temporary / "model.safetensors").rename(temporary / WEIGHTS_NAME)
        writer.write_json(temporary / CONFIG_NAME, {"layer": predictor.layer, **facts})


def load(folder: Path, hidden_size: int, num_layers: int) -> Predictor:
    """Reads a folder that `save` wrote, for a model of this shape.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        ConfigError: its layer is not one of the model's.
        CheckpointError: its weights do not fit the model, or are malformed.
    """
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder}: no {name} there; a predictor is a folder that experiments.train_predictor writes"
            )
    layer = file_base.read_json(folder / CONFIG_NAME).get("layer")
    if not isinstance(layer, int) or isinstance(layer, bool) or not 0 < layer < num_layers:
        raise ConfigError(
            f"{folder / CONFIG_NAME}: layer={layer!r}: the model's layers 1 to {num_layers - 1} are supported"
        )
    file = source.open_file(folder / WEIGHTS_NAME)
    return Predictor(
        weight=jnp.asarray(_tensor(file, "weight", (hidden_size,), folder)),
        bias=jnp.asarray(_tensor(file, "bias", (), folder)),
        layer=layer,
    )


def _tensor(file: file_base.TensorSource, name: str, shape: tuple[int, ...], folder: Path):
    if name not in file.names():
        raise CheckpointError(f"{name} is missing from {folder / WEIGHTS_NAME}")
    file_base.check_shape(file.shape(name), shape, name, folder / WEIGHTS_NAME)
    return np.asarray(file.read(name), np.float32)
