"""GGUF: metadata, block formats against the gguf package, row order against Hugging Face tensors, refusals."""

import importlib.util
import math
import struct
from pathlib import Path

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from specjax import checkpoints
from specjax.checkpoints import gguf, gguf_architectures, gguf_file
from specjax.config import RopeConfig
from specjax.errors import CheckpointError, ConfigError
from specjax.files import hub
from specjax.quant.dense_linear import Linear
from tests import paths

TYPE_IDS = {name: number for number, (name, _, _) in gguf_file.TENSOR_TYPES.items()}
HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 64, 96, 4, 2, 16, 40
METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": FFN,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5e5,
    "llama.rope.dimension_count": HEAD_DIM,
    "tokenizer.ggml.tokens": ["<s>", "</s>", "é"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}
LAYER_SHAPES = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HEADS * HEAD_DIM, HIDDEN),
    "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD_DIM),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (FFN, HIDDEN),
    "ffn_up": (FFN, HIDDEN),
    "ffn_down": (HIDDEN, FFN),
}


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(item) -> bytes:
    """A metadata value with its type; (type number, struct code, value) chooses the type."""
    match item:
        case tuple():
            return struct.pack("<I" + item[1], item[0], item[2])
        case bool():
            return struct.pack("<I?", 7, item)
        case int():
            return struct.pack("<II", 4, item)
        case float():
            return struct.pack("<If", 6, item)
        case str():
            return struct.pack("<I", 8) + string(item)
        case list() if item and isinstance(item[0], str):
            return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(string, item))
        case list():
            return struct.pack("<IIQ", 9, 5, len(item)) + struct.pack(f"<{len(item)}i", *item)
    raise TypeError(item)


def encode(array: np.ndarray, type_name: str) -> bytes:
    """Plain types exactly; block types by rounding to the nearest code."""
    plain = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    if type_name in plain:
        return array.astype(plain[type_name]).tobytes()
    groups = array.reshape(-1, 32).astype(np.float32)
    low, high = groups.min(1, keepdims=True), np.abs(groups).max(1, keepdims=True)
    span = {"Q8_0": high / 127, "Q4_0": high / 7, "Q4_1": (groups.max(1, keepdims=True) - low) / 15}
    scales = span[type_name].astype(np.float16)
    minima = low.astype(np.float16) if type_name == "Q4_1" else None
    shift = {"Q8_0": 0, "Q4_0": -8, "Q4_1": 0}[type_name]
    offset = 0 if minima is None else minima.astype(np.float32)
    codes = np.rint((groups - offset) / np.maximum(scales, 6e-8).astype(np.float32)) - shift
    bounds = (-127, 127) if type_name == "Q8_0" else (0, 15)
    return pack(np.clip(codes, *bounds).astype(np.int8), scales, minima).tobytes()


def pack(codes: np.ndarray, scales: np.ndarray, minima: np.ndarray | None) -> np.ndarray:
    """Blocks [n, bytes] from codes as the file stores them [n, 32]; 4-bit codes are 0..15."""
    parts = [scales.astype("<f2").view(np.uint8)]
    if minima is not None:
        parts.append(minima.astype("<f2").view(np.uint8))
    four_bits = codes.min() >= 0 and codes.max() <= 15
    data = codes.view(np.uint8)
    parts.append(data[:, :16] | (data[:, 16:] << 4) if four_bits else data)
    return np.concatenate(parts, axis=1)


def write(path: Path, metadata: dict, tensors: dict[str, tuple[str, np.ndarray]]) -> Path:
    """A GGUF file; tensors are (type, array) to encode, or (type, shape, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(string(key) + value(item) for key, item in metadata.items())
    data = b""
    for name, (type_name, *content) in tensors.items():
        shape = content[0] if len(content) == 2 else content[0].shape
        head += string(name) + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", n) for n in reversed(shape))
        head += struct.pack("<IQ", TYPE_IDS.get(type_name, 99), len(data))
        blob = content[1] if len(content) == 2 else encode(content[0], type_name)
        data += blob + bytes(-len(blob) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def tensors(linear_type="F32", embedding_type="F32", tied=True, biases=()) -> dict:
    rng = np.random.default_rng(0)

    def random(*shape):
        return rng.normal(size=shape).astype(np.float32)

    found = {"token_embd.weight": (embedding_type, random(VOCAB, HIDDEN))}
    found["output_norm.weight"] = ("F32", random(HIDDEN))
    if not tied:
        found["output.weight"] = (linear_type, random(VOCAB, HIDDEN))
    for layer in range(2):
        for name, shape in LAYER_SHAPES.items():
            kind = linear_type if len(shape) == 2 else "F32"
            found[f"blk.{layer}.{name}.weight"] = (kind, random(*shape))
        for name in biases:
            found[f"blk.{layer}.{name}.bias"] = ("F32", random(LAYER_SHAPES[name][0]))
    return found


def to_gguf_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q_proj and k_proj."""
    parts = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return parts.swapaxes(1, 2).reshape(weight.shape)


