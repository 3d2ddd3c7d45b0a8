"""Heads that draft blocks (DFlash, DSpark, JetSpec), from the layouts of speculators, z-lab, SpecForge and DeepSpec."""

import dataclasses

import jax.numpy as jnp

from specjax.checkpoints import head_settings, heads
from specjax.checkpoints.head_folder import HeadFolder, check_fit
from specjax.config import ModelConfig
from specjax.config.architectures import parts
from specjax.models import layers as nn
from specjax.models import llama, markov
from specjax.models.block import BlockHead, Layout
from specjax.models.llama import Llama

# Settings that would change what a block is, and the only values of them that are supported.
_ONLY = {"attention_sink_bias": False, "is_neox_style": True}


def is_block(folder: HeadFolder) -> bool:
    """Whether a folder holds a head of this family."""
    return {"fc.weight", "hidden_norm.weight"} <= folder.names


def is_corrected(folder: HeadFolder) -> bool:
    """Whether its drafts depend on each other, or it knows how sure they are: DSpark."""
    return any(name.startswith(("markov_head.", "confidence_head.")) for name in folder.names)


def open_block(folder: HeadFolder, target: Llama) -> BlockHead:
    """The network, in the target's compute dtype.

    Raises:
        ConfigError: it was made for a target of another shape, or a setting is not supported.
        CheckpointError: tensors are missing or malformed.
    """
    config = folder.shape("qwen3")
    check_fit(folder, config, target.config, "vocab_size")
    for name, supported in _ONLY.items():
        folder.refuse(name, supported)
    folder.refuse("target_hidden_size", target.config.hidden_size)
    folder.refuse("num_target_layers", target.config.num_layers)
    num_drafts, d2t = head_settings.draft_offsets(folder, config.vocab_size)
    own = {name: f"{name}.weight" in folder.names for name in ("embed_tokens", "lm_head")}
    heads.check_shared(folder, config, target, own, num_drafts)
    ids = head_settings.layer_ids(folder, target.config.num_layers, _default_ids(folder, target))
    layout = _layout(folder, config, target)
    config = dataclasses.replace(config, windows=())
    return _build(folder, config, target, layout, ids, num_drafts, d2t, own)


def own_depth(folder: HeadFolder, head: BlockHead) -> int:
    """Drafts of a round: all of a block, unless the file states fewer."""
    stated = head_settings.draft_length(folder, "num_speculative_tokens", default=head.num_drafts)
    return min(stated, head.num_drafts)


