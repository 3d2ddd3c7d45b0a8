"""GGUF checkpoints under this library's names; `gguf_architectures` says what llama.cpp's architectures are."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from specjax.checkpoints import gguf_file, gguf_split
from specjax.checkpoints.gguf_architectures import (
    ARCHITECTURES,
    GLOBAL_NAMES,
    LAYER_NAMES,
    place,
)
from specjax.checkpoints.gguf_config import LONG_FACTORS, ROPE_FACTORS, read_config
from specjax.checkpoints.gguf_file import GGUFFile
from specjax.checkpoints.gguf_split import GGUFParts
from specjax.config import ModelConfig
from specjax.errors import CheckpointError
from specjax.files import base as file_base
from specjax.quant import packing
from specjax.quant import scheme as schemes
from specjax.quant.dense_linear import Linear
from specjax.quant.linear import QuantizedLinear

_SCHEMES = {"Q4_0": "w4a16", "Q4_1": "w4a16-asym", "Q8_0": "w8a16"}
_KNOWN = re.compile(
    rf"(({'|'.join(GLOBAL_NAMES.values())})\.(weight|bias)"
    rf"|blk\.\d+\.({'|'.join(LAYER_NAMES.values())})\.(weight|bias|scale|input_scale)"
    rf"|{'|'.join(map(re.escape, (ROPE_FACTORS, *LONG_FACTORS.values())))})"
)


class GGUFCheckpoint:
    """A GGUF file; Q4_0, Q4_1 and Q8_0 linears keep their codes, other types are decoded to floats.

    Attributes:
        path: the file.
        config: the model's configuration.
        format: "gguf".
        file: metadata (the tokenizer's too) and tensors as stored.
    """

    format = "gguf"

    def __init__(self, file: GGUFFile | GGUFParts):
        self.path = file.path
        self.file = file
        self.config = read_config(file)
        _refuse_unknown_tensors(file, self.config)
        self._declared = ARCHITECTURES[file.metadata["general.architecture"]]

    def has(self, name: str) -> bool:
        return place(self.file, self._declared, name)[0] in self.file.names()

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor as floats: F16 and BF16 as stored, everything else in float32."""
        stored = place(self.file, self._declared, name)[0]
        rows = self._rows(name, shape)
        array = gguf_file.dequantize(rows, self.file.info(stored)).reshape(shape)
        if (scale := self._scale(stored)) is not None:
            array = array.astype(np.float32) * scale
        file_base.check_finite(array, stored, self.path)
        if self.config.norm_offset and "norm" in name:
            # llama.cpp stores the whole gain.
            array = array.astype(np.float32) - np.float32(self.config.norm_offset)
        return array

    def linear(
        self, prefix: str, out_features: int, in_features: int, bias: bool
    ) -> Linear | QuantizedLinear:
        values = jnp.asarray(self.tensor(f"{prefix}.bias", (out_features,))) if bias else None
        name, shape = f"{prefix}.weight", (out_features, in_features)
        stored = place(self.file, self._declared, name)[0]
        type_name = self.file.info(stored).type_name
        if type_name not in gguf_file.BLOCK_TYPES or self._scale(stored) is not None:
            return Linear(jnp.asarray(self.tensor(name, shape)), values)
        codes, scales, minima = gguf_file.decode_blocks(self._rows(name, shape), type_name)
        for floats in (scales, minima):
            if floats is not None:
                file_base.check_finite(np.ascontiguousarray(floats), stored, self.path)
        scheme = schemes.lookup(_SCHEMES[type_name])
        return QuantizedLinear(
            codes=packing.to_device(codes, scheme.weights.code_dtype),
            scales=jnp.asarray(scales),
            minima=None if minima is None else jnp.asarray(minima),
            bias=values,
            scheme=scheme,
            group_size=gguf_file.GROUP_SIZE,
        )

    def _scale(self, stored: str) -> np.float32 | None:
        """The factor of a whole weight (NVFP4 has one), or None."""
        name = f"{stored.removesuffix('.weight')}.scale"
        if not stored.endswith(".weight") or name not in self.file.names():
            return None
        info = self.file.info(name)
        file_base.check_shape(info.shape, (1,), name, self.path)
        value = gguf_file.dequantize(self.file.rows(name), info).astype(np.float32).reshape(1)
        file_base.check_finite(value, name, self.path)
        return value[0]

    def _rows(self, name: str, shape: tuple[int, ...]) -> Shaped[np.ndarray, "N row_bytes"]:
        """Encoded rows in Hugging Face order; the shape is checked."""
        stored, members = place(self.file, self._declared, name)
        leaf, _, kind = name.rpartition(".")
        sizes = [shape[0]]
        if members:
            layer = re.match(r"model\.layers\.\d+\.", name)[0]
            sizes = [self._outputs(member) for member in members]
            before = sum(sizes[: members.index(leaf.removeprefix(layer))])
        whole = (sum(sizes), *shape[1:])
        file_base.check_shape(self.file.info(stored).shape, whole, stored, self.path)
        rows = self.file.rows(stored)
        if kind == "bias" and (members or leaf.endswith(("q_proj", "k_proj"))):
            rows = rows.reshape(whole[0], -1)
        if members:
            rows = rows[before : before + shape[0]]
        if self._declared.permuted and leaf.endswith(("q_proj", "k_proj")):
            config = self.config
            heads = config.num_heads if leaf.endswith("q_proj") else config.num_kv_heads
            rows = rows[_rows_to_hf(shape[0], heads)]
        return rows.reshape(1, -1) if kind == "bias" else rows

    def _outputs(self, leaf: str) -> int:
        """Outputs of a projection that may be fused."""
        config = self.config
        if leaf.startswith("mlp."):
            return config.intermediate_size
        return config.head_dim * (config.num_heads if "q_proj" in leaf else config.num_kv_heads)


def open_file(path: Path) -> GGUFCheckpoint:
    """Opens a .gguf file; of one that is split, any part.

    Raises:
        ConfigError: an architecture or setting that is not supported; the metadata key is named.
        CheckpointError: malformed, truncated, or with tensors that do not belong to such a model.
    """
    return GGUFCheckpoint(gguf_split.open_parts(path))


def _refuse_unknown_tensors(file: GGUFFile | GGUFParts, config: ModelConfig) -> None:
    """Refuses tensors that the model as its metadata describes it would not read."""
    absent = set() if config.learned_positions else {"position_embd"}
    for name, there in (
        ("input_layernorm", config.norm_placement != "after"),
        ("post_attention_layernorm", config.norm_placement != "after"),
        ("attention_output_norm", config.norm_placement != "before"),
        ("mlp_output_norm", config.norm_placement != "before"),
        ("self_attn.q_norm", config.qk_norm is not None),
        ("self_attn.k_norm", config.qk_norm is not None),
        ("mlp.gate_proj", config.gated_mlp),
    ):
        absent |= set() if there else {LAYER_NAMES[name]}
    for name in file.names():
        if not _KNOWN.fullmatch(name) or absent & set(name.split(".")):
            raise CheckpointError(
                f"{file.path}: tensor {name} is not part of {config.architecture}; supported are the tensors of "
                f"{', '.join(ARCHITECTURES)}"
            )


def _rows_to_hf(num_rows: int, heads: int) -> Shaped[np.ndarray, "N"]:
    """Index of the GGUF row for each Hugging Face row: pairs (2i, 2i + 1) of a head go to (i, i +
    C/2)."""
    order = np.arange(num_rows).reshape(heads, -1, 2)
    return order.swapaxes(1, 2).reshape(-1)