def test_block_sizes_agree_with_the_gguf_package():
    constants = pytest.importorskip("gguf.constants")
    for number, (name, elements, size) in gguf_file.TENSOR_TYPES.items():
        kind = constants.GGMLQuantizationType(number)
        assert (kind.name, *constants.GGML_QUANT_SIZES[kind]) == (name, elements, size)


@pytest.mark.parametrize("type_name", [*gguf_file.BLOCK_TYPES, "F32", "F16", "BF16"])
def test_dequantization_equals_the_gguf_package_bit_for_bit(type_name):
    package = pytest.importorskip("gguf")
    rng = np.random.default_rng(1)
    rows = np.frombuffer(encode(rng.normal(size=(24, 96)), type_name), np.uint8).reshape(24, -1)
    info = gguf_file.TensorInfo(shape=(24, 96), type_id=TYPE_IDS[type_name], offset=0)
    ours = gguf_file.dequantize(rows, info)
    theirs = package.quants.dequantize(rows, package.GGMLQuantizationType[type_name])
    np.testing.assert_array_equal(ours.astype(np.float32), theirs)


@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 4))
@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
@pytest.mark.parametrize("type_name", gguf_file.BLOCK_TYPES)
def test_decoding_inverts_packing(type_name, seed, num_rows, groups):
    rng = np.random.default_rng(seed)
    low, high = (-128, 127) if type_name == "Q8_0" else (0, 15)
    codes = rng.integers(low, high, (num_rows * groups, 32), np.int8, endpoint=True)
    # Any bit pattern, NaN and infinity too: decoding is not where values are judged.
    scales, minima = rng.integers(0, 1 << 16, (2, num_rows * groups, 1), np.uint16).view("<f2")
    minima = minima if type_name == "Q4_1" else None
    rows = pack(codes, scales, minima).reshape(num_rows, -1)
    decoded, found_scales, found_minima = gguf_file.decode_blocks(rows, type_name)
    stored = codes.reshape(num_rows, -1)
    np.testing.assert_array_equal(decoded, stored - 8 if type_name == "Q4_0" else stored)
    np.testing.assert_array_equal(found_scales, scales.reshape(num_rows, groups))
    if minima is not None:
        np.testing.assert_array_equal(found_minima, minima.reshape(num_rows, groups))


def test_metadata_of_every_type_agrees_with_the_gguf_package(tmp_path):
    codes = dict(zip((0, 1, 2, 3, 4, 5, 6, 10, 11, 12), "BbHhIifQqd", strict=True))
    metadata = {f"scalar.{n}": (n, code, 3) for n, code in codes.items()}
    metadata |= {"flag": True, "text": "naïve", "ids": [3, -1], "tokens": ["a", "é", ""]}
    metadata |= {"general.architecture": "llama"}
    path = write(tmp_path / "m.gguf", metadata, {"x": ("F32", np.ones((2, 4)))})
    found = gguf_file.GGUFFile(path).metadata
    assert found == {key: v[2] if isinstance(v, tuple) else v for key, v in metadata.items()}
    package = pytest.importorskip("gguf")
    theirs = package.GGUFReader(path).fields
    assert {k: f.contents() for k, f in theirs.items() if not k.startswith("GGUF.")} == found


def test_config(tmp_path):
    metadata = METADATA | {"tokenizer.ggml.eot_token_id": 7}
    config = gguf.open_file(write(tmp_path / "m.gguf", metadata, tensors())).config
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (64, 96, VOCAB)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (2, HEADS, KV_HEADS)
    assert (config.head_dim, config.max_position_embeddings) == (HEAD_DIM, 128)
    assert config.rope == RopeConfig(theta=5e5)
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert config.tie_word_embeddings and not config.qkv_bias
    assert (config.bos_token_id, config.eos_token_ids) == (0, (1, 7))
    assert config.dtype == "float32"


