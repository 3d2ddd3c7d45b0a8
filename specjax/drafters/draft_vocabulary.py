"""Reduced draft vocabularies (FR-Spec, arXiv 2502.14856).

Most text needs few tokens, so a draft head scores only those. Verification keeps the full vocabulary: a token that is
left out costs acceptance and nothing else.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from specjax.errors import ConfigError
from specjax.files import writer

FILE_NAME = "token_frequencies.json"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class TokenRanking:
    """Tokens of a vocabulary, the most frequent first.

    Attributes:
        token_ids: distinct ids; tokens that never occurred may be missing.
        vocab_size: of the model.
        num_tokens: tokens that were counted; 0 where the order comes from the tokenizer's merges.
        coverage: of token_ids[: i + 1], the share of the counted tokens; empty without counts.
        source: where the order comes from.
        tokenizer: digest of the tokenizer (see `Tokenizer.digest`).
    """

    token_ids: list[int]
    vocab_size: int
    num_tokens: int
    coverage: list[float]
    source: str
    tokenizer: str

    def first(self, size: int | None, always: Iterable[int] = ()) -> Int[np.ndarray, "U"]:
        """The `size` most frequent ids (default: all that are listed) with `always` among them, ascending.

        Raises:
            ConfigError: the list is shorter than `size`.
        """
        size = len(self.token_ids) if size is None else size
        if not 1 <= size <= len(self.token_ids):
            raise ConfigError(
                f"vocabulary_size={size}: {self.source} lists {len(self.token_ids)} tokens"
            )
        always = list(dict.fromkeys(always))
        kept = [i for i in self.token_ids if i not in set(always)][: max(size - len(always), 0)]
        return np.sort(np.asarray([*always, *kept], np.int32))


def from_documents(
    documents: Sequence[Sequence[int]], model: Any, source: str, size: int | None = None
) -> TokenRanking:
    """Ranks by counting; ids that occur equally often stand in order.

    Args:
        model: a `specjax.LanguageModel`.
        size: list so many ids, or all; None: those that occur. Where fewer occur, others follow in the order of the
            tokenizer's merges, if it has some, which knows more than a short text of the rarer half of a vocabulary.
    """
    tokens = np.concatenate([np.asarray(document, np.int64) for document in documents])
    counts = np.bincount(tokens, minlength=model.config.vocab_size)
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist()
    if size is not None:
        order = list(dict.fromkeys([*order, *_merge_order(model)]))[:size]
    coverage = np.cumsum(counts[order]) / max(counts.sum(), 1)
    return TokenRanking(
        token_ids=order,
        vocab_size=model.config.vocab_size,
        num_tokens=len(tokens),
        coverage=np.round(coverage, 6).tolist(),
        source=source,
        tokenizer=_tokenizer_of(model).digest(),
    )


def from_merges(model: Any) -> TokenRanking:
    """Ranks without any text: byte-pair encoding merges frequent pairs first, so early merges are frequent tokens.

    Raises:
        ConfigError: the model's tokenizer has no merges.
    """
    order = _merge_order(model)
    if not order:
        raise ConfigError(
            f"vocabulary_size: the tokenizer of {model.name!r} has no merges to rank tokens by; count a text "
            "instead: python -m experiments.token_frequencies"
        )
    return TokenRanking(
        token_ids=order,
        vocab_size=model.config.vocab_size,
        num_tokens=0,
        coverage=[],
        source=f"the merges of {model.name}",
        tokenizer=_tokenizer_of(model).digest(),
    )


def _merge_order(model: Any) -> list[int]:
    """Ids in the order in which the tokenizer's merges make them; none without merges."""
    vocab, merges = _tokenizer_of(model).merges()
    if not merges:
        return []
    merged = [vocab[token] for token in merges if token in vocab]
    alphabet = sorted(set(vocab.values()) - set(merged))
    return list(dict.fromkeys([*alphabet, *merged]))


def write(ranking: TokenRanking, path: Path) -> None:
    """Writes a ranking as JSON, all or nothing."""
    row = {"format": "specjax-token-frequencies", "version": _VERSION, **vars(ranking)}
    writer.replace_json(path, row)


def read(path: Path, model: Any) -> TokenRanking:
    """Reads a ranking for `model`.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: it is no ranking, or one of another vocabulary.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"vocabulary={path}: no such file; make it with python -m experiments.token_frequencies"
        )
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        found = {name: row[name] for name in TokenRanking.__dataclass_fields__}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"vocabulary={path}: not a list of token frequencies ({error})") from None
    ranking = TokenRanking(**found)
    ids = np.asarray(ranking.token_ids)
    size = model.config.vocab_size
    if (
        ids.ndim != 1
        or not ids.size
        or ids.min() < 0
        or ids.max() >= size
        or len(set(ids)) < len(ids)
    ):
        raise ConfigError(
            f"vocabulary={path}: token_ids must be distinct ids below the model's vocab_size {size}"
        )
    digest = None if model.tokenizer is None else model.tokenizer.digest()
    if digest is not None and digest != ranking.tokenizer:
        raise ConfigError(
            f"vocabulary={path}: was made with another tokenizer than that of {model.name!r}; "
            "make it again: python -m experiments.token_frequencies"
        )
    return ranking


def _tokenizer_of(model: Any):
    if model.tokenizer is None:
        raise ConfigError(f"model {model.name!r} has no tokenizer to count tokens with")
    return model.tokenizer
