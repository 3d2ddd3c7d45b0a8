"""Tiny checkpoints of every format that the fuzz mutates, and what loading one gives, comparable."""

import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from specjax import checkpoints
from specjax.checkpoints import export, heads
from specjax.checkpoints.head_folder import HeadFolder
from specjax.drafters import head
from specjax.drafters.head_options import HeadOptions
from specjax.files import manifest, orbax_store, source, torch_writer
from specjax.models import eagle, eagle3, llama, medusa, mtp
from specjax.quant.linear import QuantizedLinear
from specjax.quantize import quantize, recipe
from specjax.text import tokenizer
from specjax.training import speculators
from tests import paths, tiny
from tests.checkpoints import packers
from tests.checkpoints import test_gguf as gguf_files

CONFIG = tiny.config(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_ids=(2,),
)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """A checkpoint in memory.

    Attributes:
        name: of the format.
        container: how tensors are stored: safetensors, sharded, bin, orbax, gguf, or none.
        tensors: by name; of GGUF (type, array).
        files: parsed JSON by file name; of GGUF the metadata under "".
        weights: the weight file's name.
        kind: model, eagle, medusa or tokenizer.
    """

    name: str
    container: str
    tensors: dict[str, Any]
    files: dict[str, dict]
    weights: str = "model.safetensors"
    kind: str = "model"


def write(base: Base, folder: Path) -> Path:
    """Puts a checkpoint into a folder; returns what to load."""
    folder.mkdir(parents=True)
    if base.container == "gguf":
        return gguf_files.write(folder / "model.gguf", base.files[""], base.tensors)
    for name, content in base.files.items():
        (folder / name).write_text(json.dumps(content))
    arrays = {name: np.ascontiguousarray(array) for name, array in base.tensors.items()}
    match base.container:
        case "safetensors":
            safetensors.numpy.save_file(arrays, folder / base.weights)
        case "bin":
            torch_writer.save(arrays, folder / base.weights)
        case "orbax":
            orbax_store.save(folder / orbax_store.FOLDER, arrays)
        case "sharded":
            for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
                held = {n: a for n, a in arrays.items() if shard_of(n) == file}
                safetensors.numpy.save_file(held, folder / file)
    return folder


def shard_of(name: str) -> str:
    return f"model-{1 + ('layers.1' in name):05d}-of-00002.safetensors"


def load(base: Base, path: Path) -> dict[str, Any]:
    """Loads a checkpoint; arrays (linears dequantized), schemes and settings by name."""
    if base.kind == "tokenizer":
        text = tokenizer.load(path)
        return {} if text is None else {"ids": text.encode("Hello, wörld!  <|im_end|>\n")}
    if base.kind == "medusa":
        loaded, choices = heads.load_medusa(path, target())
        return leaves(loaded) | {"choices": choices}
    if base.kind == "head":
        return _load_head(path)
    if base.kind.startswith("eagle"):
        head = heads.load_eagle(path, target(), "target")
        layer_ids = {"layer_ids": getattr(head, "layer_ids", None)}
        return leaves(head) | {"config": settings(head.config) | layer_ids}
    checkpoint = checkpoints.open_checkpoint(path)
    module = llama.build(checkpoint, jnp.dtype("float32"))
    return leaves(module) | {"config": settings(checkpoint.config)}


def _load_head(path: Path) -> dict[str, Any]:
    folder = HeadFolder(path)
    loaded = types.SimpleNamespace(module=target(), config=target().config)
    drafter = head.kind_of(folder).build(folder, loaded, HeadOptions(tree="chain"))
    folder.finish()
    network = getattr(drafter.head, "body", drafter.head)
    found = {
        "layer_ids": network.needs,
        "length": drafter.max_depth,
        "variant": getattr(network, "variant", None),
        "mask_token": getattr(drafter.head, "mask_token", None),
    }
    return leaves(drafter.head) | {"config": settings(network.config) | found}


def settings(config) -> dict[str, Any]:
    """What a configuration says that a forward pass or generation reads."""
    found = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.compare}
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return found | {"biases": [name for name in names if config.has_bias(name)]}