def test_equals_the_hugging_face_checkpoint_it_was_made_from(tmp_path):
    """tiny-fp16 written the way llama.cpp's converter does: names and q/k row order come back."""
    original = checkpoints.open_checkpoint(paths.fixture("tiny-fp16"))
    config, converted = original.config, {}
    for name in original.source.names():
        array = original.source.read(name)
        if name.endswith("q_proj.weight"):
            array = to_gguf_rows(array, config.num_heads)
        if name.endswith("k_proj.weight"):
            array = to_gguf_rows(array, config.num_kv_heads)
        kind = "F16" if array.ndim == 2 else "F32"
        converted[gguf_architectures.gguf_name(name)] = (kind, array)
    metadata = METADATA | {
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.rope.dimension_count": config.head_dim,
        "llama.context_length": config.max_position_embeddings,
    }
    loaded = gguf.open_file(write(tmp_path / "m.gguf", metadata, converted))
    fields = vars(loaded.config) | {"source": config.source} | {"rms_norm_eps": config.rms_norm_eps}
    assert fields == vars(config)
    for name in original.source.names():
        expected = original.source.read(name)
        assert loaded.has(name)
        np.testing.assert_array_equal(loaded.tensor(name, expected.shape), expected)


@pytest.mark.parametrize("type_name", gguf_file.BLOCK_TYPES)
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_quantized_linears_keep_their_codes(tmp_path, type_name, name):
    stored = tensors(type_name, "Q8_0", biases=("attn_q", "attn_k", "attn_v"))
    loaded = gguf.open_file(write(tmp_path / "m.gguf", METADATA, stored))
    outputs, heads = {"q_proj": (64, HEADS)}.get(name, (32, KV_HEADS))
    linear = loaded.linear(f"model.layers.1.self_attn.{name}", outputs, HIDDEN, True)
    scheme = {"Q4_0": "w4a16", "Q4_1": "w4a16-asym", "Q8_0": "w8a16"}[type_name]
    assert (linear.scheme.name, linear.group_size) == (scheme, 32)
    assert linear.scales.dtype == np.float16
    key = f"blk.1.attn_{name[0]}"
    _, array = stored[f"{key}.weight"]
    rows = np.frombuffer(encode(array, type_name), np.uint8).reshape(outputs, -1)
    info = gguf_file.TensorInfo(shape=(outputs, 64), type_id=TYPE_IDS[type_name], offset=0)
    expected, bias = gguf_file.dequantize(rows, info), stored[f"{key}.bias"][1]
    np.testing.assert_allclose(expected, array, atol=0.5)
    dense = np.asarray(linear.dequantize())
    if name == "v_proj":
        np.testing.assert_array_equal(dense, expected)
        np.testing.assert_array_equal(linear.bias, bias)
    else:
        np.testing.assert_array_equal(to_gguf_rows(dense, heads), expected)
        np.testing.assert_array_equal(to_gguf_rows(np.asarray(linear.bias), heads), bias)


def test_quantized_embedding_is_decoded(tmp_path):
    stored = tensors("Q4_1", "Q8_0")
    loaded = gguf.open_file(write(tmp_path / "m.gguf", METADATA, stored))
    table = loaded.tensor("model.embed_tokens.weight", (VOCAB, HIDDEN))
    assert table.dtype == np.float32 and loaded.config.dtype == "bfloat16"
    np.testing.assert_allclose(table, stored["token_embd.weight"][1], atol=0.02)


def test_untied_head(tmp_path):
    loaded = gguf.open_file(write(tmp_path / "m.gguf", METADATA, tensors("Q8_0", tied=False)))
    assert not loaded.config.tie_word_embeddings
    assert loaded.linear("lm_head", VOCAB, HIDDEN, False).scheme.name == "w8a16"


def test_qwen2_rows_are_not_permuted(tmp_path):
    metadata = {k.replace("llama", "qwen2"): v for k, v in METADATA.items()}
    metadata["general.architecture"] = "qwen2"
    stored = tensors("F16", biases=("attn_q", "attn_k", "attn_v"))
    loaded = gguf.open_file(write(tmp_path / "m.gguf", metadata, stored))
    assert loaded.config.architecture == "Qwen2ForCausalLM"
    assert loaded.config.qkv_bias and not loaded.config.o_bias
    linear = loaded.linear("model.layers.0.self_attn.q_proj", 64, HIDDEN, True)
    assert isinstance(linear, Linear)
    expected = stored["blk.0.attn_q.weight"][1].astype(np.float16)
    np.testing.assert_array_equal(linear.weight[...], expected)
    np.testing.assert_array_equal(linear.bias[...], stored["blk.0.attn_q.bias"][1])


