"""The runner's account of one request: what it was told, and what its caller was."""

from dataclasses import dataclass, field

import numpy as np

from specjax.engine.slot_engine import SlotRequest
from specjax.engine.slots import Piece
from specjax.engine.window import LogProbs
from specjax.serving.types import (
    Callback,
    Event,
    FinishReason,
    Request,
    Statistics,
    TokenLogprob,
)


@dataclass(kw_only=True)
class Job:
    """Attributes:
    submitted, admitted, first_token: times of those events, in seconds of one clock.
    scores: log-probabilities of the prompt by chunk, on the device until the first token is read.
    """

    request: Request
    callback: Callback
    submitted: float
    admitted: float | None = None
    first_token: float | None = None
    cached: int = 0
    new_tokens: int = 0
    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    histogram: tuple[int, ...] = ()
    scores: list[tuple[int, LogProbs]] = field(default_factory=list)

    def slot_request(self) -> SlotRequest:
        """The request as the engine's programs take it."""
        request, params = self.request, self.request.sampling
        row = {
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "stop_ids": request.stop_ids,
            "max_draft_depth": 0 if request.speculation == "off" else None,
            "wants_logprobs": request.logprobs is not None,
            "presence": params.presence_penalty,
            "frequency": params.frequency_penalty,
            "repetition": params.repetition_penalty,
            "bias": params.logit_bias,
        }
        return SlotRequest(
            input_ids=request.prompt_ids,
            max_new_tokens=request.max_tokens,
            seed=request.seed,
            stream=request.stream,
            row=row,
        )

    def read(self, piece: Piece, slot: int, now: float) -> Event | None:
        """What a piece (in NumPy arrays) added, if anything; updates the counters."""
        count = int(piece.num_tokens[slot])
        done = bool(piece.done[slot])
        if not count and not done:
            return None
        prompt_logprobs = ()
        if self.first_token is None:
            self.first_token = now
            prompt_logprobs = self._of_prompt()
        tokens = tuple(piece.tokens[slot, :count].tolist())
        self.new_tokens += count
        self.num_spec_steps = int(piece.num_spec_steps[slot])
        self.num_draft_tokens = int(piece.num_draft_tokens[slot])
        self.histogram = tuple(piece.acceptance_histogram[slot].tolist())
        logprobs = ()
        if self.request.logprobs is not None:
            kept = piece.window.logprobs
            logprobs = _listed(kept, slot, tokens, self.request.logprobs)
        reason = ("stop" if piece.stopped[slot] else "length") if done else None
        return Event(
            request_id=self.request.request_id,
            tokens=tokens,
            drafted=tuple(piece.window.drafted[slot, :count].tolist()),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            statistics=self.statistics(now),
            finish_reason=reason,
        )

    def last_event(
        self, reason: FinishReason, now: float, error: BaseException | None = None
    ) -> Event:
        """The event of a request that ends otherwise than by its text."""
        return Event(
            request_id=self.request.request_id,
            statistics=self.statistics(now),
            finish_reason=reason,
            error=error,
        )

    def statistics(self, now: float) -> Statistics:
        admitted, first = self.admitted, self.first_token
        return Statistics(
            prompt_tokens=len(self.request.prompt_ids),
            cached_tokens=self.cached,
            new_tokens=self.new_tokens,
            num_spec_steps=self.num_spec_steps,
            num_draft_tokens=self.num_draft_tokens,
            acceptance_histogram=self.histogram,
            queue_s=None if admitted is None else admitted - self.submitted,
            prefill_s=None if first is None else first - admitted,
            decode_s=None if first is None else now - first,
        )

    def _of_prompt(self) -> tuple[TokenLogprob, ...]:
        """Log-probabilities of the prompt's second to last tokens."""
        ids, found = self.request.prompt_ids, []
        for begin, scores in self.scores:
            scores = LogProbs(
                **{name: np.asarray(getattr(scores, name)) for name in ("own", "top", "top_ids")}
            )
            following = tuple(ids[begin + 1 : begin + 1 + scores.own.shape[1]])
            found += _listed(scores, 0, following, self.request.prompt_logprobs)
        self.scores.clear()
        return tuple(found)


def _listed(kept: LogProbs, row: int, tokens, top: int) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            token=int(token),
            logprob=float(kept.own[row, i]),
            top=tuple(
                zip(
                    kept.top_ids[row, i, :top].tolist(),
                    kept.top[row, i, :top].tolist(),
                    strict=True,
                )
            ),
        )
        for i, token in enumerate(tokens)
    )
