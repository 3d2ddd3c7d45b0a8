"""Routers under their names in checkpoints: `model.layers.<i>.router.*`, in float32, from the start layer on."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from specjax.config.depth import DepthConfig
from specjax.depth import router as routing
from specjax.depth.router import Router
from specjax.errors import ConfigError
from specjax.models import layers
from specjax.quant.dense_linear import Linear


def routers_from(checkpoint, config: DepthConfig) -> list[Router]:
    """The routers of a checkpoint, one per layer from the start layer on.

    Raises:
        ConfigError: the start layer leaves no layer to route.
        CheckpointError: a tensor is missing or has another shape.
    """
    model = checkpoint.config
    check_fit(config, model.num_layers)
    width, hidden = config.router_width, model.hidden_size

    def read(index):
        def values(name, *shape):
            return jnp.asarray(checkpoint.tensor(f"{_prefix(index)}.{name}", shape), jnp.float32)

        return Router(
            up_proj=Linear(values("up_proj.weight", width, hidden), values("up_proj.bias", width)),
            norm=layers.RMSNorm(values("norm.weight", width), routing.EPS),
            down_proj=Linear(values("down_proj.weight", 2, width), values("down_proj.bias", 2)),
            code_bits=config.code_bits,
        )

    return [read(index) for index in range(config.start_layer, model.num_layers)]


def check_fit(config: DepthConfig, num_layers: int) -> None:
    """Raises ConfigError unless a model of `num_layers` layers has some to route."""
    if config.start_layer >= num_layers:
        raise ConfigError(
            f"dynamic_start_layer={config.start_layer}: the model has {num_layers} layers, so none would be routed"
        )


def tensors(routers: Sequence[Router], config: DepthConfig) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Float32 tensors by name; the first router is that of the start layer."""
    found = {}
    for index, router in enumerate(routers, config.start_layer):
        prefix = _prefix(index)
        for name in ("up_proj", "down_proj"):
            linear = getattr(router, name)
            found[f"{prefix}.{name}.weight"] = np.asarray(linear.weight[...], np.float32)
            found[f"{prefix}.{name}.bias"] = np.asarray(linear.bias[...], np.float32)
        found[f"{prefix}.norm.weight"] = np.asarray(router.norm.weight[...], np.float32)
    return found


def _prefix(index: int) -> str:
    return f"model.layers.{index}.router"