def k_quant_tensors() -> dict:
    """An output head in Q6_K: 40 rows of one block of 256, random codes, finite scales."""
    blocks = np.random.default_rng(3).integers(0, 256, (VOCAB, 210), np.uint8)
    blocks[:, 208:] = np.full((VOCAB, 1), 0.01, np.float16).view(np.uint8)
    wide = np.zeros((VOCAB, 256), np.float32)
    return {
        "token_embd.weight": ("F32", wide),
        "output.weight": ("Q6_K", (VOCAB, 256), blocks.tobytes()),
    }


def test_k_quants_go_through_the_gguf_package(tmp_path):
    package = pytest.importorskip("gguf")
    stored = k_quant_tensors()
    metadata = METADATA | {"llama.embedding_length": 256, "llama.rope.dimension_count": 64}
    loaded = gguf.open_file(write(tmp_path / "m.gguf", metadata, stored))
    blocks = np.frombuffer(stored["output.weight"][2], np.uint8).reshape(VOCAB, -1)
    expected = package.quants.dequantize(blocks, package.GGMLQuantizationType.Q6_K)
    linear = loaded.linear("lm_head", VOCAB, 256, False)
    np.testing.assert_array_equal(linear.weight[...], expected)


def test_k_quants_without_the_package_say_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", METADATA, k_quant_tensors())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"Q6_K.*pip install specjax\[gguf\]"):
        gguf.open_file(path)


LLAMA3 = RopeConfig(theta=5e5, kind="llama3", factor=32.0)


def rope_factors(head_dim: int) -> np.ndarray:
    """As llama.cpp's converter computes them for Llama 3.2."""
    factors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * 5e5 ** (2 * i / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(32.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / 32.0 + smooth))
    return np.array(factors, np.float32)


