"""Writing a model as a Hugging Face folder in one of the formats that specjax (and often others) read back.

| format | linears | read by |
|---|---|---|
| dense | floating point (quantized ones are dequantized) | everything |
| gptq | W4A16, W8A16; version 1 | vLLM, SGLang, transformers, GPTQModel |
| compressed-tensors | W4A16, W8A16, W4A8, W8A8, FP8 | vLLM, SGLang, transformers |
| qqq | W4A8 per channel, g128 | GPTQModel, vLLM, SpecMQuant's converters |
| qserve | W8A8, QoQ per channel, QoQ g128 | QServe's tensors, as safetensors |
| specjax | every scheme | specjax, fastest |

Beside weights and config.json goes `specjax.json`, the manifest: which format, the rotation of the weights, where
they came from, and the size of every file. The folder is written under a temporary name and renamed when it is
complete.
"""

import dataclasses
import itertools
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from specjax.checkpoints import compressed_tensors, gptq, native, qqq, qserve
from specjax.config import DTYPES, ModelConfig
from specjax.config.architectures import FUSED, Layout
from specjax.depth import checkpoint as routers
from specjax.errors import CheckpointError
from specjax.files import manifest, orbax_store, writer
from specjax.models.llama import Llama
from specjax.models.norms import LayerNorm, Norm
from specjax.quant import rotation as rotations
from specjax.quant import view
from specjax.quant.dense_linear import Linear
from specjax.quant.linear import QuantizedLinear

DENSE = "dense"
_TENSORS_PER_LINEAR = 7

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packer:
    """How a format stores quantized linears.

    Attributes:
        check: raises CheckpointError, naming the linear, if the format cannot hold it.
        pack: tensors of one linear by file name.
        config: `quantization_config` from linears by prefix and the prefixes of dense ones.
        side_file: name of a second copy of the configuration, or None.
    """

    check: Callable[[QuantizedLinear, str], None]
    pack: Callable[[QuantizedLinear, str], dict[str, np.ndarray]]
    config: Callable[[dict[str, QuantizedLinear], tuple[str, ...]], dict[str, Any]]
    side_file: str | None = None


def _packer(module, side_file: str | None = None) -> Packer:
    return Packer(
        check=module.check_linear,
        pack=module.pack_linear,
        config=module.quantization_config,
        side_file=side_file,
    )


PACKERS: dict[str, Packer] = {
    "gptq": _packer(gptq, "quantize_config.json"),
    "compressed-tensors": _packer(compressed_tensors),
    "qqq": _packer(qqq, "quantize_config.json"),
    "qserve": _packer(qserve),
    "specjax": _packer(native),
}
FORMATS = (DENSE, *PACKERS)


