"""Checks an exported model: reads it back and compares its parts and its logits with the model in memory."""

import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from specjax import checkpoints
from specjax.checkpoints import export, inventory
from specjax.config import ModelConfig
from specjax.depth import build as routing
from specjax.errors import CheckpointError
from specjax.models import llama
from specjax.models.llama import Llama
from specjax.quant.dense_linear import Linear
from specjax.quant.linear import QuantizedLinear
from specjax.quant.rotation import RotatedInput
from specjax.quantize import rotate
from specjax.text.tokenizer import Tokenizer

_CHECK_TOKENS = 64
# Logits after random tokens are flat, and far more sensitive than those that a model is used for.
_TEXT = """Water boils at a lower temperature on a mountain than at the sea, because less air presses on it. Whoever
cooks rice in a hut at three thousand metres has to wait longer, and a lid with a weight on it helps: under pressure the
water becomes hotter before it boils. The first to notice were travellers who measured heights with a kettle and a
thermometer. For each three hundred metres that they climbed, the water boiled about one degree earlier."""
# By whether activations are rounded: logits may then differ where a rounding falls on a tie.
TOLERANCE = {True: 2e-2, False: 1e-4}


def probe_tokens(
    windows: Int[np.ndarray, "S T"] | None, text: Tokenizer | None, config: ModelConfig, seed: int
) -> tuple[str, Int[np.ndarray, "1 t"]]:
    """Tokens to compare on, and what they are: of calibration windows, of a text, or without a tokenizer at random."""
    if windows is not None:
        return "calibration text", windows[:1, :_CHECK_TOKENS]
    ids = [] if text is None else text.encode(_TEXT)[:_CHECK_TOKENS]
    if ids and max(ids) < config.vocab_size:
        return "English text", np.asarray([ids], np.int32)
    rng = np.random.default_rng(seed)
    return "random tokens", rng.integers(0, config.vocab_size, (1, _CHECK_TOKENS), np.int32)


def logits(module: Llama, tokens: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T V"]:
    """Logits of a model with its dense parameters in float32."""
    module = jax.tree.map(_float32, module, is_leaf=lambda x: isinstance(x, QuantizedLinear))
    return np.asarray(llama.full_logits(module, jnp.asarray(tokens)))


def _is_whole(node) -> bool:
    return isinstance(node, QuantizedLinear | RotatedInput)


def _float32(leaf):
    floating = not isinstance(leaf, QuantizedLinear) and jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(jnp.float32) if floating else leaf


def verify(
    module: Llama,
    output: Path,
    format: str,
    dtype: str,
    probe: Int[np.ndarray, "B T"],
    source_logits: Float[np.ndarray, "B T V"],
) -> dict[str, float]:
    """Reads an export back and compares; see `specjax.conversion.Conversion` for the result.

    Raises:
        CheckpointError: it does not compute what the model in memory does; the folder is deleted.
    """

    def as_stored(leaf):
        if isinstance(leaf, RotatedInput):
            return leaf.with_linear(jax.tree.map(as_stored, leaf.linear, is_leaf=_is_whole))
        if not isinstance(leaf, QuantizedLinear):
            return leaf.astype(dtype)
        if format != export.DENSE:
            return leaf
        return Linear(leaf.dequantize(dtype), leaf.bias)

    stored = jax.tree.map(as_stored, module, is_leaf=_is_whole)
    stored.depth = module.depth
    checkpoint = checkpoints.open_checkpoint(output)
    reloaded = llama.build(checkpoint, jnp.dtype(dtype))
    reloaded = routing.attach(reloaded, checkpoint.config, routing.policy(checkpoint))
    reloaded = rotate.attach_from(reloaded, output)
    _check_parts(stored, reloaded, checkpoint)
    expected, found = logits(_with_activations_of(stored, reloaded), probe), logits(reloaded, probe)
    error = _relative(found, expected)
    rounds = any(linear.scheme.activations is not None for linear in quantized(module))
    if not error <= TOLERANCE[rounds]:
        shutil.rmtree(output)
        raise CheckpointError(
            f"{output}: read back, its logits differ by {error:.2e} relative RMS from the model in "
            "memory; it was deleted. This is a defect of the format's reader or writer: please report it"
        )
    return {
        "reload_error": error,
        "source_error": _relative(found, source_logits),
        "agreement": float(np.mean(found.argmax(-1) == source_logits.argmax(-1))),
    }


def _check_parts(module: Llama, reloaded: Llama, checkpoint) -> None:
    """Every part that was written is read back, and nothing else: logits alone hide what both sides leave out.

    Raises:
        CheckpointError: names the parts; the folder is deleted.
    """
    written, found = _parts(module), _parts(reloaded)
    try:
        if written != found:
            differing = sorted(dict(written.items() ^ found.items()))
            raise CheckpointError(
                f"{checkpoint.path}: read back, it differs from the model in memory in "
                f"{', '.join(differing[:3])}{', ...' if len(differing) > 3 else ''}; it was deleted. This is a "
                "defect of the format's reader or writer: please report it"
            )
        inventory.check(checkpoint)
    except CheckpointError:
        shutil.rmtree(checkpoint.path)
        raise


def _parts(module: Llama) -> dict[str, tuple[int, ...]]:
    """Shapes of weights and biases by path; a quantized weight counts as its matrix, whatever its arrays are."""
    leaves = jax.tree_util.tree_leaves_with_path(
        module, is_leaf=lambda node: isinstance(node, QuantizedLinear)
    )
    found = {}
    for path, leaf in leaves:
        name = re.sub(r"[^\w]+", ".", jax.tree_util.keystr(path)).strip(".")
        if isinstance(leaf, QuantizedLinear):
            found[f"{name}.weight.value"] = leaf.codes.shape
            if leaf.bias is not None:
                found[f"{name}.bias.value"] = leaf.bias.shape
        else:
            found[name] = leaf.shape
    return found


def _with_activations_of(module: Llama, reloaded: Llama) -> Llama:
    """`module` with activations rounded as in `reloaded`: formats differ in details (scales in half
    precision, ranges).
    """
    specs = iter([linear.scheme.activations for linear in quantized(reloaded)])

    def view(node):
        return node.with_activations(next(specs)) if isinstance(node, QuantizedLinear) else node

    return jax.tree.map(view, module, is_leaf=lambda x: isinstance(x, QuantizedLinear))


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def quantized(module: Llama) -> list[QuantizedLinear]:
    """All quantized linears of a model."""
    leaves = jax.tree.leaves(module, is_leaf=lambda x: isinstance(x, QuantizedLinear))
    return [leaf for leaf in leaves if isinstance(leaf, QuantizedLinear)]
