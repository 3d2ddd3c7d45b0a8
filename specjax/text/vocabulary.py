"""Builds `tokenizers` pipelines from the vocabularies that GGUF files and SentencePiece models store.

GGUF names the kind in `tokenizer.ggml.model`: "gpt2" is byte-level BPE with merges, cut beforehand
by the regular expressions that `tokenizer.ggml.pre` names; "llama" is SentencePiece BPE with scores
and byte fallback. The expressions are those of llama.cpp's `llama-vocab.cpp`; the extras of a
pipeline (NFC, ignored merges) are those of the models' own tokenizer.json.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from specjax.errors import CheckpointError, ConfigError
from specjax.text import special_ids

_log = logging.getLogger(__name__)

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # token types of GGUF and SentencePiece
_SPECIAL_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_SENTENCEPIECE_BPE = 2  # TrainerSpec.ModelType
_SPACE = "▁"  # SentencePiece's mark of a space

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


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """How text is cut before byte-level BPE.

    Attributes:
        patterns: each isolates its matches in the pieces that the one before left.
        ignore_merges: a piece that is a token as a whole is taken whole.
        add_bos: the default where the file does not say.
        nfc: text is brought to Unicode's composed form first.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_PLAIN = _Cut(patterns=(_GPT2,))
_DIGITS = _Cut(patterns=(r"\p{N}", _GPT2))
_LLAMA3_CUT = _Cut(patterns=(_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN2 = _Cut(patterns=(_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),), nfc=True)
_CUTS = {
    "default": _Cut(
        patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    ),
    "gpt-2": _PLAIN,
    "llama-bpe": _LLAMA3_CUT,
    "llama3": _LLAMA3_CUT,
    "llama-v3": _LLAMA3_CUT,
    "falcon3": _LLAMA3_CUT,
    "dbrx": _Cut(patterns=(_LLAMA3,)),
    "smaug-bpe": _Cut(patterns=(_LLAMA3,)),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "codeshell": _DIGITS,
    "tekken": _Cut(patterns=(_TEKKEN,), ignore_merges=True, add_bos=True),
    "deepseek-coder": _Cut(
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
        types = [_CONTROL if token in specials.values() else _NORMAL for token in tokens]
    if len(types) != len(tokens):
        raise CheckpointError(f"{source}: {len(tokens)} tokens, but {len(types)} token types")
    types = _with_ends(tokens, types, source)
    match keys.get("model"):
        case "gpt2":
            cut = _cut(keys.get("pre"), source)
            merges = _required(keys, "merges", source)
            backend = _byte_level(tokens, types, merges, cut, source)
            add_bos = cut.add_bos
        case "llama":
            scores = _required(keys, "scores", source)
            add_space = bool(keys.get("add_space_prefix", True))
            backend = _sentencepiece(tokens, types, scores, add_space, source)
            add_bos = True
        case other:
            raise ConfigError(
                f"{source}: tokenizer.ggml.model = {other!r} is not supported (gpt2, llama); convert the "
                "model to a Hugging Face directory with tokenizer.json, or pass input_ids"
            )
    _add_ends(
        backend,
        specials.get("bos_token") if keys.get("add_bos_token", add_bos) else None,
        specials.get("eos_token") if keys.get("add_eos_token", False) else None,
    )
    return backend, specials


def from_sentencepiece(
    path: Path,
    *,
    add_bos: bool = True,
    add_eos: bool = False,
    specials: Mapping[str, str | None] = MappingProxyType({}),
    spaces: str | None = None,
    added: Mapping[int, Mapping[str, Any]] = MappingProxyType({}),
):
    """The pipeline of a SentencePiece model file (tokenizer.model): BPE without text normalization.

    Args:
        add_bos, add_eos: put BOS before a text, EOS behind it.
        specials: special tokens by their Hugging Face names, where they are not the model's own; None: there is none.
        spaces: where a text that begins without a space gets one: "first", "always" (behind every special token too)
            or "never"; None: SentencePiece's own rule, which asks the model, and adds one to a text that has one.
        added: tokens by id, as fields of `tokenizers.AddedToken`; they replace the model's own of the same id.
    Returns:
        (tokenizers.Tokenizer, special tokens by their Hugging Face names).
    Raises:
        ConfigError: another kind of model, or a needed package is missing.
        CheckpointError: the file is not a SentencePiece model, or the added tokens contradict it.
    """
    from tokenizers import pre_tokenizers

    proto = _read_sentencepiece(path)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != _SENTENCEPIECE_BPE or normalizer.precompiled_charsmap:
        raise ConfigError(
            f"{path}: SentencePiece model_type = {trainer.model_type}, normalization "
            f"{normalizer.name!r}: only BPE (2) without normalization is supported; add tokenizer.json"
        )
    tokens = [piece.piece for piece in proto.pieces]
    ids = {"bos": trainer.bos_id, "eos": trainer.eos_id, "unk": trainer.unk_id}
    own = {f"{name}_token": tokens[i] for name, i in ids.items() if 0 <= i < len(tokens)}
    space = normalizer.add_dummy_prefix if spaces is None else spaces != "never"
    backend = _sentencepiece(
        tokens,
        [piece.type for piece in proto.pieces],
        [piece.score for piece in proto.pieces],
        space,
        str(path),
        added,
    )
    if spaces is not None:
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, spaces, split=False)
    specials = {name: token for name, token in {**own, **specials}.items() if token is not None}
    ends = [
        token if wanted and backend.token_to_id(token or "") is not None else None
        for token, wanted in (
            (specials.get("bos_token"), add_bos),
            (specials.get("eos_token"), add_eos),
        )
    ]
    _add_ends(backend, *ends)
    return backend, specials


def _read_sentencepiece(path: Path):
    try:
        from google.protobuf.message import DecodeError
        from transformers.convert_slow_tokenizer import import_protobuf

        proto = import_protobuf().ModelProto()
    except ImportError as error:
        raise ConfigError(
            f"{path}: reading it needs the protobuf package (pip install protobuf); or add tokenizer.json"
        ) from error
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise CheckpointError(
            f"{path}: not a SentencePiece model, or truncated: {error}"
        ) from error
    if not proto.pieces:
        raise CheckpointError(f"{path}: the SentencePiece model has no pieces")
    return proto


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
        if token in special_ids.UNMISTAKABLE and types[i] in (_NORMAL, _USER_DEFINED)
    }
    if not wrong:
        return types
    names = ", ".join(tokens[i] for i in sorted(wrong))
    _log.warning("%s: %s: taken as control tokens, which the file does not say", source, names)
    return [_CONTROL if i in wrong else kind for i, kind in enumerate(types)]


def _required(keys: Mapping[str, Any], key: str, source: str) -> Any:
    if keys.get(key) is None:
        raise CheckpointError(f"{source}: metadata key tokenizer.ggml.{key} is missing")
    return keys[key]


def _cut(name: str | None, source: str) -> _Cut:
    if name is None:
        _log.warning("%s: no tokenizer.ggml.pre; text is cut as llama.cpp does by default", source)
        name = "default"
    if name not in _CUTS:
        raise ConfigError(
            f"{source}: tokenizer.ggml.pre = {name!r} is not supported ({', '.join(_CUTS)}); convert the "
            "model to a Hugging Face directory with tokenizer.json, or pass input_ids"
        )
    return _CUTS[name]


def _byte_level(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], cut: _Cut, source: str
):
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    splits = [
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in cut.patterns
    ]
    backend = _backend(
        lambda vocab: models.BPE(vocab, pairs, ignore_merges=cut.ignore_merges),
        tokens,
        types,
        source,
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if cut.nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    tokens: Sequence[str],
    types: Sequence[int],
    scores: Sequence[float],
    add_space: bool,
    source: str,
    added: Mapping[int, Mapping[str, Any]] = MappingProxyType({}),
):
    """SentencePiece merges the best-scored adjacent pair first: merges ordered by score say the same.

    As in llama.cpp and in Llama-2's own tokenizer.json, `add_space` puts a space before every
    stretch of text, so also behind a control token.
    """
    from tokenizers import decoders, models, normalizers

    if len(scores) != len(tokens):
        raise CheckpointError(f"{source}: {len(tokens)} tokens, but {len(scores)} scores")
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    merges = _merges(tokens, types, scores)
    backend = _backend(
        lambda vocab: models.BPE(
            vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
        ),
        tokens,
        types,
        source,
        added,
    )
    prefix = [normalizers.Prepend(_SPACE)] if add_space else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if add_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    ids = {token: i for i, token in enumerate(tokens) if types[i] == _NORMAL}
    found = []
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-scores[i], i, ids[left], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _backend(
    model,
    tokens: Sequence[str],
    types: Sequence[int],
    source: str,
    added: Mapping[int, Mapping[str, Any]] = MappingProxyType({}),
):
    """A pipeline around `model(vocab)` in which control, user-defined and added tokens are cut out of text first."""
    import tokenizers

    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise CheckpointError(f"{source}: token {twice!r} stands in the vocabulary more than once")
    vocab = _renamed(vocab, tokens, added, source)
    try:
        backend = tokenizers.Tokenizer(model(vocab))
    except Exception as error:
        raise CheckpointError(f"{source}: the vocabulary is inconsistent: {error}") from error
    kinds = [
        (token, kind)
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if i not in added
    ]
    make = lambda token, special: tokenizers.AddedToken(token, special=special, normalized=False)
    backend.add_special_tokens([make(t, True) for t, k in kinds if k in (_CONTROL, _UNKNOWN)])
    backend.add_tokens([make(t, False) for t, k in kinds if k == _USER_DEFINED])
    # Looked for in the text itself: the normalizer would put a space before their names too.
    names = ("content", "single_word", "lstrip", "rstrip", "special")
    for _, fields in sorted(added.items()):
        given = {name: fields[name] for name in names if name in fields}
        backend.add_tokens([tokenizers.AddedToken(**given, normalized=False)])
    return backend


def _renamed(
    vocab: dict[str, int],
    tokens: Sequence[str],
    added: Mapping[int, Mapping[str, Any]],
    source: str,
) -> dict[str, int]:
    """The vocabulary with added tokens at their ids, which may lie in it or beyond it and leave gaps."""
    for i, fields in added.items():
        token = fields["content"]
        if vocab.get(token, i) != i:
            raise CheckpointError(
                f"{source}: token {token!r} is number {vocab[token]}, and {i} among the added tokens"
            )
        if i < len(tokens) and tokens[i] != token:
            del vocab[tokens[i]]
        vocab[token] = i
    return vocab


def _add_ends(backend, bos: str | None, eos: str | None) -> None:
    """Lets `encode(..., add_special_tokens=True)` put `bos` before and `eos` behind a text."""
    from tokenizers import processors

    if bos is None and eos is None:
        return
    ends = [token for token in dict.fromkeys((bos, eos)) if token is not None]
    backend.post_processor = processors.TemplateProcessing(
        single=[piece for piece in (bos, "$A", eos) if piece is not None],
        special_tokens=[(token, backend.token_to_id(token)) for token in ends],
    )