def leaves(module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        module, is_leaf=lambda node: isinstance(node, QuantizedLinear)
    ):
        name = jax.tree_util.keystr(path)
        if isinstance(leaf, QuantizedLinear):
            found[f"{name}.activations"] = leaf.scheme.activations
            leaf = leaf.dequantize(jnp.float32)
        found[name] = np.asarray(leaf)
    return found


_made: dict[str, Any] = {}


def target() -> llama.Llama:
    if "target" not in _made:
        _made["target"] = tiny.model(CONFIG)
    return _made["target"]


def all_bases(scratch: Path) -> list[Base]:
    """Every format; made once, some by the exporters in `scratch`."""
    dense = read(export_to(scratch / "dense", "dense"))
    config, tensors = dense.files, dense.tensors
    index = {"metadata": {}, "weight_map": {name: shard_of(name) for name in tensors}}
    bases = [
        dataclasses.replace(dense, name="hf"),
        Base(
            name="hf-bin",
            container="bin",
            tensors=tensors,
            files=config,
            weights="pytorch_model.bin",
        ),
        Base(
            name="hf-sharded",
            container="sharded",
            tensors=tensors,
            files=config | {"model.safetensors.index.json": index},
        ),
        _awq(dense),
        _gguf(),
    ]
    for name, (scheme, layout) in {
        "gptq": ("w4a16", "safetensors"),
        "compressed-tensors": ("w8a8", "safetensors"),
        "qqq": ("w4a8-qqq", "safetensors"),
        "qserve": ("w4a8-qoq", "safetensors"),
        "specjax": ("w4a16-asym", "safetensors"),
        "orbax": ("w4a16", "orbax"),
    }.items():
        format = "specjax" if name == "orbax" else name
        folder = export_to(scratch / name, format, scheme, layout)
        bases.append(dataclasses.replace(read(folder), name=name))
    packed = export_to(scratch / "packed", "compressed-tensors", "w4a16")
    bases.append(dataclasses.replace(read(packed), name="compressed-tensors-packed"))
    gptq = next(base for base in bases if base.name == "gptq")
    return [*bases, _autoround(gptq), _specmquant(dense), *_heads(), *_speculators(), _tokenizer()]


def export_to(folder: Path, format: str, scheme: str | None = None, layout="safetensors") -> Path:
    module = target()
    if scheme is not None:
        group = 32 if scheme.startswith("w4a16") else -1
        module = quantize.quantize(module, recipe.make(scheme, "rtn", group_size=group, clip=False))
    return export.export(module, CONFIG, folder, format=format, layout=layout, dtype="float32")


def read(folder: Path) -> Base:
    """An exported folder as a base; without the manifest, which would notice every change of size."""
    opened = source.open_source(folder)
    tensors = {name: np.array(opened.read(name)) for name in opened.names()}
    names = [file.name for file in folder.glob("*.json") if file.name != manifest.NAME]
    orbax = (folder / orbax_store.FOLDER).is_dir()
    return Base(
        name=folder.name,
        container="orbax" if orbax else "safetensors",
        tensors=tensors,
        files={name: json.loads((folder / name).read_text()) for name in names},
    )


def _with_settings(base: Base, tensors: dict, name: str, **settings) -> Base:
    config = base.files["config.json"] | {"quantization_config": settings}
    return Base(name=name, container="safetensors", tensors=tensors, files={"config.json": config})


def _is_linear(name: str) -> bool:
    return "_proj" in name


