"""Training text: conversations or plain documents, and which of their tokens the target would have written."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from specjax.errors import ConfigError
from specjax.quantize import calibration


@dataclass(frozen=True, kw_only=True)
class Example:
    """One tokenized document.

    Attributes:
        tokens: token ids.
        response: index of the first token that counts in the loss; 0 where the whole document does.
    """

    tokens: Int[np.ndarray, "T"]
    response: int


def read(path: Path, tokenizer, max_length: int, loss_on: str = "all") -> list[Example]:
    """Examples of a .jsonl, .json or .txt file (fields as in `specjax.quantize.calibration.read_documents`).

    Args:
        max_length: longer documents are cut.
        loss_on: "all" tokens, or those of the "response" only (documents without one are then left out).

    Raises:
        FileNotFoundError: no such file.
        ConfigError: nothing in it can be trained on.
    """
    documents = calibration.read_conversations(path, tokenizer, "text_file")
    return _examples(documents, max_length, loss_on, path)


def read_answers(path: Path, max_length: int, loss_on: str = "response") -> list[Example]:
    """Examples of answers that are tokens already: rows of `tokens` and the index `response`; see `read`."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    documents = [(row["tokens"], row["response"]) for row in rows]
    return _examples(documents, max_length, loss_on, path)


def _examples(documents, max_length: int, loss_on: str, path: Path) -> list[Example]:
    if loss_on not in ("all", "response"):
        raise ConfigError(f"{loss_on=}: supported are all, response")
    examples = []
    for tokens, response in documents:
        tokens = np.asarray(tokens[:max_length], np.int32)
        if loss_on == "all":
            response = 0
        if response is not None and response < len(tokens) - 2:
            examples.append(Example(tokens=tokens, response=response))
    if not examples:
        raise ConfigError(f"{path}: no document of at least 3 tokens to train on ({loss_on=})")
    return examples


def split(
    examples: Sequence[Example], held_out: int, seed: int, limit: int | None = None
) -> tuple[list[Example], list[Example]]:
    """Shuffles by `seed`, keeps `limit` examples, and sets `held_out` of them aside: (training, held out).

    Raises:
        ConfigError: nothing would be left to train on.
    """
    order = np.random.default_rng(seed).permutation(len(examples))[:limit]
    if not 0 < held_out < len(order):
        raise ConfigError(
            f"{held_out=}: must be between 1 and {len(order) - 1}, one less than the examples"
        )
    shuffled = [examples[i] for i in order]
    return shuffled[held_out:], shuffled[:held_out]
