"""Text in, text out: `LanguageModel.generate` and `.stream`, as people use a model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from specjax import loading, verify
from specjax.decoding import sampling as sample
from specjax.drafters import registry
from specjax.drafters.base import Drafter
from specjax.engine import engine as engines
from specjax.engine import trace as tracing
from specjax.engine.engine import Completion, Engine, Programs, Request
from specjax.engine.metrics import Metrics
from specjax.errors import CapacityError, ConfigError
from specjax.loading import LoadedModel, LoadOptions
from specjax.text.stopping import StopStrings
from specjax.verify import Acceptor

# A user turn as text, token ids, or a row with input_ids, messages, text (raw) or prompt (user turn), in that order.
Prompt = str | Sequence[int] | dict[str, Any]

STREAM_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """One finished request.

    Attributes:
        id: the caller's name for it; its index where none was given.
        input_ids: prompt tokens, chat template included.
        output_ids: new tokens, the stop token included if one was produced.
        text: the new text without special tokens, cut before a stop string; None without a tokenizer.
        finish_reason: "stop" (stop token or string) or "length".
        metrics: acceptance and speed.
    """

    id: Any
    input_ids: list[int]
    output_ids: list[int]
    text: str | None
    finish_reason: str
    metrics: Metrics

    def to_dict(self) -> dict:
        """JSON-ready row."""
        return {
            "id": self.id,
            "input_ids": self.input_ids,
            "output_ids": self.output_ids,
            "text": self.text,
            "finish_reason": self.finish_reason,
            **self.metrics.to_dict(),
        }


@dataclass(frozen=True, kw_only=True)
class StreamEvent:
    """A piece of a stream.

    Attributes:
        text: new text since the last event (never half a character).
        result: the finished generation; only on the last event.
    """

    text: str
    result: GenerationResult | None = None


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to generate.

    Attributes:
        max_new_tokens: most tokens to return per request.
        max_length: bound on prompt + new tokens; None = the model's max_position_embeddings.
        temperature, top_k, top_p: see `specjax.decoding.sampling.sampling`; temperature 0 is greedy.
        stop: string or strings that end a text; they are cut off.
        seed: seed of all random choices; same seed, drafter and request ids give the same tokens.
        batch_size: requests that run together; finished ones are replaced from the queue.
        acceptance: "lossless", the lossy "typical" or "relaxed", or a rule itself; see `specjax.verify`.
        ignore_eos: do not stop at the model's stop tokens.
        trace: record what every step drafted, accepted and added, in the results' metrics.
    """

    max_new_tokens: int = 128
    max_length: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: str | Sequence[str] = ()
    seed: int = 0
    batch_size: int = 1
    acceptance: str | Acceptor = "lossless"
    ignore_eos: bool = False
    trace: bool = False

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: at least 1 is needed")


