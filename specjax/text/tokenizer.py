"""Text to token ids and back: Hugging Face directories and the vocabulary inside GGUF files.

The work is done by the `tokenizers` package; `transformers` reads the directories and renders chat
templates (Jinja, sandboxed). Both are imported when a tokenizer is loaded, not before.
"""

import contextlib
import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from specjax.errors import CheckpointError, ConfigError
from specjax.text import vocabulary

# One of these must be there, in the order of preference.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def load(
    path: Path, checkpoint: Any = None, chat_template: str | None = None
) -> "Tokenizer | None":
    """The tokenizer of a checkpoint, or None for a directory without tokenizer files.

    Args:
        path: a Hugging Face directory or a .gguf file.
        checkpoint: the opened checkpoint; a GGUF file's metadata is `checkpoint.file.metadata`.
        chat_template: Jinja text to use instead of the model's own template.
    Raises:
        ConfigError: a kind of tokenizer that is not supported, or a template without a tokenizer.
        CheckpointError: tokenizer files or metadata that cannot be read.
    """
    if not path.is_dir():
        return from_gguf(checkpoint.file.metadata, str(path), chat_template)
    if any((path / name).is_file() for name in _FILES):
        return from_directory(path, chat_template)
    if chat_template is not None:
        raise ConfigError(
            f"a chat template was given, but {path} has no tokenizer ({' or '.join(_FILES)})"
        )
    return None


def from_directory(path: Path, chat_template: str | None = None) -> "Tokenizer":
    """Reads tokenizer.json, else tokenizer.model, else vocab.json; raises as `load`."""
    with _quiet_transformers():
        if (path / "tokenizer.json").is_file() or not (path / "tokenizer.model").is_file():
            return _read(path, str(path), chat_template)
        with tempfile.TemporaryDirectory() as folder:
            _convert_sentencepiece(path, Path(folder))
            return _read(Path(folder), str(path), chat_template)


def _read(path: Path, source: str, chat_template: str | None) -> "Tokenizer":
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # AutoTokenizer would rebuild some models' pipelines by their class: the file itself is what counts.
    reader = PreTrainedTokenizerFast if (path / "tokenizer.json").is_file() else AutoTokenizer
    try:
        tokenizer = reader.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the readers raise whatever their parsers do
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{source}: the tokenizer cannot be read: {reason}") from error
    return Tokenizer(tokenizer, source, chat_template)


def _convert_sentencepiece(path: Path, target: Path) -> None:
    """Writes the tokenizer.json that a directory's tokenizer.model amounts to, and its settings."""
    config = path / "tokenizer_config.json"
    try:
        stated = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        add_bos = bool(stated.get("add_bos_token", True))
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{config}: not a JSON object: {error}") from error
    backend, specials = vocabulary.from_sentencepiece(path / "tokenizer.model", add_bos)
    backend.save(str(target / "tokenizer.json"))
    (target / config.name).write_text(json.dumps({**specials, **stated}), encoding="utf-8")
    for name in ("special_tokens_map.json", "chat_template.jinja"):
        if (path / name).is_file():
            shutil.copy(path / name, target)


def from_gguf(
    metadata: Mapping[str, Any], source: str, chat_template: str | None = None
) -> "Tokenizer":
    """Builds the tokenizer that a GGUF file's metadata describes; raises as `load`."""
    with _quiet_transformers():
        from transformers import PreTrainedTokenizerFast

    backend, specials = vocabulary.from_gguf(metadata, source)
    own = metadata.get("tokenizer.chat_template")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=own, **specials)
    return Tokenizer(tokenizer, source, chat_template)


class Tokenizer:
    """A vocabulary with its text rules and chat template.

    Attributes:
        source: the file or directory it was read from.
        vocab_size: number of tokens; a model may pad its embedding beyond it.
        bos_token_id, eos_token_id: as the tokenizer states; what ends a generation is
            `ModelConfig.eos_token_ids`.
        chat_template: Jinja text, or None.
    """

    def __init__(self, tokenizer: Any, source: str, chat_template: str | None = None):
        """Wraps a `transformers` fast tokenizer."""
        self._tokenizer = tokenizer
        self.source = source
        self._backend = tokenizer.backend_tokenizer
        # Some tokenizer.json files carry a training run's limits; prompts are never cut or padded.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.eos_token_id: int | None = tokenizer.eos_token_id
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        self.chat_template: str | None = own if chat_template is None else chat_template

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written in it become their ids.

        Args:
            text: raw text, no chat template.
            add_special_tokens: add what the model's tokenizer puts around a text (usually BOS).
        """
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream_decoder(self, skip_special_tokens: bool = True) -> "StreamDecoder":
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self._backend, skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant begins to speak; see `render_chat`."""
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Text of a conversation, up to where the assistant begins to speak, special tokens written out.

        Args:
            messages: {"role": "system" | "user" | "assistant", "content": text} in order.
        Raises:
            ConfigError: no messages, no template, or a template that fails or refuses the messages.
        """
        if not messages:
            raise ConfigError("messages is empty: a conversation needs at least one message")
        if self.chat_template is None:
            raise ConfigError(
                f"{self.source} has no chat template, so messages cannot be rendered: give one with "
                "--chat_template=FILE (Jinja), or pass raw text or input_ids"
            )
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ConfigError(f"the chat template of {self.source} failed: {error}") from error

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and the chat template into a folder."""
        self._tokenizer.save_pretrained(folder)

    def merges(self) -> tuple[dict[str, int], list[str]]:
        """The vocabulary, and what each merge of byte-pair encoding makes, in order; empty for other kinds."""
        model = json.loads(self._backend.to_str())["model"]
        pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model.get("merges", ())]
        return self._backend.get_vocab(with_added_tokens=True), ["".join(pair) for pair in pairs]

    def digest(self) -> str:
        """SHA-256 over the (id, token) pairs: equal where ids mean the same tokens."""
        vocab = self._backend.get_vocab(with_added_tokens=True)
        lines = (f"{i}\t{token}\n" for token, i in sorted(vocab.items(), key=lambda item: item[1]))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


class StreamDecoder:
    """Decodes ids one by one: no halves of UTF-8 characters, no lost spaces.

    The pieces that `step` and `finish` return, joined, are `Tokenizer.decode` of all ids.
    """

    def __init__(self, backend: Any, skip_special_tokens: bool):
        from tokenizers.decoders import DecodeStream

        self._backend = backend
        self._skip = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        added = backend.get_added_tokens_decoder() if skip_special_tokens else {}
        self._skipped = frozenset(i for i, token in added.items() if token.special)
        self._held: list[int] = []
        self._ids: list[int] = []
        self._emitted = 0

    def step(self, token_id: int) -> str:
        """Takes one id; returns the text that it completes, "" while a character is open."""
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        self._held.append(token_id)
        # A run of byte tokens decodes as a whole (one wrong byte spoils all), so it waits for its end.
        if _BYTE_TOKEN.fullmatch(self._backend.id_to_token(token_id) or ""):
            return ""
        text = self._stream.step(self._backend, self._held) or ""
        self._held = []
        self._emitted += len(text)
        return text

    def finish(self) -> str:
        """What is left when no more ids come: held bytes, an incomplete character as U+FFFD."""
        text = self._backend.decode(self._ids, skip_special_tokens=self._skip)
        rest = text[self._emitted :]
        self._emitted = len(text)
        return rest


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keeps back the notice that `transformers` logs at import where torch is missing; it is not needed."""
    logger = logging.getLogger("transformers")
    keep = lambda record: "PyTorch was not found" not in record.getMessage()
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