def test_llama3_rope_factors(tmp_path):
    stored = tensors() | {"rope_freqs.weight": ("F32", rope_factors(HEAD_DIM))}
    assert gguf.open_file(write(tmp_path / "m.gguf", METADATA, stored)).config.rope == LLAMA3
    ones = tensors() | {"rope_freqs.weight": ("F32", np.ones(HEAD_DIM // 2))}
    assert gguf.open_file(write(tmp_path / "m.gguf", METADATA, ones)).config.rope.kind == "default"


@pytest.mark.parametrize("factors", [np.linspace(1, 9, 8), np.zeros(8), np.ones(5)])
def test_other_rope_factors_are_refused(tmp_path, factors):
    stored = tensors() | {"rope_freqs.weight": ("F32", factors)}
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight"):
        gguf.open_file(write(tmp_path / "m.gguf", METADATA, stored))


def test_linear_rope_scaling(tmp_path):
    metadata = METADATA | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    config = gguf.open_file(write(tmp_path / "m.gguf", metadata, tensors())).config
    assert config.rope == RopeConfig(theta=5e5, kind="linear", factor=4.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma"}, r"general\.architecture = 'gemma'.*llama, qwen2"),
        ({"llama.rope.scaling.type": "yarn"}, r"llama\.rope\.scaling\.type = 'yarn'"),
        ({"llama.rope.dimension_count": 8}, r"llama\.rope\.dimension_count = 8"),
        ({"llama.attention.value_length": 8}, r"llama\.attention\.value_length = 8"),
        ({"llama.expert_count": 8}, r"llama\.expert_count = 8"),
        ({"llama.rope.scaling.type": "xpos"}, r"rope\.scaling\.type = 'xpos'"),
        ({"llama.block_count": None}, r"llama\.block_count is missing"),
        ({"llama.attention.head_count_kv": 3}, r"num_key_value_heads = 3"),
        ({"llama.attention.head_count_kv": [2, 2]}, r"num_key_value_heads = \[2, 2\]"),
        ({"llama.logit_scale": 8.0}, r"llama\.logit_scale = 8\.0: this setting of LlamaFor"),
        ({"llama.attention.causal": False}, r"llama\.attention\.causal = False"),
        ({"llama.final_logit_softcapping": 5.0}, r"llama\.final_logit_softcapping = 5\.0"),
        ({"llama.attention.max_alibi_bias": 8.0}, r"llama\.attention\.max_alibi_bias = 8\.0"),
    ],
)
def test_refused_metadata(tmp_path, change, message):
    metadata = {k: v for k, v in (METADATA | change).items() if v is not None}
    with pytest.raises(ConfigError, match=message):
        gguf.open_file(write(tmp_path / "m.gguf", metadata, tensors()))


def test_settings_that_change_nothing_are_no_obstacle(tmp_path):
    neutral = {
        "llama.logit_scale": 1.0,
        "llama.attention.causal": True,
        "llama.attention.scale": 0.0,
    }
    file = write(tmp_path / "m.gguf", METADATA | neutral, tensors())
    plain = write(tmp_path / "plain.gguf", METADATA, tensors())
    assert gguf.open_file(file).config == gguf.open_file(plain).config


def test_unknown_tensor_is_refused(tmp_path):
    stored = tensors() | {"blk.0.attn_q_norm.weight": ("F32", np.ones(HEAD_DIM))}
    with pytest.raises(CheckpointError, match=r"tensor blk\.0\.attn_q_norm\.weight is not part"):
        gguf.open_file(write(tmp_path / "m.gguf", METADATA, stored))


def test_wrong_shape_names_tensor_found_and_expected(tmp_path):
    loaded = gguf.open_file(write(tmp_path / "m.gguf", METADATA, tensors("Q4_1")))
    message = r"blk\.0\.ffn_up\.weight in .* has shape \[96, 64\].* asks for \[96, 128\]"
    with pytest.raises(CheckpointError, match=message):
        loaded.linear("model.layers.0.mlp.up_proj", FFN, 128, False)
    with pytest.raises(CheckpointError, match=r"blk\.9\.ffn_up\.weight is missing"):
        loaded.linear("model.layers.9.mlp.up_proj", FFN, HIDDEN, False)


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q8_0", "F32", "F16", "BF16"])
def test_not_finite_weight_names_the_tensor(tmp_path, type_name):
    stored = tensors(type_name)
    bad = bytearray(encode(stored["blk.1.ffn_up.weight"][1], type_name))
    width = gguf_file.TENSOR_TYPES[TYPE_IDS[type_name]][2]
    nan = np.array(
        np.nan, {"F32": "<f4", "BF16": ml_dtypes.bfloat16}.get(type_name, "<f2")
    ).tobytes()
    bad[-width : len(bad) - width + len(nan)] = nan
    stored["blk.1.ffn_up.weight"] = (type_name, (FFN, HIDDEN), bytes(bad))
    loaded = gguf.open_file(write(tmp_path / "m.gguf", METADATA, stored))
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight in .* has the value nan"):
        loaded.linear("model.layers.1.mlp.up_proj", FFN, HIDDEN, False)


def test_truncated_data_names_the_first_tensor_cut(tmp_path):
    path = write(tmp_path / "m.gguf", METADATA, tensors("Q4_1"))
    whole = path.read_bytes()
    info = gguf_file.GGUFFile(path).info("blk.1.attn_v.weight")
    path.write_bytes(whole[: info.offset + 10])
    with pytest.raises(CheckpointError, match=r"truncated at tensor blk\.1\.attn_v\.weight"):
        gguf.open_file(path)


def test_truncated_header_says_where(tmp_path):
    path = write(tmp_path / "m.gguf", METADATA, tensors())
    whole = path.read_bytes()
    for size, place in [(10, "the header"), (60, "metadata key general"), (1200, "tensor blk")]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=f"truncated at .*{place}"):
            gguf.open_file(path)


@pytest.mark.parametrize(
    ("position", "data", "message"),
    [
        (0, b"GGML", "does not start with GGUF"),
        (4, struct.pack("<I", 1), "version 1 is not supported"),
        (4, struct.pack(">I", 3), "big-endian"),
    ],
)
def test_malformed_start(tmp_path, position, data, message):
    path = write(tmp_path / "m.gguf", METADATA, tensors())
    whole = bytearray(path.read_bytes())
    whole[position : position + len(data)] = data
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=message):
        gguf.open_file(path)


def test_unknown_tensor_type_is_refused(tmp_path):
    stored = tensors() | {"output.weight": ("?", (VOCAB, HIDDEN), bytes(64))}
    with pytest.raises(
        CheckpointError, match=r"tensor output\.weight has type unknown to specjax \(number 99\)"
    ):
        gguf.open_file(write(tmp_path / "m.gguf", METADATA, stored))


