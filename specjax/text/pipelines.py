"""Pipelines of `tokenizers` for vocabularies that come as lists of tokens: byte-level and SentencePiece BPE."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from specjax.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # token types of GGUF and SentencePiece
SPACE = "▁"  # SentencePiece's mark of a space


@dataclass(frozen=True, kw_only=True)
class Cut:
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


def byte_level(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], cut: Cut, source: str
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


def sentencepiece(
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
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
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
    prefix = [normalizers.Prepend(SPACE)] if add_space else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if add_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    ids = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
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
    backend.add_special_tokens([make(t, True) for t, k in kinds if k in (CONTROL, UNKNOWN)])
    backend.add_tokens([make(t, False) for t, k in kinds if k == USER_DEFINED])
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


def add_ends(backend, bos: str | None, eos: str | None) -> None:
    """Lets `encode(..., add_special_tokens=True)` put `bos` before and `eos` behind a text."""
    from tokenizers import processors

    if bos is None and eos is None:
        return
    ends = [token for token in dict.fromkeys((bos, eos)) if token is not None]
    backend.post_processor = processors.TemplateProcessing(
        single=[piece for piece in (bos, "$A", eos) if piece is not None],
        special_tokens=[(token, backend.token_to_id(token)) for token in ends],
    )