def _awq(dense: Base) -> Base:
    rng, tensors = np.random.default_rng(0), {}
    for name, array in dense.tensors.items():
        if not _is_linear(name):
            tensors[name] = array
            continue
        outputs, inputs = array.shape
        prefix = name.removesuffix(".weight")
        tensors[f"{prefix}.qweight"] = packers.awq_words(rng.integers(0, 16, (inputs, outputs)))
        tensors[f"{prefix}.qzeros"] = packers.awq_words(
            rng.integers(0, 16, (inputs // 32, outputs))
        )
        scales = rng.uniform(0.01, 0.1, (inputs // 32, outputs))
        tensors[f"{prefix}.scales"] = scales.astype(np.float16)
    settings = dict(quant_method="awq", bits=4, group_size=32, version="gemm", zero_point=True)
    return _with_settings(dense, tensors, "awq", **settings)


def _autoround(gptq: Base) -> Base:
    tensors = {n: a for n, a in gptq.tensors.items() if not n.endswith("g_idx")}
    settings = dict(bits=4, group_size=32, sym=True, data_type="int")
    settings |= {
        "packing_format": "auto_round:auto_gptq",
        "extra_config": {"lm_head": {"bits": 16}},
    }
    return _with_settings(gptq, tensors, "auto-round", quant_method="auto-round", **settings)


def _specmquant(dense: Base) -> Base:
    rng = np.random.default_rng(1)
    tensors = {name: array for name, array in dense.tensors.items() if not _is_linear(name)}
    for layer in range(CONFIG.num_layers):
        for part, outputs, inputs in (
            ("self_attn.qkv_proj", 192, 64),
            ("self_attn.o_proj", 64, 64),
            ("mlp.gate_up_proj", 256, 64),
            ("mlp.down_proj", 64, 128),
        ):
            prefix = f"model.layers.{layer}.{part}"
            tensors[f"{prefix}.qweight"] = packers.marlin(rng.integers(0, 16, (outputs, inputs)))
            scales = rng.uniform(0.01, 0.1, (1, outputs)).astype(np.float16)
            tensors[f"{prefix}.scales"] = packers.channel_scales(scales)
    settings = dict(quant_method="gptq", bits=4, group_size=-1, sym=True, desc_act=False)
    return _with_settings(dense, tensors, "specmquant", **settings)


def _gguf() -> Base:
    metadata = {k: v for k, v in gguf_files.METADATA.items()}
    tensors = gguf_files.tensors("Q8_0", "F16", tied=False)
    return Base(name="gguf", container="gguf", tensors=tensors, files={"": metadata})


def _heads() -> list[Base]:
    config = CONFIG.to_hf()
    plain, third, heads_of = (tiny.RandomCheckpoint(CONFIG, seed) for seed in (1, 5, 6))
    eagle.build(plain, jnp.float32)
    width = CONFIG.hidden_size
    eagle3.build(third, jnp.float32, layer_ids=(0, 1), target_width=width, num_drafts=64)
    medusa.build(heads_of, CONFIG, 2, jnp.float32)
    auxiliary = {"eagle_aux_hidden_state_layer_ids": [0, 1], "draft_vocab_size": 64}
    choices = {"small": [[0], [0, 0], [1]]}
    return [
        Base(
            name="eagle",
            container="bin",
            tensors=plain.params,
            files={"config.json": config},
            weights="pytorch_model.bin",
            kind="eagle",
        ),
        Base(
            name="eagle3",
            container="safetensors",
            tensors=third.params,
            files={"config.json": config | auxiliary},
            kind="eagle3",
        ),
        Base(
            name="medusa",
            container="safetensors",
            tensors=heads_of.params,
            files={
                "config.json": {"medusa_num_heads": 2, "medusa_num_layers": 1},
                "medusa_choices.json": choices,
            },
            weights="medusa_lm_head.safetensors",
            kind="medusa",
        ),
    ]


def _speculators() -> list[Base]:
    """Heads that the training export writes."""
    made = []
    parts = tiny.Parts(target())
    predictor = mtp.build(tiny.RandomCheckpoint(CONFIG, 8), jnp.float32, CONFIG.num_layers)
    for name, network in {
        "eagle31": parts.eagle31,
        "peagle": parts.peagle,
        "mtp": predictor,
    }.items():
        stated = {"name": "target", "num_tokens": 3, "dtype": "float32"}
        tensors, config = speculators.folder(network, target(), **stated)
        files = {"config.json": config}
        made.append(
            Base(name=name, container="safetensors", tensors=tensors, files=files, kind="head")
        )
    return made


def _tokenizer() -> Base:
    folder = paths.COPIED / "checkpoints" / "tiny-fp16"
    files = {name: json.loads((folder / name).read_text()) for name in TOKENIZER}
    return Base(name="tokenizer", container="none", tensors={}, files=files, kind="tokenizer")