def export(
    module: Llama,
    config: ModelConfig,
    path: Path,
    *,
    format: str,
    dtype: str | None = None,
    extra_files: Sequence[Path] = (),
    rotation: str | None = None,
    source: str | None = None,
    layout: Literal["safetensors", "orbax"] = "safetensors",
    shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> Path:
    """Writes a model, one linear in memory at a time.

    Args:
        module: the model, not `prepare`d (its projections are not fused). Routers stay in float32.
        config: its configuration.
        path: the folder to make; it must not exist or be empty, unless `overwrite`.
        format: one of `FORMATS`.
        dtype: of embeddings, norms and dense linears; the module's if None.
        extra_files: copied beside the weights: tokenizer files, generation_config.json, a stored rotation.
        rotation: id of the rotation that was folded into the weights, for the manifest.
        source: says what the weights were made from (a path or digest), for the manifest.
        layout: "orbax" stores the tensors of format "specjax" as an Orbax checkpoint in a subfolder; it needs them all
            in host memory at once.
        shard_bytes: bytes of tensors per safetensors file.
        overwrite: replaces an existing folder, in one step, once the new one is complete.

    Returns:
        `path`.

    Raises:
        CheckpointError: the format is unknown or cannot hold the model; or `path` is taken.
        FileNotFoundError: one of `extra_files` does not exist.
    """
    names = config.declaration.layout
    online, items = _is_rotated_online(module), list(_in_files(parameters(module), names))
    linears = {name: item for name, item in items if isinstance(item, QuantizedLinear)}
    dense = tuple(name for name, item in items if isinstance(item, Linear))
    dtype = dtype or jnp.dtype(module.dtype).name
    fields = config.to_hf() | {"dtype": dtype, "torch_dtype": dtype}
    quantization = _check(format, linears, dense, dtype, extra_files)
    if layout == "orbax" and format != "specjax":
        raise CheckpointError(f"layout='orbax' is for format='specjax', not {format!r}")
    if online:
        _check_online(format, rotation, extra_files)
    if quantization is not None:
        fields["quantization_config"] = quantization
    routed = {} if module.depth is None else routers.tensors(module.depth.routers, config.depth)
    routed = {names.stored(name): values for name, values in routed.items()}
    with writer.whole_folder(path, overwrite) as folder:
        packed = (pair for name, item in items for pair in _pack(name, item, format, dtype, names))
        packed = itertools.chain(packed, routed.items())
        if layout == "orbax":
            orbax_store.save(folder / orbax_store.FOLDER, dict(packed))
        else:
            written = [*(name for name, _ in items), *routed]
            space = writer.header_space(written, _TENSORS_PER_LINEAR)
            writer.write_shards(folder, packed, shard_bytes=shard_bytes, header_bytes=space)
        for file in extra_files:
            shutil.copyfile(file, folder / file.name)
        if format != DENSE and PACKERS[format].side_file:
            writer.write_json(folder / PACKERS[format].side_file, quantization)
        writer.write_json(folder / "config.json", fields)
        manifest.write(folder, format=format, rotation=rotation, source=source)
    _log.info("%s: written in format %s", path, format)
    return path


def parameters(
    module: Llama,
) -> Iterator[tuple[str, Shaped[Array, "..."] | Linear | QuantizedLinear]]:
    """Arrays by full name and linears by prefix, in the order of the forward pass; names are the library's.

    Of a linear with an online rotation of its input, the linear itself.

    Raises:
        CheckpointError: the projections are fused.
    """
    yield "model.embed_tokens.weight", module.model.embed_tokens.weight[...]
    if module.model.embed_positions is not None:
        yield "model.embed_positions.weight", module.model.embed_positions.weight[...]
    for index, layer in enumerate(module.model.layers):
        prefix, attention, mlp = f"model.layers.{index}", layer.self_attn, layer.mlp
        if attention.qkv_proj is not None or mlp.gate_up_proj is not None:
            raise CheckpointError(
                f"{prefix}: its projections are fused; export the model as loaded, before prepare"
            )
        norms = {f"{prefix}.{name}": norm for name, norm in layer.norms().items()}
        yield from _norm(f"{prefix}.input_layernorm", norms)
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{prefix}.self_attn.{leaf}", _stored(getattr(attention, leaf))
        for leaf in ("q_norm", "k_norm"):
            yield from _norm(
                f"{prefix}.self_attn.{leaf}",
                {f"{prefix}.self_attn.{leaf}": getattr(attention, leaf)},
            )
        yield from _norm(f"{prefix}.attention_output_norm", norms)
        yield from _norm(f"{prefix}.post_attention_layernorm", norms)
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            if getattr(mlp, leaf) is not None:
                yield f"{prefix}.mlp.{leaf}", _stored(getattr(mlp, leaf))
        yield from _norm(f"{prefix}.mlp_output_norm", norms)
    yield from _norm("model.norm", {"model.norm": module.model.norm})
    if module.lm_head is not None:
        yield "lm_head", module.lm_head


def _norm(name: str, norms: dict[str, Norm | None]) -> Iterator[tuple[str, Shaped[Array, "..."]]]:
    """The arrays of one of the norms, if it is there."""
    norm = norms.get(name)
    if norm is not None:
        yield f"{name}.weight", norm.weight[...]
    if isinstance(norm, LayerNorm):
        yield f"{name}.bias", norm.bias[...]


def _in_files(items: Iterable[tuple[str, Any]], layout: Layout) -> Iterator[tuple[str, Any]]:
    """Parameters under the names of the architecture's files; linears that these hold as one are fused.

    Where codes cannot be fused (their permutations differ), the parts stay apart under the library's names.
    """
    waiting: list[tuple[str, Any]] = []
    for name, item in items:
        group = next((g for g in layout.fused if name.endswith(FUSED[g])), None)
        if group is None:
            yield layout.stored(name), item
            continue
        waiting.append((name, item))
        if len(waiting) < len(FUSED[group]):
            continue
        whole = view.fuse([part for _, part in waiting])
        if whole is None:
            yield from ((layout.stored(part), linear) for part, linear in waiting)
        else:
            prefix = name[: -len(FUSED[group][-1])]
            yield layout.stored(f"{prefix}{group}"), whole
        waiting = []


def _stored(linear):
    return linear.linear if isinstance(linear, rotations.RotatedInput) else linear


def _is_rotated_online(module: Llama) -> bool:
    linears = [
        linear
        for layer in module.model.layers
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)
    ]
    return any(isinstance(linear, rotations.RotatedInput) for linear in linears)


