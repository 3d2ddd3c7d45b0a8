"""Answers as OpenAI's clients read them: whole ones and pieces of streams, with log-probabilities and statistics."""

from collections.abc import Iterable, Sequence
from typing import Any

from specjax.serving.http.generation import Delta
from specjax.serving.types import Statistics, TokenLogprob
from specjax.text.tokenizer import Tokenizer


def usage(statistics: Sequence[Statistics]) -> dict[str, Any]:
    """Tokens of all choices; choices of one prompt count it once."""
    prompt = statistics[0].prompt_tokens
    new = sum(each.new_tokens for each in statistics)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": statistics[0].cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(s.num_accepted_draft_tokens for s in statistics),
            "rejected_prediction_tokens": sum(
                max(s.num_draft_tokens - s.num_accepted_draft_tokens, 0) for s in statistics
            ),
        },
    }


def summed(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Usage of several prompts together."""
    total: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if isinstance(value, dict):
                total[name] = summed([total.get(name, {}), value])
            else:
                total[name] = total.get(name, 0) + value
    return total


def speculation(statistics: Statistics) -> dict[str, Any]:
    """What drafting did for a choice."""
    steps = statistics.num_spec_steps
    return {
        "num_steps": steps,
        "num_draft_tokens": statistics.num_draft_tokens,
        "num_accepted_draft_tokens": statistics.num_accepted_draft_tokens,
        "acceptance_length": 1 + statistics.num_accepted_draft_tokens / steps if steps else None,
        "acceptance_histogram": list(statistics.acceptance_histogram),
    }


class Pieces:
    """Tokens as text, each by itself; what the fields of log-probabilities want."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if self._tokenizer is None:
            return str(token)
        if token not in self._known:
            self._known[token] = self._tokenizer.piece(token)
        return self._known[token]

    def chat(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """`logprobs` of a chat's choice."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self(token)
            # A token that is a part of a character has no text of its own, and what its bytes are is not known here.
            parts = None if "\ufffd" in text else list(text.encode())
            return {"token": text, "logprob": logprob, "bytes": parts}

        content = [
            entry(each.token, each.logprob) | {"top_logprobs": [entry(*top) for top in each.top]}
            for each in tokens
        ]
        return {"content": content, "refusal": None}

    def completion(
        self, tokens: Sequence[TokenLogprob | int], places: Sequence[int], num_top: int
    ) -> dict[str, Any]:
        """`logprobs` of a completion's choice; an id stands for a first prompt token, of which nothing is known.

        Args:
            places: of each token, characters of the text before it.
            num_top: most likely tokens to name.
        """
        found: dict[str, list] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for each, place in zip(tokens, places, strict=True):
            token, logprob, top = each, None, None
            if isinstance(each, TokenLogprob):
                token, logprob = each.token, each.logprob
                # The chosen token is there, whatever its rank: as OpenAI's legacy API has it.
                pairs = [*each.top[:num_top], (token, logprob)] if num_top else []
                # Of tokens that read the same the most likely one counts.
                top = {self(t): value for t, value in sorted(pairs, key=lambda p: p[1])} or None
            text = self(token)
            found["tokens"].append(text)
            found["token_logprobs"].append(logprob)
            found["top_logprobs"].append(top)
            found["text_offset"].append(place)
        return found


def ending(delta: Delta) -> dict[str, Any]:
    """What a choice says at its end beyond OpenAI's fields: statistics, and what cut it short."""
    found: dict[str, Any] = {"speculative_decoding_stats": speculation(delta.statistics)}
    if delta.stopped_by is not None:
        found["stopped_by"] = delta.stopped_by
    return found


def extras(delta: Delta) -> dict[str, Any]:
    """What a stream's piece says beyond OpenAI's fields: its tokens, which of them were drafted, and `ending`."""
    found = {"token_ids": list(delta.tokens), "drafted": [bool(value) for value in delta.drafted]}
    return found | (ending(delta) if delta.finish_reason is not None else {})
