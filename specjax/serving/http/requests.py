"""From a checked body to the requests of a runner."""

import secrets
import time
import uuid
from collections.abc import Sequence

from specjax.errors import ConfigError, SpecjaxError
from specjax.serving.http.errors import ApiError
from specjax.serving.http.protocol import Chat, Completion, Generation
from specjax.serving.types import Limits, Request, SamplingParams
from specjax.text import transcript
from specjax.text.tokenizer import Tokenizer

_MOST_STOPS = 16


class Prompts:
    """Reads prompts and options of one served model.

    Args:
        tokenizer: of the model, or None where prompts can be token ids only.
        stop_ids: what ends a text of the model.
        limits: of the runner.
        default_temperature: where a body has none.
        timeout_s: a request ends then; None: never.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop_ids: Sequence[int],
        limits: Limits,
        default_temperature: float = 1.0,
        timeout_s: float | None = None,
    ):
        self.tokenizer, self._stop_ids, self.limits = tokenizer, tuple(stop_ids), limits
        self._temperature, self._timeout = default_temperature, timeout_s

    def known(self, field: str) -> Tokenizer:
        """The tokenizer.

        Raises:
            ApiError: 400; `field` needs one.
        """
        if self.tokenizer is None:
            raise ApiError(400, f"{field}: the model has no tokenizer; send token ids", param=field)
        return self.tokenizer

    def chat(self, body: Chat) -> list[int]:
        """Prompt of a conversation."""
        try:
            return self.known("messages").apply_chat_template(
                body.messages, body.add_generation_prompt, body.continue_final_message
            )
        except ConfigError as error:
            raise ApiError(400, str(error), param="messages") from error

    def completion(self, body: Completion) -> list[list[int]]:
        """Prompts of a completion."""
        given = body.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not given:
            raise ApiError(400, "prompt is empty: at least one text is needed", param="prompt")
        return [self._ids(prompt, body.add_special_tokens) for prompt in given]

    def _ids(self, prompt: str | list[int], add_special_tokens: bool) -> list[int]:
        if not isinstance(prompt, str):
            # Before a tokenizer sees them: it cannot take numbers of any size.
            size = self.limits.vocab_size
            wrong = next((token for token in prompt if not 0 <= token < size), None)
            if wrong is not None:
                message = f"prompt has the token {wrong}, outside the vocabulary of {size}"
                raise ApiError(400, message, param="prompt")
            return list(prompt)
        try:
            return self.known("prompt").encode(prompt, add_special_tokens)
        except SpecjaxError as error:
            raise ApiError(400, f"prompt: {error}", param="prompt") from error

    def stop_strings(self, body: Generation) -> tuple[str, ...]:
        """Checked stop strings."""
        try:
            found = transcript.stop_strings(body.stop)
        except ConfigError as error:
            raise ApiError(400, str(error), param="stop") from error
        if len(found) > _MOST_STOPS:
            raise ApiError(
                400, f"stop has {len(found)} strings; at most {_MOST_STOPS}", param="stop"
            )
        if found:
            self.known("stop")
        return found

    def requests(self, body: Generation, prompt: list[int], namespace: str) -> list[Request]:
        """One request per choice.

        Raises:
            ApiError: 400; the prompt leaves no room, or n is beyond the slots.
        """
        if body.n > self.limits.num_slots:
            raise ApiError(
                400, f"n={body.n}: at most {self.limits.num_slots} choices run together", param="n"
            )
        seed = secrets.randbits(63) if body.seed is None else body.seed
        own = () if body.ignore_eos else self._stop_ids
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        name = uuid.uuid4().hex
        return [
            Request(
                request_id=f"{name}-{index}",
                prompt_ids=prompt,
                sampling=self._sampling(body),
                max_tokens=self._max_tokens(body, prompt),
                stop_ids=tuple(dict.fromkeys([*own, *(body.stop_token_ids or ())])),
                seed=seed,
                stream=index,
                speculation=body.speculation,
                logprobs=_logprobs(body),
                prompt_logprobs=_prompt_logprobs(body),
                namespace=namespace,
                reuse_prefix=_prompt_logprobs(body) is None,
                deadline=deadline,
            )
            for index in range(body.n)
        ]

    def _max_tokens(self, body: Generation, prompt: list[int]) -> int:
        room = self.limits.max_model_len - len(prompt)
        if room < 1:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens; with one more the model's {self.limits.max_model_len} are "
                "exceeded: shorten it",
                param="messages" if isinstance(body, Chat) else "prompt",
                code="context_length_exceeded",
            )
        asked = getattr(body, "max_completion_tokens", None) or body.max_tokens
        if asked is None:
            return room if isinstance(body, Chat) else min(room, 16)  # 16: OpenAI's for completions
        if asked > room:
            raise ApiError(
                400,
                f"{len(prompt)} prompt tokens and max_tokens={asked} exceed the model's {self.limits.max_model_len}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return asked

    def _sampling(self, body: Generation) -> SamplingParams:
        bias = {}
        for token, value in (body.logit_bias or {}).items():
            if not (token.isascii() and token.isdecimal() and len(token) < 10):
                raise ApiError(
                    400,
                    f"logit_bias has the key {token[:40]!r}; supported are token ids",
                    param="logit_bias",
                )
            bias[int(token)] = value
        given = {
            "temperature": self._temperature if body.temperature is None else body.temperature,
            "top_k": None if body.top_k is None else max(body.top_k, 0),
            "logit_bias": bias,
        }
        for name in (
            "top_p",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        ):
            given[name] = getattr(body, name)
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def _logprobs(body: Generation) -> int | None:
    if isinstance(body, Chat):
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        return (body.top_logprobs or 0) if body.logprobs else None
    return body.logprobs if isinstance(body, Completion) else None


def _prompt_logprobs(body: Generation) -> int | None:
    return body.logprobs if isinstance(body, Completion) and body.echo else None
