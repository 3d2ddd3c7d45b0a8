"""Small models with random routers that skip about half of the layers."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from specjax.config.depth import DepthConfig
from specjax.depth import router as routing
from specjax.depth.predictor import Predictor
from specjax.depth.routed import Routed
from specjax.depth.selection import OFF, Selection
from specjax.models import llama
from specjax.models.prepare import prepare
from tests import tiny

DEPTH = DepthConfig(start_layer=1, reserved_tokens=2, router_width=16)
CONFIG = tiny.config(num_layers=4)


def router(seed: int, code_bits: int | None = None, hidden: int = 32, bias: float = 0.0):
    """A router whose decision depends on the token; `bias` leans towards executing."""
    made = routing.init(jax.random.key(seed), hidden, DEPTH.router_width, code_bits)
    made.down_proj.weight[...] = 4 * made.down_proj.weight[...]
    made.down_proj.bias[...] = jnp.array([0.0, bias])
    return made


def with_depth(
    model: llama.Llama,
    depth: DepthConfig = DEPTH,
    selection: Selection = OFF,
    predictor: Predictor | None = None,
    bias: float = 0.0,
) -> llama.Llama:
    """A model with random routers."""
    hidden, count = model.config.hidden_size, model.config.num_layers
    routers = [router(i, depth.code_bits, hidden, bias) for i in range(depth.start_layer, count)]
    routed = Routed(depth, routers, selection, predictor)
    config = replace(model.config, depth=depth)
    return llama.Llama(config, model.model, model.lm_head, routed)


def selecting(model: llama.Llama, selection: Selection, predictor: Predictor) -> llama.Llama:
    """The model with another way to treat trees."""
    routed = Routed(model.depth.config, list(model.depth.routers), selection, predictor)
    return llama.Llama(model.config, model.model, model.lm_head, routed)


def predictor(layer: int = 2, seed: int = 0, hidden: int = 32) -> Predictor:
    """A random predictor."""
    weight = jax.random.normal(jax.random.key(seed), (hidden,)) / hidden**0.5
    return Predictor(weight, jnp.zeros(()), layer)


def routed(code_bits: int | None = None, seed: int = 0, **settings) -> llama.Llama:
    """A random model of four layers, of which three are routed, in run-time form."""
    depth = replace(DEPTH, code_bits=code_bits)
    return with_depth(prepare(tiny.model(CONFIG, seed)), depth, **settings)