@dataclass(kw_only=True)
class LanguageModel(LoadedModel):
    """A loaded model and the programs compiled for it.

    Attributes:
        programs: executables by shape.
    """

    programs: Programs = field(default_factory=Programs)

    def drafter(self, spec: registry.Spec) -> Drafter:
        """Builds a drafter for this model; see `specjax.drafters.registry`."""
        return registry.build(spec, self)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        Raises:
            ConfigError: the prompt has no known form, or needs a tokenizer or chat template that is missing.
            CapacityError: it is empty or has ids outside the vocabulary.
        """
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        if not isinstance(prompt, dict):
            prompt = {"input_ids": prompt}
        ids = self._encode_row(prompt)
        if not ids:
            raise CapacityError("the prompt is empty; at least one token is needed")
        wrong = [i for i in ids if not 0 <= i < self.config.vocab_size]
        if wrong:
            raise CapacityError(
                f"input_ids contain {wrong[0]}, outside the vocabulary of {self.config.vocab_size}"
            )
        return ids

    def _encode_row(self, row: dict[str, Any]) -> list[int]:
        if "input_ids" in row:
            return [int(i) for i in row["input_ids"]]
        if not {"messages", "text", "prompt"} & row.keys():
            raise ConfigError(
                f"prompt with fields {sorted(row)}: one of input_ids, messages, text, prompt is needed"
            )
        if self.tokenizer is None:
            raise ConfigError(
                f"model {self.name!r} has no tokenizer files; pass input_ids, or add tokenizer.json"
            )
        if "messages" in row:
            return self.tokenizer.apply_chat_template(row["messages"])
        if "text" in row:
            return self.tokenizer.encode(row["text"]) if row["text"] else []
        if not row["prompt"].strip():
            return []
        return self.tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}])

    def decode(self, ids: Sequence[int]) -> str | None:
        """Text of token ids without special tokens; None without a tokenizer."""
        return None if self.tokenizer is None else self.tokenizer.decode(list(ids))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        drafter: registry.Spec = "none",
        *,
        ids: Sequence[Any] | None = None,
        **options,
    ) -> list[GenerationResult]:
        """Generates for one or more prompts; results in the order of the prompts.

        Args:
            prompts: a prompt or a list of prompts (see `Prompt`; a list of ints is one prompt).
            drafter: name, dict or Drafter.
            ids: names of the requests in the results.
            **options: fields of `Options`.
        Raises:
            ConfigError, CapacityError, CheckpointError: before anything runs.
        """
        results = self.generate_iter(prompts, drafter, ids=ids, **options)
        return [result for _, result in sorted(results, key=lambda pair: pair[0])]

    def generate_iter(
        self,
        prompts: Prompt | Sequence[Prompt],
        drafter: registry.Spec = "none",
        *,
        ids: Sequence[Any] | None = None,
        request_ids: Sequence[int] | None = None,
        **options,
    ) -> Iterator[tuple[int, GenerationResult]]:
        """Like `generate`, but yields (index of the prompt, result) as requests end.

        Args:
            request_ids: number of each request's random stream; default: its index.
        """
        options = Options(**options)
        encoded = [self.encode(prompt) for prompt in _as_list(prompts)]
        requests = [
            self._request(ids_, index if request_ids is None else request_ids[index], options)
            for index, ids_ in enumerate(encoded)
        ]
        index_of = {request.request_id: index for index, request in enumerate(requests)}
        stops = self._stop_strings(options)
        engine = self._engine(drafter, options)
        for event in engine.run(requests, options.batch_size, should_stop=stops):
            index = index_of[event.request.request_id]
            name = index if ids is None else ids[index]
            yield index, self._result(name, event, stops)

    def stream(
        self, prompt: Prompt, drafter: registry.Spec = "none", **options
    ) -> Iterator[StreamEvent]:
        """Yields text as it is generated; the last event carries the result.

        Text that may turn out to be the beginning of a stop string is held back.
        """
        options = Options(**options)
        request = self._request(self.encode(prompt), 0, options)
        stops = self._stop_strings(options)
        engine = self._engine(drafter, options)
        sent = ""
        for event in engine.run([request], steps_per_look=STREAM_STEPS, should_stop=stops):
            finished = isinstance(event, Completion)
            text = self.decode(event.output_ids) or ""
            text = text if stops is None else stops.cut(text)
            safe = text if finished else _stable(text, options.stop)
            # Detokenization may revise its last characters; what was sent stays.
            new = safe[len(sent) :] if safe.startswith(sent) else ""
            sent += new
            if finished:
                yield StreamEvent(text=new, result=self._result(0, event, stops))
            elif new:
                yield StreamEvent(text=new)

    def _request(self, ids: list[int], request_id: int, options: Options) -> Request:
        """A request whose limit respects max_length."""
        positions = self.config.max_position_embeddings
        max_length = min(options.max_length or positions, positions)
        room = max_length - len(ids)
        if room < 1:
            raise CapacityError(
                f"request {request_id}: the prompt has {len(ids)} tokens, max_length is {max_length}; no room for new "
                "tokens: shorten the prompt"
                + (" or raise max_length" if max_length < positions else "")
            )
        return Request(
            request_id=request_id, input_ids=ids, max_new_tokens=min(options.max_new_tokens, room)
        )

    def _stop_strings(self, options: Options) -> StopStrings | None:
        if not options.stop:
            return None
        if self.tokenizer is None:
            raise ConfigError(
                f"stop={list(options.stop)!r} needs a tokenizer; {self.name!r} has none"
            )
        return StopStrings(options.stop, self.decode)

    def _engine(self, drafter: registry.Spec, options: Options) -> Engine:
        sampling = sample.sampling(options.temperature, options.top_k, options.top_p)
        acceptor = verify.acceptor(options.acceptance, sampling.greedy)
        return engines.Engine(
            self.module,
            self.drafter(drafter),
            acceptor,
            replace(sampling, with_q=acceptor.reads_q),
            stop_ids=() if options.ignore_eos else self.config.eos_token_ids,
            seed=options.seed,
            programs=self.programs,
            trace=options.trace,
        )

    def _result(self, name, done: Completion, stops: StopStrings | None) -> GenerationResult:
        text = self.decode(done.output_ids)
        metrics = done.metrics
        if metrics.trace is not None and self.tokenizer is not None:
            pieces = lambda ids: self.tokenizer.decode(ids, skip_special_tokens=False)
            metrics = replace(metrics, trace=tracing.with_text(metrics.trace, pieces))
        return GenerationResult(
            id=name,
            input_ids=list(done.request.input_ids),
            output_ids=done.output_ids,
            text=text if stops is None or text is None else stops.cut(text),
            finish_reason="stop" if done.stopped else "length",
            metrics=metrics,
        )


def load(path_or_name: str | Path, **options) -> LanguageModel:
    """Loads a model.

    Args:
        path_or_name: a checkpoint directory, a .gguf file, the name of a model that ships ("smollm2-135m"), or a hub id
            "org/name".
        **options: fields of `specjax.loading.LoadOptions`.
    Raises:
        FileNotFoundError, ConfigError, CheckpointError: with the file, field or tensor.
    """
    return LanguageModel(**vars(loading.load_model(path_or_name, LoadOptions(**options))))


def _as_list(prompts) -> list:
    """A list of prompts; a list of ints is one prompt."""
    if isinstance(prompts, str | dict):
        return [prompts]
    prompts = list(prompts)
    return [prompts] if prompts and isinstance(prompts[0], int) else prompts


def _stable(text: str, stop: Sequence[str]) -> str:
    """The part of an unfinished text that will not change: no half character, no possible start of a stop string."""
    text = text.rstrip("\ufffd")
    held = 0
    for string in stop:
        for size in range(min(len(string) - 1, len(text)), 0, -1):
            if text.endswith(string[:size]):
                held = max(held, size)
                break
    return text[: len(text) - held]
