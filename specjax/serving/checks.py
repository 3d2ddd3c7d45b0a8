"""Requests are checked before they are queued: what is wrong is named, and what is taken."""

import math
from numbers import Real

from specjax.decoding import sampling as sample
from specjax.errors import CapacityError, ConfigError
from specjax.serving.types import Limits, Request, SamplingParams

_LARGEST_PENALTY = 2.0
_LARGEST_BIAS = 100.0


def check(request: Request, limits: Limits) -> None:
    """Raises:
    CapacityError: the texts do not fit.
    ConfigError: a field is out of range, or asks for what the runner does not offer.
    """
    _tokens(request, limits)
    _sampling(request.sampling, limits)
    sample.whole("seed", request.seed)
    sample.whole("stream", request.stream)
    if request.speculation not in ("auto", "off"):
        raise ConfigError(f"speculation={request.speculation!r}: supported are 'auto' and 'off'")
    if request.deadline is not None:
        _number("deadline", request.deadline, -math.inf, math.inf)
    for name in ("logprobs", "prompt_logprobs"):
        _logprobs(name, getattr(request, name), limits)


def _tokens(request: Request, limits: Limits) -> None:
    length = len(request.prompt_ids)
    if not length:
        raise CapacityError("prompt_ids: the prompt is empty; at least one token is needed")
    for name, ids in (("prompt_ids", request.prompt_ids), ("stop_ids", request.stop_ids)):
        for token in ids:
            if not 0 <= sample.whole(name, token) < limits.vocab_size:
                raise CapacityError(
                    f"{name} contain {token}, outside the vocabulary of {limits.vocab_size}"
                )
    if sample.whole("max_tokens", request.max_tokens) < 1:
        raise ConfigError(f"max_tokens={request.max_tokens}: at least 1 is needed")
    if length + request.max_tokens > limits.max_model_len:
        raise CapacityError(
            f"{length} prompt tokens + max_tokens={request.max_tokens} exceed max_model_len={limits.max_model_len}; "
            "shorten the prompt or lower max_tokens"
        )
    if len(request.stop_ids) > limits.max_stop_ids:
        raise ConfigError(f"stop_ids: {len(request.stop_ids)}; at most {limits.max_stop_ids}")


def _sampling(params: SamplingParams, limits: Limits) -> None:
    sample.sampling(params.temperature, params.top_k, params.top_p)
    _number("min_p", params.min_p, 0, 1)
    for name in ("presence_penalty", "frequency_penalty"):
        _number(name, getattr(params, name), -_LARGEST_PENALTY, _LARGEST_PENALTY)
    _number("repetition_penalty", params.repetition_penalty, 0, math.inf)
    if params.repetition_penalty == 0 or math.isinf(params.repetition_penalty):
        raise ConfigError(
            f"repetition_penalty={params.repetition_penalty}: must be positive; 1 is off"
        )
    if len(params.logit_bias) > limits.max_logit_bias:
        raise ConfigError(
            f"logit_bias: {len(params.logit_bias)} tokens; at most {limits.max_logit_bias}"
        )
    for token, bias in params.logit_bias.items():
        if not 0 <= sample.whole("logit_bias", token) < limits.vocab_size:
            raise ConfigError(
                f"logit_bias: token {token} is outside the vocabulary of {limits.vocab_size}"
            )
        _number(f"logit_bias[{token}]", bias, -_LARGEST_BIAS, _LARGEST_BIAS)


def _logprobs(name: str, count: int | None, limits: Limits) -> None:
    if count is None:
        return
    if sample.whole(name, count) < 0:
        raise ConfigError(f"{name}={count}: must be 0 or more")
    offered = name == "logprobs" or limits.prompt_logprobs
    if limits.max_logprobs is None or not offered:
        raise ConfigError(f"{name}={count}: this runner offers none; start it with {name}")
    if count > limits.max_logprobs:
        raise ConfigError(f"{name}={count}: at most {limits.max_logprobs}")


def _number(name: str, value, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r}: must be a number from {low:g} to {high:g}")
