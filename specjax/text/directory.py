"""Tokenizers of Hugging Face directories: tokenizer.json, tokenizer.model or vocab.json, and the files beside them."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specjax.errors import CheckpointError
from specjax.text import sentencepiece

_log = logging.getLogger(__name__)

_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_PREFIX_BY_SETTINGS = ("GPT2Tokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer", "RobertaTokenizer")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


def read(path: Path, source: Path):
    """The `transformers` tokenizer of a directory.

    Args:
        path: where the files are.
        source: what errors call it.
    Raises:
        CheckpointError: they cannot be read, or number a token in two ways.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # AutoTokenizer would rebuild some models' pipelines by their class: the file itself is what counts.
    reader = PreTrainedTokenizerFast if (path / "tokenizer.json").is_file() else AutoTokenizer
    try:
        tokenizer = reader.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the readers raise whatever their parsers do
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(f"{source}: the tokenizer cannot be read: {reason}") from error
    settings = _settings(path)
    _set_prefix_space(tokenizer.backend_tokenizer, settings)
    _check_numbers(tokenizer, path, source, added_tokens(path, settings))
    return tokenizer


def convert_sentencepiece(path: Path, target: Path) -> None:
    """Writes the tokenizer.json that a directory's tokenizer.model amounts to, and its settings.

    Raises:
        ConfigError, CheckpointError: see `sentencepiece.read`; a file beside it is malformed.
    """
    settings = _settings(path)
    added = added_tokens(path, settings)
    backend, specials = sentencepiece.read(
        path / "tokenizer.model",
        add_bos=bool(settings.get("add_bos_token", True)),
        add_eos=bool(settings.get("add_eos_token", False)),
        specials={name: _content(settings[name]) for name in _NAMED if name in settings},
        spaces=_spaces(settings),
        added=added,
    )
    backend.save(str(target / "tokenizer.json"))
    # What they say of added tokens is in tokenizer.json now.
    kept = {
        k: v for k, v in settings.items() if k not in ("added_tokens_decoder", "tokenizer_class")
    }
    kept = {**specials, **{name: _content(v) if name in _NAMED else v for name, v in kept.items()}}
    (target / "tokenizer_config.json").write_text(json.dumps(kept), encoding="utf-8")
    if (path / "chat_template.jinja").is_file():
        shutil.copy(path / "chat_template.jinja", target)
    if (path / "additional_chat_templates").is_dir():
        shutil.copytree(path / "additional_chat_templates", target / "additional_chat_templates")


def _spaces(settings: Mapping[str, Any]) -> str | None:
    """How the tokenizer's class treats the beginning of a text; see `sentencepiece.read`."""
    name = str(settings.get("tokenizer_class")).removesuffix("Fast")
    if name == "GemmaTokenizer":
        return "never"
    if name not in ("LlamaTokenizer", "CodeLlamaTokenizer"):
        return None if settings.get("add_prefix_space", True) is not False else "never"
    if settings.get("add_prefix_space") is False:
        return "never"
    # CodeLlamaTokenizer has no such setting.
    return "always" if settings.get("legacy") and name == "LlamaTokenizer" else "first"


def _set_prefix_space(backend, settings: Mapping[str, Any]) -> None:
    """Lets the settings say whether a text begins with a space, for the classes of tokenizers that let them."""
    import tokenizers

    wanted = settings.get("add_prefix_space")
    name = str(settings.get("tokenizer_class")).removesuffix("Fast")
    if name not in _PREFIX_BY_SETTINGS or not isinstance(wanted, bool):
        return
    pipeline = json.loads(backend.to_str())["pre_tokenizer"] or {}
    steps = [s for s in pipeline.get("pretokenizers", [pipeline]) if s.get("type") == "ByteLevel"]
    if all(step["add_prefix_space"] == wanted for step in steps):
        return
    for step in steps:
        step["add_prefix_space"] = wanted
    empty = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    changed = tokenizers.Tokenizer.from_str(json.dumps({**empty, "pre_tokenizer": pipeline}))
    backend.pre_tokenizer = changed.pre_tokenizer


def added_tokens(path: Path, settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Tokens beyond the vocabulary file, by id, as fields of `tokenizers.AddedToken`.

    tokenizer_config.json's `added_tokens_decoder` has them; in older directories added_tokens.json does, and those are
    special that have a role.

    Raises:
        CheckpointError: a file is malformed.
    """
    try:
        if "added_tokens_decoder" in settings:
            decoder = settings["added_tokens_decoder"]
            return {
                int(i): {**fields, "content": str(fields["content"])}
                for i, fields in decoder.items()
            }
        special = {_content(settings.get(name)) for name in _NAMED}
        for name in _LISTS:
            special |= {_content(token) for token in settings.get(name) or ()}
        return {
            int(i): {
                "content": token,
                "special": token in special,
                "normalized": token not in special,
            }
            for token, i in _read_json(path / "added_tokens.json").items()
        }
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: the added tokens are malformed: {error}") from error


def _settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json; in directories without `added_tokens_decoder` special_tokens_map.json goes before it."""
    settings = _read_json(path / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= _read_json(path / "special_tokens_map.json")
    return settings


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not a JSON object: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object: found {type(content).__name__}")
    return content


def _content(token: Any) -> str | None:
    """The text of a special token in either spelling: a string, or an object with `content`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _check_numbers(
    tokenizer, path: Path, source: Path, added: Mapping[int, dict[str, Any]]
) -> None:
    """Compares the ids that the directory's files state with the tokenizer's; tokenizer.json's own count."""
    numbered = {f["content"]: i for i, f in added.items()}
    backend = tokenizer.backend_tokenizer
    differing = {t: i for t, i in numbered.items() if backend.token_to_id(t) != i}
    if not differing:
        return
    own = set()
    if (path / "tokenizer.json").is_file():
        content = _read_json(path / "tokenizer.json")
        vocab = content.get("model", {}).get("vocab", ())
        own = {token if isinstance(token, str) else token[0] for token in vocab}
        own |= {token["content"] for token in content.get("added_tokens", ())}
    for token, stated in differing.items():
        found = backend.token_to_id(token)
        if token not in own:
            raise CheckpointError(
                f"{source}: token {token!r} is number {stated} by added_tokens.json or tokenizer_config.json, and "
                f"{found} behind the tokens of the vocabulary; a tokenizer.json must have it among its added_tokens"
            )
        _log.warning(
            "%s: token %r is number %d by tokenizer.json, which counts, and %d by the files beside it",
            *(source, token, found, stated),
        )
