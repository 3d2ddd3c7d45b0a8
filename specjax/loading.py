"""`specjax.load`: from a path or name to a model that is ready to run."""

from pathlib import Path

import jax
import jax.numpy as jnp
from tqdm import tqdm

from specjax import checkpoints, generate
from specjax.checkpoints import hub
from specjax.config import DTYPES
from specjax.depth import build as routing
from specjax.depth.build import Depth
from specjax.errors import ConfigError
from specjax.models import llama
from specjax.models.llama import Llama
from specjax.prepare import Dequantize, Preparation
from specjax.quant import quantize as quantizing
from specjax.quant import recipe as recipes
from specjax.quant import rotate, view


def load(
    path_or_name: str | Path,
    *,
    dtype: str | None = None,
    scheme: str | None = None,
    quantize: str | None = None,
    backend: str = "auto",
    dequantize: Dequantize = "auto",
    chat_template: str | None = None,
    qserve_layernorm: bool = False,
    depth: Depth = "auto",
    tree_selection: str = "off",
    predictor: str | Path | None = None,
    survivors: int | None = None,
    progress: bool = False,
) -> "generate.LanguageModel":
    """Loads a model.

    Args:
        path_or_name: a checkpoint directory, a .gguf file, the name of a model that ships ("smollm2-135m"), or a hub id
            "org/name".
        dtype: compute dtype; default: float32 on CPUs (many emulate the others), else what the checkpoint states.
        scheme: activation scheme to run the checkpoint's codes under, e.g. "w4a8" for W4A16 codes.
        quantize: scheme to round the layers' linears to while loading (to nearest, of the decoded weights if they are
            quantized already; `specjax.convert` has better methods).
        backend: kernels; see `specjax.pallas.dispatch`.
        dequantize: "load" makes weight-only linears dense at once, "never" keeps the codes, "fold" too, with the two
            levels of QQQ's group scales as one (fewer instructions per weight; not QQQ's own rounding); "auto" decides
            by backend.
        chat_template: a Jinja chat template to use instead of the model's own.
        qserve_layernorm: run the layers' norms mean-centred, as QServe's kernels do, to compare with them.
        depth: "auto" lets tokens skip layers where the checkpoint has routers, "full" ignores these, "routed" insists.
        tree_selection: who decides which layers run over a draft tree: with "off" all nodes, which keeps the output of
            routed decoding; "vote" and "prune" do not, and need a `predictor` (see `specjax.depth.selection`).
        predictor: folder of the predictor that scores nodes.
        survivors: nodes that "prune" keeps; None: 16.
        progress: show a progress bar.
    Raises:
        FileNotFoundError, ConfigError, CheckpointError: with the file, field or tensor.
    """
    from specjax import tokenizer

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"{dtype=}: supported are {', '.join(DTYPES)}")
    path = hub.resolve(str(path_or_name))
    checkpoint = checkpoints.open_checkpoint(path)
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else checkpoint.config.dtype
    policy = routing.policy(checkpoint, depth, tree_selection, predictor, survivors)
    preparation = Preparation(backend, dequantize, jnp.dtype(dtype))
    recipe = None if quantize is None else recipes.at_load(quantize, checkpoint.config)
    has_codes = False
    bar = tqdm(
        total=checkpoint.config.num_layers, desc="loading", unit="layer", disable=not progress
    )

    def finish(layer):
        nonlocal has_codes
        if recipe is not None:
            layer = quantizing.round_layer(layer, recipe, f"model.layers.{bar.n}")
        if scheme is not None and view.quantized_linears(layer):
            layer, has_codes = view.with_scheme(layer, scheme), True
        if qserve_layernorm:
            layer.input_layernorm.centered = layer.post_attention_layernorm.centered = True
        layer = preparation.layer(layer)
        bar.update()
        return layer

    with bar:
        module = llama.build(checkpoint, jnp.dtype(dtype), finish)
    if scheme is not None and not has_codes:
        module.with_scheme(scheme)  # raises: there is nothing to view
    module = Llama(module.config, module.model, preparation.linear(module.lm_head))
    module = rotate.attach_from(routing.attach(module, checkpoint.config, policy), path)
    return generate.LanguageModel(
        name=str(path_or_name),
        config=module.config,
        module=module,
        tokenizer=tokenizer.load(path, checkpoint, chat_template),
        default_head=hub.shipped_head(str(path_or_name)),
    )
