"""Bodies of requests: every field is honoured, ignored or refused by name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from specjax.serving.http.errors import ApiError

_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]

# What changes nothing about the text, so that it may be left unread.
IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "parallel_tool_calls"),
)
# What would change it and is not supported: the field, and the values at which it asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
    "suffix": (None, ""),
    "best_of": (None, 1),
}


class StreamOptions(BaseModel):
    """Attributes:
    include_usage: usage comes in a last chunk of its own.
    continuous_usage_stats: and with every chunk.
    """

    model_config = ConfigDict(extra="forbid")
    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False


class Generation(BaseModel):
    """What chats and completions have in common; names are OpenAI's, and vLLM's for what that does not have.

    Attributes:
        seed: same seed, same text; None: another one each time.
        stop_token_ids, ignore_eos: what ends a text beside the model's own end.
        speculation: "off": this request does without drafts.
        add_special_tokens: around a prompt that is text, as the tokenizer puts them.
    """

    model_config = ConfigDict(extra="forbid")
    model: StrictStr | None = None
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    n: StrictInt = Field(1, ge=1)
    max_tokens: StrictInt | None = Field(None, ge=1)
    temperature: _Number | None = Field(None, ge=0)
    top_p: _Number | None = Field(None, gt=0, le=1)
    top_k: StrictInt | None = Field(None, ge=-1)
    min_p: _Number | None = Field(None, ge=0, le=1)
    presence_penalty: _Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: _Number | None = Field(None, ge=-2, le=2)
    repetition_penalty: _Number | None = Field(None, gt=0)
    logit_bias: dict[str, _Number] | None = None
    stop: StrictStr | list[StrictStr] | None = None
    stop_token_ids: list[StrictInt] | None = None
    ignore_eos: StrictBool = False
    seed: StrictInt | None = None
    speculation: Literal["auto", "off"] = "auto"


class Chat(Generation):
    """Body of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: StrictInt | None = Field(None, ge=1)
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = Field(None, ge=0, le=20)
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool = False


class Completion(Generation):
    """Body of /v1/completions: texts or token ids, one or several."""

    prompt: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]
    echo: StrictBool = False
    logprobs: StrictInt | None = Field(None, ge=0)
    add_special_tokens: StrictBool = True


class Tokenize(BaseModel):
    """Body of /tokenize: a prompt or messages."""

    model_config = ConfigDict(extra="forbid")
    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: StrictBool = True
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool = False
    return_token_strs: StrictBool = False


class Detokenize(BaseModel):
    """Body of /detokenize."""

    model_config = ConfigDict(extra="forbid")
    model: StrictStr | None = None
    tokens: list[StrictInt]


def parse[Body: BaseModel](body: type[Body], raw: Any) -> Body:
    """Checks a body.

    Raises:
        ApiError: 400, for the first field that is wrong, unknown or not supported.
    """
    if not isinstance(raw, dict):
        raise ApiError(400, f"the body must be a JSON object, found {type(raw).__name__}")
    known = body.model_fields
    # As OpenAI has it: a field that is null is one that is left out.
    raw = {name: value for name, value in raw.items() if value is not None}
    for field, neutral in NEUTRAL.items() if issubclass(body, Generation) else ():
        if field in raw and raw[field] not in neutral:
            raise ApiError(
                400,
                f"{field}={_short(raw[field])} is not supported by this server; leave it out",
                param=field,
                code="unsupported_parameter",
            )
    left_out = {*IGNORED, *NEUTRAL} if issubclass(body, Generation) else set()
    given = {name: value for name, value in raw.items() if name not in left_out}
    for name in given:
        if name not in known:
            message = f"{_short(name)} is not known here; supported are {', '.join(known)}"
            raise ApiError(400, message, param=name, code="unknown_parameter")
    try:
        found = body.model_validate(given)
    except ValidationError as error:
        raise _refusal(error) from None
    if isinstance(found, Generation) and found.stream_options is not None and not found.stream:
        raise ApiError(400, "stream_options needs stream=true", param="stream_options")
    return found


def _refusal(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "body"
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{field} is not known here", param=field, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{field} is missing", param=field, code="missing_required_parameter")
    message = f"{field}={_short(first['input'])}: {first['msg']}"
    return ApiError(400, message, param=str(first["loc"][0]), code="invalid_value")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
