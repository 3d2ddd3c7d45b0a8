"""Text in, text out: `LanguageModel.generate` and `.stream`, as people use a model."""

from collections.abc import Iterator, Mapping, Sequence
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
from specjax.engine.program import CommandBuffers
from specjax.errors import CapacityError, ConfigError
from specjax.loading import LoadedModel, LoadOptions
from specjax.text import chat, inputs, special_ids, tokenizer
from specjax.text.inputs import Prompt
from specjax.text.transcript import Transcript, stop_strings
from specjax.verify import Acceptor

STREAM_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """One finished request.

    Attributes:
        id: the caller's name for it; its index where none was given.
        input_ids: prompt tokens, chat template included.
        output_ids: new tokens, the stop token included if one was produced.
        text: what decoding adds to the prompt's text, without special tokens, cut before a stop string; None without a
            tokenizer.
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
        max_new_tokens: most tokens to return per request; fewer where the context ends before.
        max_length: bound on prompt + new tokens; None = the model's max_position_embeddings.
        temperature, top_k, top_p: see `specjax.decoding.sampling.sampling`; temperature 0 is greedy.
        stop: string or strings that end a text; they are cut off. They may be or hold special tokens.
        stop_token_ids: token ids that end a generation besides the model's own.
        seed: seed of all random choices, any whole number; same seed, drafter and request ids give the same tokens.
        batch_size: requests that run together; finished ones are replaced from the queue.
        acceptance: "lossless", the lossy "typical" or "relaxed", or a rule itself; see `specjax.verify`.
        ignore_eos: do not stop at the model's stop tokens; those of `stop_token_ids` still end a generation.
        add_generation_prompt: conversations end where the assistant begins to speak; None: unless the last message
            is continued.
        continue_final_message: conversations end with their last message's text, which is continued.
        trace: record what every step drafted, accepted and added, in the results' metrics.
    Raises:
        ConfigError: a value is out of range or of another type; the option is named.
    """

    max_new_tokens: int = 128
    max_length: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    seed: int = 0
    batch_size: int = 1
    acceptance: str | Acceptor = "lossless"
    ignore_eos: bool = False
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    trace: bool = False

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)
        put("stop", stop_strings(self.stop))
        put("stop_token_ids", special_ids.chosen("stop_token_ids", self.stop_token_ids))
        for name in ("max_new_tokens", "batch_size", "max_length"):
            value = getattr(self, name)
            if value is None and name == "max_length":
                continue
            put(name, sample.whole(name, value))
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={value}: at least 1 is needed")
        # What follows reckons with Python's integers: NumPy's have neither their size nor their methods.
        put("seed", sample.whole("seed", self.seed))
        sampling = sample.sampling(self.temperature, self.top_k, self.top_p)
        verify.acceptor(self.acceptance, sampling.greedy)
        for name in ("ignore_eos", "continue_final_message", "trace"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be True or False")
        if not isinstance(self.add_generation_prompt, bool | None):
            raise ConfigError(
                f"add_generation_prompt={self.add_generation_prompt!r}: must be True, False or None"
            )
        chat.generation_prompt(self.add_generation_prompt, self.continue_final_message)


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

    def encode(
        self,
        prompt: Prompt,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Token ids of a prompt; the flags are those of `Options`.

        Raises:
            ConfigError: the prompt has no known form, or needs a tokenizer or chat template that is missing.
            CapacityError: it is empty or has ids outside the vocabulary.
        """
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        if not isinstance(prompt, Mapping):
            prompt = {"input_ids": prompt}
        ids = self._encode_row(prompt, add_generation_prompt, continue_final_message)
        if not ids:
            raise CapacityError("the prompt is empty; at least one token is needed")
        wrong = [i for i in ids if not 0 <= i < self.config.vocab_size]
        if wrong:
            raise CapacityError(
                f"input_ids contain {wrong[0]}, outside the vocabulary of {self.config.vocab_size}"
            )
        return ids

    def _encode_row(self, row: Mapping[str, Any], *flags) -> list[int]:
        name = next((n for n in inputs.FIELDS if row.get(n) is not None), None)
        if name is None:
            raise ConfigError(
                f"prompt with fields {sorted(map(str, row))}: one of {', '.join(inputs.FIELDS)} is needed"
            )
        value = row[name]
        if name == "input_ids":
            return inputs.token_ids("input_ids", value)
        if self.tokenizer is None:
            raise ConfigError(
                f"model {self.name!r} has no tokenizer files; pass input_ids, or add tokenizer.json"
            )
        if name == "messages":
            return self.tokenizer.apply_chat_template(value, *flags)
        if not isinstance(value, str):
            raise ConfigError(f"{name}: expected a string, found {type(value).__name__}")
        if name == "text":
            return self.tokenizer.encode(value) if value else []
        if not value.strip():
            return []
        message = {"role": "user", "content": value}
        return self.tokenizer.apply_chat_template([message], *flags)

    def decode(self, ids: Sequence[int]) -> str | None:
        """Text of token ids without special tokens; None without a tokenizer that can be read."""
        known = tokenizer.usable(self.tokenizer)
        return None if known is None else known.decode(list(ids))

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
            ids: names of the requests in the results, one per prompt.
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
        encoded = [self._encode(prompt, options) for prompt in inputs.as_list(prompts)]
        names = range(len(encoded)) if ids is None else list(ids)
        if len(names) != len(encoded):
            raise ConfigError(f"ids: {len(names)} names for {len(encoded)} prompts")
        numbers = inputs.numbers(request_ids, len(encoded))
        index_of = {number: index for index, number in enumerate(numbers)}
        requests = [
            self._request(ids_, number, options)
            for ids_, number in zip(encoded, numbers, strict=True)
        ]
        transcripts = {r.request_id: self._transcript(r, options) for r in requests}
        engine = self._engine(drafter, options)

        def should_stop(request: Request, tokens: list[int]) -> int | None:
            return transcripts[request.request_id].read(tokens)

        watch = should_stop if options.stop else None
        for event in engine.run(requests, options.batch_size, should_stop=watch):
            index = index_of[event.request.request_id]
            transcript = transcripts.pop(event.request.request_id)
            text = None if transcript is None else transcript.finish(event.output_ids)
            yield index, self._result(names[index], event, text)

    def stream(
        self, prompt: Prompt, drafter: registry.Spec = "none", **options
    ) -> Iterator[StreamEvent]:
        """Yields text as it is generated; the last event carries the result.

        Text that may turn out to be the beginning of a stop string is held back.
        """
        options = Options(**options)
        request = self._request(self._encode(prompt, options), 0, options)
        engine = self._engine(drafter, options)
        transcript = self._transcript(request, options)
        watch = (lambda _, tokens: transcript.read(tokens)) if options.stop else None
        text = ""
        for event in engine.run([request], steps_per_look=STREAM_STEPS, should_stop=watch):
            if transcript is None:
                piece = ""
            elif isinstance(event, Completion):
                piece = transcript.finish(event.output_ids)
            else:
                transcript.read(event.output_ids)
                piece = transcript.piece()
            text += piece
            if isinstance(event, Completion):
                whole = None if transcript is None else text
                yield StreamEvent(text=piece, result=self._result(0, event, whole))
            elif piece:
                yield StreamEvent(text=piece)

    def _encode(self, prompt: Prompt, options: Options) -> list[int]:
        return self.encode(prompt, options.add_generation_prompt, options.continue_final_message)

    def _request(self, ids: list[int], request_id: int, options: Options) -> Request:
        """A request whose limit respects max_length."""
        positions = self.config.max_position_embeddings
        max_length = positions if options.max_length is None else options.max_length
        max_length = min(max_length, positions)
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

    def _transcript(self, request: Request, options: Options) -> Transcript | None:
        """What turns a request's tokens into text; None without a tokenizer that can be read.

        Raises:
            ConfigError, CheckpointError: stop strings need a tokenizer.
        """
        known = tokenizer.usable(self.tokenizer)
        if known is not None:
            return Transcript(known, request.input_ids, options.stop)
        if options.stop and self.tokenizer is None:
            raise ConfigError(
                f"stop={list(options.stop)!r} needs a tokenizer; {self.name!r} has none"
            )
        if options.stop:
            raise self.tokenizer.error
        if self.tokenizer is not None:
            self.tokenizer.warn()
        return None

    def _engine(self, drafter: registry.Spec, options: Options) -> Engine:
        sampling = sample.sampling(options.temperature, options.top_k, options.top_p)
        acceptor = verify.acceptor(options.acceptance, sampling.greedy)
        own = () if options.ignore_eos else self.stop_ids
        chosen = special_ids.within(
            "stop_token_ids", options.stop_token_ids, self.config.vocab_size
        )
        return engines.Engine(
            self.module,
            self.drafter(drafter),
            acceptor,
            replace(sampling, with_q=acceptor.reads_q),
            stop_ids=tuple(dict.fromkeys((*own, *chosen))),
            seed=options.seed,
            programs=self.programs,
            trace=options.trace,
        )

    def _result(self, name, done: Completion, text: str | None) -> GenerationResult:
        metrics = done.metrics
        known = tokenizer.usable(self.tokenizer)
        if metrics.trace is not None and known is not None:
            metrics = replace(metrics, trace=tracing.with_text(metrics.trace, known.piece))
        return GenerationResult(
            id=name,
            input_ids=list(done.request.input_ids),
            output_ids=done.output_ids,
            text=text,
            finish_reason="stop" if done.stopped else "length",
            metrics=metrics,
        )


def load(
    path_or_name: str | Path, *, command_buffers: CommandBuffers = "loop", **options
) -> LanguageModel:
    """Loads a model.

    Args:
        path_or_name: a checkpoint directory, a .gguf file, the name of a model that ships ("smollm2-135m"), or a hub id
            "org/name".
        command_buffers: what CUDA graphs hold on a GPU: a whole loop ("loop"), its body, or there are none ("off"); see
            `specjax.engine.program.gpu_options`.
        **options: fields of `specjax.loading.LoadOptions`.
    Raises:
        FileNotFoundError, ConfigError, CheckpointError: with the file, field or tensor.
    """
    programs = Programs(command_buffers)
    loaded = loading.load_model(path_or_name, LoadOptions(**options))
    return LanguageModel(**vars(loaded), programs=programs)
