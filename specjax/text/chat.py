"""Conversations as people write them, checked and brought to the form that chat templates read."""

from collections.abc import Mapping, Sequence
from typing import Any

from specjax.errors import ConfigError

# Stands behind the text that is continued while a template renders it; templates that trim take its blank away.
_MARK = "SPECJAX_CONTINUES_HERE "
_TEXT_PARTS = ("text", "input_text", "output_text")


def messages(given: Any) -> list[dict[str, Any]]:
    """Checks a conversation; content in parts becomes text, its parts on lines of their own (as vLLM joins them).

    Args:
        given: messages with a `role` and `content`: text, or parts {"type": "text", "text": ...}. Content may be
            missing where a message has `tool_calls`. Other fields are left to the template.
    Raises:
        ConfigError: something else; the message is named by its number from 0, the field, and what was found.
    """
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Sequence):
        raise ConfigError(
            f"messages: expected a list of objects with role and content, found {type(given).__name__}"
        )
    if not given:
        raise ConfigError("messages is empty: a conversation needs at least one message")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(given)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ConfigError(
            f"{where}: expected an object with role and content, found {type(message).__name__}"
        )
    role = message.get("role")
    if not isinstance(role, str) or not role.strip():
        raise ConfigError(
            f"{where}: role={role!r}: expected a name such as system, user or assistant"
        )
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return dict(message)
    if content is None:
        found = "content is null" if "content" in message else "content is missing"
        raise ConfigError(f"{where}: {found}; expected text or a list of text parts")
    return {**message, "content": _text(content, f"{where}.content")}


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ConfigError(
            f"{where}: expected text or a list of parts, found {type(content).__name__}"
        )
    return "\n".join(_part(part, f"{where}[{index}]") for index, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ConfigError(
            f"{where}: expected a part with type and text, found {type(part).__name__}"
        )
    kind = part.get("type")
    if kind not in _TEXT_PARTS:
        raise ConfigError(
            f"{where}: type={kind!r} is not supported (supported: {', '.join(_TEXT_PARTS)})"
        )
    if not isinstance(part.get("text"), str):
        raise ConfigError(f"{where}: text={part.get('text')!r}: expected a string")
    return part["text"]


def generation_prompt(add: bool | None, continue_final: bool) -> bool:
    """Whether the assistant's turn is opened behind the messages; by default unless the last one is continued.

    Raises:
        ConfigError: both are asked for.
    """
    if add and continue_final:
        raise ConfigError(
            "add_generation_prompt and continue_final_message exclude each other: one opens a new turn, the other "
            "goes on with the last one"
        )
    return not continue_final if add is None else add


def marked(checked: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages that `messages` gave, with a mark behind the text of the last one.

    Raises:
        ConfigError: it has no text.
    """
    last = checked[-1]
    if last.get("content") is None:
        raise ConfigError(
            f"continue_final_message: messages[{len(checked) - 1}] has no content to continue"
        )
    return [*checked[:-1], {**last, "content": last["content"] + _MARK}]


def continued(rendered: str, content: str) -> str:
    """What a template made of marked messages, up to the mark: it ends with `content`, the last message's text.

    Raises:
        ConfigError: the template leaves that text out or changes it.
    """
    mark = _MARK.rstrip()
    blanks = content[len(content.rstrip()) :]
    before, found, behind = rendered.rpartition(mark)
    # A template that takes the mark's blank away would take the message's too; blanks before it are its own.
    if not behind.startswith(_MARK[len(mark) :]):
        before, content = before.removesuffix(blanks), content.rstrip()
    # It may have the message in several places.
    before = before.replace(_MARK, "").replace(blanks + mark, "").replace(mark, "")
    if not found or not before.endswith(content.lstrip()):
        raise ConfigError(
            "continue_final_message: the chat template leaves out or changes the last message, so that it cannot be "
            "continued; pass raw text or input_ids"
        )
    return before
