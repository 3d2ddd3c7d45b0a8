"""Builds `tokenizers` pipelines from the vocabularies that GGUF files store.

GGUF names the kind in `tokenizer.ggml.model`: "gpt2" is byte-level BPE with merges, cut beforehand
by the regular expressions that `tokenizer.ggml.pre` names; "llama" is SentencePiece BPE with scores
and byte fallback. The expressions are those of llama.cpp's `llama-vocab.cpp`; the extras of a
pipeline (NFC, ignored merges) are those of the models' own tokenizer.json.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from specjax.errors import CheckpointError, ConfigError
from specjax.text import pipelines, special_ids

_log = logging.getLogger(__name__)

_SPECIAL_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


_PLAIN = pipelines.Cut(patterns=(_GPT2,))
_DIGITS = pipelines.Cut(patterns=(r"\p{N}", _GPT2))
_LLAMA3_CUT = pipelines.Cut(patterns=(_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN2 = pipelines.Cut(patterns=(_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),), nfc=True)
_CUTS = {
    "default": pipelines.Cut(
        patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    ),
    "gpt-2": _PLAIN,
    "llama-bpe": _LLAMA3_CUT,
    "llama3": _LLAMA3_CUT,
    "llama-v3": _LLAMA3_CUT,
    "falcon3": _LLAMA3_CUT,
    "dbrx": pipelines.Cut(patterns=(_LLAMA3,)),
    "smaug-bpe": pipelines.Cut(patterns=(_LLAMA3,)),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "codeshell": _DIGITS,
    "tekken": pipelines.Cut(patterns=(_TEKKEN,), ignore_merges=True, add_bos=True),
    "deepseek-coder": pipelines.Cut(
        patterns=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    ),
}


def from_gguf(metadata: Mapping[str, Any], source: str):
    """The pipeline of a GGUF file.

    Args:
        metadata: all keys of the file; arrays as sequences.
        source: what errors call the file.
    Returns:
        (tokenizers.Tokenizer, special tokens by their Hugging Face names, e.g. "bos_token").
    Raises:
        ConfigError: a tokenizer model or pre-tokenizer that is not supported, by its key.
        CheckpointError: a part of the vocabulary is missing or contradicts another.
    """
    keys = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items()}
    tokens = _required(keys, "tokens", source)
    specials = _specials(keys, tokens, source)
    types = keys.get("token_type")
    if types is None:
        types = [
            pipelines.CONTROL if token in specials.values() else pipelines.NORMAL
            for token in tokens
        ]
    if len(types) != len(tokens):
        raise CheckpointError(f"{source}: {len(tokens)} tokens, but {len(types)} token types")
    types = _with_ends(tokens, types, source)
    match keys.get("model"):
        case "gpt2":
            cut = _cut(keys.get("pre"), source)
            merges = _required(keys, "merges", source)
            backend = pipelines.byte_level(tokens, types, merges, cut, source)
            add_bos = cut.add_bos
        case "llama":
            scores = _required(keys, "scores", source)
            add_space = bool(keys.get("add_space_prefix", True))
            backend = pipelines.sentencepiece(tokens, types, scores, add_space, source)
            add_bos = True
        case other:
            raise ConfigError(
                f"{source}: tokenizer.ggml.model = {other!r} is not supported (gpt2, llama); convert the "
                "model to a Hugging Face directory with tokenizer.json, or pass input_ids"
            )
    pipelines.add_ends(
        backend,
        specials.get("bos_token") if keys.get("add_bos_token", add_bos) else None,
        specials.get("eos_token") if keys.get("add_eos_token", False) else None,
    )
    return backend, specials


def _specials(keys: Mapping[str, Any], tokens: Sequence[str], source: str) -> dict[str, str]:
    specials = {}
    for name, key in _SPECIAL_KEYS.items():
        if (i := keys.get(key)) is None:
            continue
        if not 0 <= i < len(tokens):
            raise CheckpointError(
                f"{source}: tokenizer.ggml.{key} = {i}, but there are {len(tokens)} tokens"
            )
        specials[name] = tokens[i]
    return specials


def _with_ends(tokens: Sequence[str], types: Sequence[int], source: str) -> Sequence[int]:
    """The types, in which unmistakable ends of turns are control tokens, whatever the file calls them."""
    wrong = {
        i
        for i, token in enumerate(tokens)
        if token in special_ids.UNMISTAKABLE
        and types[i] in (pipelines.NORMAL, pipelines.USER_DEFINED)
    }
    if not wrong:
        return types
    names = ", ".join(tokens[i] for i in sorted(wrong))
    _log.warning("%s: %s: taken as control tokens, which the file does not say", source, names)
    return [pipelines.CONTROL if i in wrong else kind for i, kind in enumerate(types)]


def _required(keys: Mapping[str, Any], key: str, source: str) -> Any:
    if keys.get(key) is None:
        raise CheckpointError(f"{source}: metadata key tokenizer.ggml.{key} is missing")
    return keys[key]


def _cut(name: str | None, source: str) -> pipelines.Cut:
    if name is None:
        _log.warning("%s: no tokenizer.ggml.pre; text is cut as llama.cpp does by default", source)
        name = "default"
    if name not in _CUTS:
        raise ConfigError(
            f"{source}: tokenizer.ggml.pre = {name!r} is not supported ({', '.join(_CUTS)}); convert the "
            "model to a Hugging Face directory with tokenizer.json, or pass input_ids"
        )
    return _CUTS[name]