@pytest.mark.parametrize("number, name", [(9, "Q8_1"), (26, "I32"), (31, "Q4_0_4_4")])
def test_types_that_hold_no_weights_are_refused_by_name(tmp_path, number, name):
    stored = tensors() | {"output.weight": ("?", (VOCAB, HIDDEN), bytes(64))}
    path = write(tmp_path / "m.gguf", METADATA, stored)
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 99), struct.pack("<I", number)))
    message = rf"tensor output\.weight has type {name} \(number {number}\), which is not supported"
    with pytest.raises(CheckpointError, match=message):
        gguf.open_file(path)


def test_every_block_type_is_decoded_as_the_gguf_package_does(tmp_path):
    package = pytest.importorskip("gguf")
    rng, stored = np.random.default_rng(4), tensors()
    kinds = {name: sizes for name, *sizes in gguf_file.TENSOR_TYPES.values() if sizes[0] > 1}
    for name, (elements, size) in kinds.items():
        # Bytes below 0x3c keep half-precision scales finite.
        data = rng.integers(0, 0x3C, (VOCAB, 256 // elements * size), np.uint8)
        stored = {**stored, "output.weight": (name, (VOCAB, 256), data.tobytes())}
        loaded = gguf.open_file(write(tmp_path / f"{name}.gguf", METADATA, stored))
        expected = package.quants.dequantize(data, package.GGMLQuantizationType[name])
        found = loaded.tensor("lm_head.weight", (VOCAB, 256))
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)


def test_nvfp4_weights_are_multiplied_by_their_scale(tmp_path):
    pytest.importorskip("gguf")
    rng = np.random.default_rng(5)
    data = rng.integers(0, 0x3C, (HIDDEN, 36), np.uint8).tobytes()
    plain = tensors() | {"blk.0.attn_output.weight": ("NVFP4", (HIDDEN, HIDDEN), data)}
    scale = {"blk.0.attn_output.scale": ("F32", np.array([0.5], np.float32))}
    found = [
        gguf.open_file(write(tmp_path / f"{i}.gguf", METADATA, stored))
        .linear("model.layers.0.self_attn.o_proj", HIDDEN, HIDDEN, False)
        .weight[...]
        for i, stored in enumerate([plain, plain | scale])
    ]
    np.testing.assert_array_equal(0.5 * found[0], found[1])


def test_text_that_is_not_utf8_is_an_error_where_it_is_read(tmp_path):
    path = write(tmp_path / "m.gguf", METADATA | {"general.description": "caf@"}, tensors())
    path.write_bytes(path.read_bytes().replace(b"caf@", b"caf\xe9"))
    loaded = gguf.open_file(path)
    assert loaded.config.num_layers == 2
    with pytest.raises(CheckpointError, match=r"general\.description = b'caf\\xe9' is not UTF-8"):
        loaded.file.metadata.get("general.description")
    path = write(tmp_path / "t.gguf", METADATA, tensors())
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xe9\xe9"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.tokens\[2\]"):
        gguf.open_file(path).file.metadata["tokenizer.ggml.tokens"]


def test_keys_and_tensors_that_stand_twice_are_refused(tmp_path):
    path = write(tmp_path / "m.gguf", METADATA | {"llama.block_counz": 3}, tensors())
    path.write_bytes(path.read_bytes().replace(b"block_counz", b"block_count"))
    with pytest.raises(CheckpointError, match=r"llama\.block_count: the key stands .* more than"):
        gguf.open_file(path)
    path = write(tmp_path / "t.gguf", METADATA, tensors())
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up", b"blk.0.ffn_up"))
    with pytest.raises(CheckpointError, match=r"tensor blk\.0\.ffn_up\.weight stands .* more than"):
        gguf.open_file(path)


def split(folder: Path, count: int = 3, stated: int | None = None) -> list[Path]:
    """A model in parts, as llama-gguf-split names and marks them."""
    stored = list(tensors().items())
    paths = []
    for index in range(count):
        marks = {"split.no": (2, "H", index), "split.count": (2, "H", count)}
        marks["split.tensors.count"] = (5, "i", len(stored) if stated is None else stated)
        metadata = (METADATA if index == 0 else {}) | marks
        path = folder / f"m-{index + 1:05d}-of-{count:05d}.gguf"
        paths.append(write(path, metadata, dict(stored[index::count])))
    return paths


