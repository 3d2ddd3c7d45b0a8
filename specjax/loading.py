"""From a path or name to a network in its run-time form, with its configuration and tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from specjax import checkpoints
from specjax.checkpoints import inventory
from specjax.config import DTYPES, ModelConfig
from specjax.depth import build as routing
from specjax.depth.build import Depth
from specjax.errors import ConfigError
from specjax.files import hub
from specjax.models import llama
from specjax.models.llama import Llama
from specjax.models.prepare import Dequantize, Preparation
from specjax.quant import view
from specjax.quant.scheme import Scheme
from specjax.quantize import quantize as quantizing
from specjax.quantize import recipe as recipes
from specjax.quantize import rotate
from specjax.text import special_ids, tokenizer


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How to load a model.

    Attributes:
        dtype: compute dtype; default: float32 on CPUs (many emulate the others), else what the checkpoint states.
        scheme: activation scheme to run the checkpoint's codes under, e.g. "w4a8" for W4A16 codes.
        quantize: scheme to round the layers' linears to while loading (to nearest, of the decoded weights if they are
            quantized already; `specjax.convert` has better methods).
        head_scheme: scheme to round the output head to while loading, or "dense"; "auto" is "w8a8" where `quantize` has
            8-bit integer activations, else what is stored.
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
        ConfigError: a dtype that is not supported.
    """

    dtype: str | None = None
    scheme: str | None = None
    quantize: str | None = None
    head_scheme: str = "auto"
    backend: str = "auto"
    dequantize: Dequantize = "auto"
    chat_template: str | None = None
    qserve_layernorm: bool = False
    depth: Depth = "auto"
    tree_selection: str = "off"
    predictor: str | Path | None = None
    survivors: int | None = None
    progress: bool = False

    def __post_init__(self):
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r}: supported are {', '.join(DTYPES)}")


@dataclass(kw_only=True)
class LoadedModel:
    """What a checkpoint holds, ready to run; drafters are built for it.

    Attributes:
        name: where it came from.
        config: architecture.
        module: the network in its run-time form.
        tokenizer: `specjax.tokenizer.Tokenizer`, or None (then prompts are token ids), or, where it cannot be built,
            `Unreadable`, which raises the reason.
        default_head: directory of the draft head that ships for this model, if one does.
    """

    name: str
    config: ModelConfig
    module: Llama
    tokenizer: Any = None
    default_head: Path | None = None

    @property
    def dtype_name(self) -> str:
        """Compute dtype, e.g. "float32"."""
        return str(self.module.dtype)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end a generation; see `specjax.text.special_ids`."""
        known = tokenizer.usable(self.tokenizer)
        by_tokenizer = () if known is None else known.end_ids
        return special_ids.stop_ids(self.config.eos_token_ids, by_tokenizer, self.config.vocab_size)

    @property
    def bos_token_id(self) -> int | None:
        """The token that starts a text, by the configuration, else by the tokenizer."""
        known = tokenizer.usable(self.tokenizer)
        if self.config.bos_token_id is not None or known is None:
            return self.config.bos_token_id
        return known.bos_token_id


def load_model(path_or_name: str | Path, options: LoadOptions) -> LoadedModel:
    """Loads a model.

    Args:
        path_or_name: a checkpoint directory, a .gguf file, the name of a model that ships ("smollm2-135m"), or a hub id
            "org/name".
        options: how.
    Raises:
        FileNotFoundError, ConfigError, CheckpointError: with the file, field or tensor.
    """
    path = hub.resolve(str(path_or_name))
    checkpoint = checkpoints.open_checkpoint(path)
    dtype = options.dtype
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else checkpoint.config.dtype
    module = _network(checkpoint, jnp.dtype(dtype), options)
    return LoadedModel(
        name=str(path_or_name),
        config=module.config,
        module=rotate.attach_from(module, path),
        tokenizer=tokenizer.load_or_defer(path, checkpoint, options.chat_template),
        default_head=hub.shipped_head(str(path_or_name)),
    )


def _head_scheme(options: LoadOptions) -> Scheme | None:
    """What the output head is rounded to; None: it stays as it is stored."""
    name = options.head_scheme
    return recipes.head(recipes.head_at_load(options.quantize) if name == "auto" else name)


def _network(checkpoint, dtype: jnp.dtype, options: LoadOptions) -> Llama:
    """The network of a checkpoint, layer by layer in run-time form, its depth policy attached."""
    policy = routing.policy(
        checkpoint, options.depth, options.tree_selection, options.predictor, options.survivors
    )
    preparation = Preparation(options.backend, options.dequantize, dtype)
    scheme, has_codes = options.scheme, False
    if options.qserve_layernorm and checkpoint.config.norm_kind != "rms":
        raise ConfigError(
            f"qserve_layernorm centres RMS norms, and {checkpoint.config.architecture} has others (norm_kind = "
            f"{checkpoint.config.norm_kind!r})"
        )
    recipe = (
        None if options.quantize is None else recipes.at_load(options.quantize, checkpoint.config)
    )
    bar = tqdm(
        total=checkpoint.config.num_layers,
        desc="loading",
        unit="layer",
        disable=not options.progress,
    )

    def finish(layer):
        nonlocal has_codes
        if recipe is not None:
            layer = quantizing.round_layer(layer, recipe, f"model.layers.{bar.n}")
        if scheme is not None and view.quantized_linears(layer):
            layer, has_codes = view.with_scheme(layer, scheme), True
        if options.qserve_layernorm:
            for norm in layer.norms().values():
                norm.centered = True
        layer = preparation.layer(layer)
        bar.update()
        return layer

    with bar:
        module = llama.build(checkpoint, dtype, finish)
    inventory.warn(checkpoint, ignore=".router." if policy is None else None)
    if scheme is not None and not has_codes:
        module.with_scheme(scheme)  # raises: there is nothing to view
    if (head := _head_scheme(options)) is not None:
        module = quantizing.round_head(module, head)
    module = Llama(module.config, module.model, preparation.linear(module.lm_head))
    return routing.attach(module, checkpoint.config, policy)