def _default_ids(folder: HeadFolder, target: Llama) -> tuple[int, ...] | None:
    """The states that z-lab's code reads where the file does not say; None: as everywhere else."""
    if folder.says is not None:
        return None
    count, last = folder.size("num_hidden_layers"), target.config.num_layers
    if count == 1:
        return (last // 2 + 1,)
    return tuple(round(1 + j * (last - 4) / (count - 1)) + 1 for j in range(count))


def _layout(folder: HeadFolder, config: ModelConfig, target: Llama) -> Layout:
    windows = config.windows or (None,) * config.num_layers
    if folder.flag("use_swa"):
        window = folder.size("swa_window_size")
        windows = tuple(window if w is None else min(w, window) for w in windows)
    # Gemma's factor is part of the module that z-lab's code calls; Granite's is outside of it.
    within = target.config.architecture.startswith("Gemma") and folder.says is None
    return Layout(
        size=folder.size("block_size"),
        mask_token=folder.token("mask_token_id", vocab_size=config.vocab_size),
        fill_in=not _anchor_first(folder),
        causal=_causal(folder, config.num_layers),
        windows=windows,
        embedding_multiplier=target.config.embedding_multiplier if within else 1.0,
    )


def _anchor_first(folder: HeadFolder) -> bool:
    """Whether the root's row drafts: as stated, else in DeepSpec's flat layout only; older files are fill-in."""
    flat = folder.says is None and "dflash_config" not in folder.raw
    return folder.flag("sample_from_anchor", default=flat and "target_layer_ids" in folder.raw)


def _causal(folder: HeadFolder, count: int) -> tuple[bool, ...]:
    """Of each layer; vLLM's order: what is stated for all, then sliding layers are causal and others are not."""
    for name in ("is_causal", "causal", "causal_head"):
        if folder.setting(name) is not None:
            return (folder.flag(name),) * count
    types = folder.setting("layer_types") or [parts.FULL] * count
    both_ways = folder.flag("sliding_window_non_causal")
    return tuple(kind == parts.SLIDING and not both_ways for kind in types)


def _build(folder, config, target, layout, ids, num_drafts, d2t, own) -> BlockHead:
    checkpoint, dtype = folder.checkpoint(config), target.dtype
    hidden, vocab = config.hidden_size, config.vocab_size
    fused = len(ids) * target.config.hidden_size
    more = {}
    if own["embed_tokens"]:
        table = checkpoint.tensor("embed_tokens.weight", (vocab, hidden))
        more["embed_tokens"] = nn.Embedding(jnp.asarray(table, dtype))
    if own["lm_head"]:
        more["lm_head"] = llama.build_linear(
            checkpoint, "lm_head", num_drafts, hidden, False, dtype
        )
    if checkpoint.has("input_norm.weight"):
        more["input_norm"] = llama.build_norm(checkpoint, "input_norm", dtype, fused)
    return BlockHead(
        config,
        layout,
        ids,
        llama.build_linear(checkpoint, "fc", hidden, fused, checkpoint.has("fc.bias"), dtype),
        llama.build_norm(checkpoint, "hidden_norm", dtype),
        [
            llama.build_layer(checkpoint, index, dtype, f"layers.{index}")
            for index in range(config.num_layers)
        ],
        llama.build_norm(checkpoint, "norm", dtype),
        d2t=d2t,
        **more,
        **_corrections(folder, checkpoint, config, num_drafts, dtype),
    )


def _corrections(folder: HeadFolder, checkpoint, config: ModelConfig, num_drafts: int, dtype):
    """The term of the token before, and the confidence, where the file has them."""
    found, hidden, w1 = {}, config.hidden_size, None

    def linear(name: str, out: int, inp: int):
        bias = checkpoint.has(f"{name}.bias")
        return llama.build_linear(checkpoint, name, out, inp, bias, dtype)

    rank = folder.setting("markov_rank") or 0
    if rank or "markov_head.markov_w1.weight" in folder.names:
        rank, kind = folder.size("markov_rank"), folder.setting("markov_head_type") or "vanilla"
        if kind not in markov.KINDS:
            raise folder.error(
                f"markov_head_type = {kind!r}: supported are {', '.join(markov.KINDS)}"
            )
        table = checkpoint.tensor("markov_head.markov_w1.weight", (config.vocab_size, rank))
        w1 = nn.Embedding(jnp.asarray(table, dtype))
        mix = {
            "vanilla": lambda: None,
            "gated": lambda: linear("markov_head.gate_proj", rank, hidden + rank),
            "rnn": lambda: linear("markov_head.joint_proj", 3 * rank, 2 * rank + hidden),
        }[kind]()
        w2 = linear("markov_head.markov_w2", num_drafts, rank)
        found["markov"] = markov.Markov(kind, w1, w2, mix)
    if "confidence_head.proj.weight" in folder.names:
        width = folder.tensors.shape("confidence_head.proj.weight")[-1]
        joined = folder.flag("confidence_head_with_markov", default=width != hidden)
        if joined and w1 is None:
            raise folder.error("confidence_head_with_markov = True: there is no markov_head")
        proj = linear("confidence_head.proj", 1, hidden + rank if joined else hidden)
        found["confidence"] = markov.Confidence(proj, w1 if joined else None)
    return found