def test_split_files_open_from_any_part(tmp_path):
    whole = gguf.open_file(write(tmp_path / "m.gguf", METADATA, tensors()))
    for path in split(tmp_path):
        found = gguf.open_file(path)
        assert set(found.file.names()) == set(whole.file.names())
        for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
            shape = found.file.info(gguf_architectures.gguf_name(name)).shape
            np.testing.assert_array_equal(found.tensor(name, shape), whole.tensor(name, shape))


def test_parts_that_are_missing_are_named(tmp_path):
    first, second, third = split(tmp_path)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"missing beside it: m-00002-of-00003\.gguf;"):
        gguf.open_file(third)
    first.unlink()
    with pytest.raises(CheckpointError, match=r"m-00001-of-00003\.gguf is missing.*metadata"):
        gguf.open_file(third)
    with pytest.raises(CheckpointError, match=r"its name must end in -00001-of-00003\.gguf"):
        gguf.open_file(third.rename(tmp_path / "renamed.gguf"))


def test_parts_of_another_place_or_model_are_refused(tmp_path):
    first, second, third = split(tmp_path)
    data = third.read_bytes()
    third.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match=r"00003-of-00003.*split\.no = 1 .*expected 2"):
        gguf.open_file(first)
    third.write_bytes(data)
    split(tmp_path, stated=30)
    with pytest.raises(CheckpointError, match=r"split\.tensors\.count = 30, but its parts hold 20"):
        gguf.open_file(first)


def test_a_missing_part_without_tensors_is_no_loss(tmp_path, caplog):
    """As some repositories have them: the first part says that it holds all tensors."""
    paths = split(tmp_path, count=1)
    stored, marks = tensors(), {"split.no": (2, "H", 0), "split.count": (2, "H", 2)}
    marks["split.tensors.count"] = (5, "i", len(stored))
    path = write(tmp_path / "m-00001-of-00002.gguf", METADATA | marks, stored)
    assert gguf.open_file(path).file.names() == gguf.open_file(paths[0]).file.names()
    assert "m-00002-of-00002.gguf missing" in caplog.text


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path):
    stored = tensors() | {"output.weight": ("Q4_1", (2, 40), bytes(64))}
    with pytest.raises(CheckpointError, match="rows of 40 elements in Q4_1 blocks of 32"):
        gguf.open_file(write(tmp_path / "m.gguf", METADATA, stored))


def test_the_model_that_ships():
    """Against the gguf package, where the file is in the cache."""
    package = pytest.importorskip("gguf")
    model = hub.NAMED_MODELS["smollm2-135m"]
    path = hub.default_cache_dir() / "specjax" / "smollm2-135m" / model.file_name
    if not path.is_file():
        pytest.skip(f"{path} has not been fetched")
    loaded = checkpoints.open_checkpoint(path)
    config = loaded.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    assert (config.vocab_size, config.eos_token_ids) == (49152, (2,))
    assert loaded.file.metadata["tokenizer.ggml.model"] == "gpt2"
    theirs = {t.name: t for t in package.GGUFReader(path).tensors}
    for name, shape in [("k_proj", (192, 576)), ("v_proj", (192, 576)), ("o_proj", (576, 576))]:
        ours = loaded.linear(f"model.layers.7.self_attn.{name}", *shape, False)
        tensor = theirs[gguf_architectures.gguf_name(f"model.layers.7.self_attn.{name}.weight")]
        expected = package.quants.dequantize(tensor.data, tensor.tensor_type)
        dense = np.asarray(ours.dequantize())
        dense = to_gguf_rows(dense, 3) if name == "k_proj" else dense
        np.testing.assert_array_equal(dense, expected)


def test_blocks_beyond_those_that_are_counted_are_refused(tmp_path):
    path = write(tmp_path / "m.gguf", METADATA | {"llama.block_count": 1}, tensors())
    message = r"holds blk\.1\..* num_hidden_layers \(block_count\) = 1: state 2, or remove"
    with pytest.raises(CheckpointError, match=message):
        checkpoints.open_checkpoint(path)


def test_wrong_settings_are_named_by_their_key(tmp_path):
    path = write(tmp_path / "m.gguf", METADATA | {"llama.embedding_length": 2.5}, tensors())
    with pytest.raises(ConfigError, match=r"metadata key llama\.embedding_length: hidden_size = 2"):
        gguf.open_file(path)
