"""Small checkpoints whose greedy text is chosen: what follows each token is written into the output head."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from tests import paths


def chain(*ids: int) -> dict[int, int]:
    """`follows` of a sequence of different tokens."""
    return dict(itertools.pairwise(ids))


def tensors(vocab_size: int, follows: Mapping[int, int]) -> dict[str, np.ndarray]:
    """Parameters of one layer that adds nothing, under Hugging Face names; what follows no token follows itself."""
    width = -(-vocab_size // 32) * 32
    head = np.zeros((vocab_size, width), np.float16)
    for token in range(vocab_size):
        head[follows.get(token, token), token] = 1
    found = {
        "model.embed_tokens.weight": np.eye(vocab_size, width, dtype=np.float16),
        "model.norm.weight": np.ones(width, np.float16),
        "lm_head.weight": head,
    }
    layer = "model.layers.0"
    for name in ("input_layernorm", "post_attention_layernorm"):
        found[f"{layer}.{name}.weight"] = np.ones(width, np.float16)
    for name in "qkvo":
        found[f"{layer}.self_attn.{name}_proj.weight"] = np.zeros((width, width), np.float16)
    for name, shape in (("gate", (8, width)), ("up", (8, width)), ("down", (width, 8))):
        found[f"{layer}.mlp.{name}_proj.weight"] = np.zeros(shape, np.float16)
    return found


def write(folder: Path, vocab_size: int, follows: Mapping[int, int], **config) -> Path:
    """A Llama directory without tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = tensors(vocab_size, follows)
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": parameters["model.norm.weight"].size,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(fields | config))
    safetensors.numpy.save_file(parameters, folder / "model.safetensors", {"format": "pt"})
    return folder


def add_tokenizer(folder: Path, specials: tuple[str, ...] = (), **settings) -> dict[str, int]:
    """The first 300 tokens of tiny-fp16's tokenizer, then special tokens; returns its vocabulary."""
    source = paths.fixture("tiny-fp16")
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = {token: i for token, i in content["model"]["vocab"].items() if i < 300}
    joined = lambda merge: "".join(merge if isinstance(merge, list) else merge.split(" "))
    content["model"] |= {
        "vocab": vocab,
        "merges": [merge for merge in content["model"]["merges"] if joined(merge) in vocab],
    }
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {token: 300 + i for i, token in enumerate(specials)}
    content["added_tokens"] += [
        {"id": i, "content": token, "special": True, **flags} for token, i in added.items()
    ]
    stated = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(stated | settings))
    return vocab | added