def _check_online(format: str, rotation: str | None, extra_files: Sequence[Path]) -> None:
    """Online rotations are part of the model: only specjax computes them, and only from their file."""
    if format != "specjax":
        raise CheckpointError(
            f"format={format!r} cannot express the rotation that this model computes at run time; use "
            "format='specjax', or rotate offline only"
        )
    if rotation is None or rotations.FILE_NAME not in [file.name for file in extra_files]:
        raise CheckpointError(
            f"the model computes a rotation at run time: give its id as `rotation` and {rotations.FILE_NAME} among "
            "`extra_files`"
        )


def _check(
    format: str,
    linears: dict[str, QuantizedLinear],
    dense: tuple[str, ...],
    dtype: str,
    extra_files: Sequence[Path],
) -> dict[str, Any] | None:
    """Refuses before anything is written; returns the `quantization_config`, None for a dense export."""
    if format not in FORMATS:
        raise CheckpointError(f"format={format!r} is unknown; known formats: {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype={dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    _check_extra_files(extra_files)
    if format == DENSE:
        return None
    if not linears:
        raise CheckpointError(
            f"format={format!r} holds quantized linears and the model has none; quantize it, or use format='dense'"
        )
    for prefix, linear in linears.items():
        PACKERS[format].check(linear, prefix)
    return PACKERS[format].config(linears, dense)


def _check_extra_files(files: Sequence[Path]) -> None:
    """Refuses files that do not exist, or whose name belongs to a file of the export."""
    side_files = {packer.side_file for packer in PACKERS.values()}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file")
        weights = file.name.startswith("model") and ".safetensors" in file.name
        if weights or file.name in {"config.json", manifest.NAME, *side_files}:
            raise CheckpointError(f"{file}: the export writes its own {file.name}; leave it out")


def _pack(
    name: str,
    item: Shaped[Array, "..."] | Linear | QuantizedLinear,
    format: str,
    dtype: str,
    layout: Layout,
) -> Iterator[tuple[str, np.ndarray]]:
    """File names and host arrays of one parameter or linear."""
    if isinstance(item, QuantizedLinear) and format != DENSE:
        yield from PACKERS[format].pack(item, name).items()
    elif isinstance(item, (Linear, QuantizedLinear)):
        quantized = isinstance(item, QuantizedLinear)
        weight = item.dequantize(dtype) if quantized else item.weight[...]
        turned = layout.transposed and name != "lm_head"
        yield f"{name}.weight", np.ascontiguousarray(_host(weight.T if turned else weight, dtype))
        if item.bias is not None:
            yield f"{name}.bias", _host(item.bias if quantized else item.bias[...], dtype)
    else:
        yield name, _host(item, dtype)


def _host(array: Shaped[Array, "..."], dtype: str) -> Shaped[np.ndarray, "..."]:
    return np.asarray(array).astype(jnp.dtype(dtype), copy=False)
