"""What a server and the engine's runner say to each other: requests, events, statistics, and the runner itself.

Nothing here knows of JAX or of HTTP, so either side can be tested with a double of the other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]
Speculation = Literal["auto", "off"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, in this order: bias, penalties, temperature, min_p, top_k, top_p.

    Attributes:
        temperature: 0 is greedy: the most likely token after bias and penalties.
        top_k: 0 keeps the whole vocabulary.
        top_p: 1 keeps the whole vocabulary.
        min_p: tokens below this share of the most likely one's probability are dropped; 0 is off.
        presence_penalty: taken off the logit of every token that was generated; 0 is off.
        frequency_penalty: taken off once per time that it was generated; 0 is off.
        repetition_penalty: divides positive and multiplies negative logits of tokens of the prompt and the output; 1 is
            off.
        logit_bias: added to logits, by token id.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One generation.

    Attributes:
        request_id: name among the requests that are waiting or running; any string.
        prompt_ids: prompt tokens, at least one.
        sampling: how tokens are chosen.
        max_tokens: most tokens to generate, at least one.
        stop_ids: token ids that end the text, the model's own included if they shall.
        seed: of the random choices, any whole number; same seed and `stream`, same tokens.
        stream: number of the random stream below the seed: the choices of one `n` > 1 have 0, 1, ...
        speculation: "off": nothing drafted is accepted; other requests do not notice.
        logprobs: None = none; k >= 0: of each chosen token and of the k most likely ones.
        prompt_logprobs: likewise of the prompt's tokens but the first; None = none.
        namespace: prefixes of other requests are reused within a namespace only.
        reuse_prefix: False: every prompt token is computed.
        deadline: `time.monotonic()` at which the request ends, finished or not; None = never.
    """

    request_id: str
    prompt_ids: Sequence[int]
    sampling: SamplingParams = SamplingParams()
    max_tokens: int
    stop_ids: Sequence[int] = ()
    seed: int = 0
    stream: int = 0
    speculation: Speculation = "auto"
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    namespace: str = ""
    reuse_prefix: bool = True
    deadline: float | None = None


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """The target's log-probabilities at one token, before bias, penalties, temperature and filters.

    Attributes:
        token: the chosen token (of a prompt: the one that stands there).
        logprob: its own.
        top: token ids and log-probabilities of the most likely ones, descending.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a request took, so far or in all.

    Attributes:
        prompt_tokens: tokens of the prompt.
        cached_tokens: those that were not computed because another text had them.
        new_tokens: tokens handed out.
        num_spec_steps: verification passes.
        num_draft_tokens: drafted tokens sent to verification.
        acceptance_histogram: steps by number of accepted drafts.
        queue_s: seconds from submission to a slot; None while waiting.
        prefill_s: seconds from there to the first token; None before.
        decode_s: seconds from the first token to now or the end; None before.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    new_tokens: int = 0
    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    acceptance_histogram: tuple[int, ...] = ()
    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None

    @property
    def num_accepted_draft_tokens(self) -> int:
        return sum(index * steps for index, steps in enumerate(self.acceptance_histogram))


@dataclass(frozen=True, kw_only=True)
class Event:
    """News of a request. The last event of a request, and only it, has a `finish_reason`.

    Attributes:
        tokens: new since the last event; a stop token is included.
        drafted: for each of them whether a drafter proposed it.
        logprobs: one per token where the request asked for them, else empty.
        prompt_logprobs: of the prompt from its second token on, on the first event with tokens, where asked for.
        statistics: so far.
        finish_reason: None while more is to come; "stop": a stop id; "length": `max_tokens`.
        error: what happened, where the reason is "error".
    """

    request_id: str
    tokens: tuple[int, ...] = ()
    drafted: tuple[bool, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    statistics: Statistics
    finish_reason: FinishReason | None = None
    error: BaseException | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a runner takes.

    Attributes:
        num_slots: requests that run together.
        max_model_len: most prompt and new tokens of one request together.
        vocab_size: token ids are below it.
        max_logprobs: most log-probabilities per token; None where none are offered at all.
        prompt_logprobs: whether those of prompts are offered.
        max_stop_ids: most stop ids of one request.
        max_logit_bias: most biased tokens of one request.
    """

    num_slots: int
    max_model_len: int
    vocab_size: int
    max_logprobs: int | None = None
    prompt_logprobs: bool = False
    max_stop_ids: int = 32
    max_logit_bias: int = 300


@dataclass(frozen=True, kw_only=True)
class RunnerStats:
    """Gauges of now and counters since the start.

    Attributes:
        running, waiting: requests in slots and in the queue.
        kv_usage: share of all slots' positions that hold committed text of running requests.
        finished: requests that ended, by reason.
        prompt_tokens, cached_tokens, generation_tokens: of all requests so far.
        num_drafts, num_draft_tokens: steps that drafted (all steps where the drafter always does), tokens drafted.
        acceptance_histogram: of all finished and running requests.
        num_compilations: executables made; does not move once the runner is ready.
        num_looks: pieces read.
        look_s, host_s: seconds of those looks in all, and the part in which the host worked.
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    finished: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    acceptance_histogram: tuple[int, ...] = ()
    num_compilations: int = 0
    num_looks: int = 0
    look_s: float = 0.0
    host_s: float = 0.0


Callback = Callable[[Event], None]


class Runner(Protocol):
    """Owns the engine. All methods may be called from any thread and return at once, `drain` and `close` apart."""

    @property
    def limits(self) -> Limits: ...

    @property
    def ready(self) -> bool:
        """Warmed up, not draining, not failed."""

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine; None while it is well. `on_failure` callbacks are told once."""

    def submit(self, request: Request, callback: Callback) -> None:
        """Queues a request. `callback` gets its events, in the engine's thread: it must not block or raise.

        Raises:
            CapacityError, ConfigError: the request does not fit; nothing was queued.
            RunnerClosedError: the runner drains, is closed or has failed.
        """

    def cancel(self, request_id: str) -> None:
        """Ends a request, waiting or running; its last event says "cancelled". Unknown and ended ones are ignored."""

    def stats(self) -> RunnerStats: ...

    def on_failure(self, callback: Callable[[BaseException], None]) -> None:
        """Asks to be told if the engine fails, after all requests were."""

    def drain(self, timeout_s: float | None = None) -> bool:
        """Takes no more requests and waits until all have ended; False if they have not by then."""

    def close(self) -> None:
        """Ends everything that still runs as "cancelled", and the thread."""
