"""Text to token ids and back: Hugging Face directories and the vocabulary inside GGUF files.

The work is done by the `tokenizers` package; `transformers` reads the directories and renders chat
templates (Jinja, sandboxed). Both are imported when a tokenizer is loaded, not before.
"""

import contextlib
import hashlib
import json
import logging
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from specjax.errors import ConfigError, SpecjaxError
from specjax.text import chat, directory, special_ids, vocabulary
from specjax.text.detokenize import StreamDecoder

_log = logging.getLogger(__name__)

# One of these must be there, in the order of preference.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


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


def load_or_defer(
    path: Path, checkpoint: Any = None, chat_template: str | None = None
) -> "Tokenizer | Unreadable | None":
    """As `load`, but the error of a tokenizer that cannot be built is raised where text is first needed."""
    try:
        return load(path, checkpoint, chat_template)
    except SpecjaxError as error:
        if chat_template is not None:
            raise
        return Unreadable(error)


def from_directory(path: Path, chat_template: str | None = None) -> "Tokenizer":
    """Reads tokenizer.json, else tokenizer.model, else vocab.json; raises as `load`."""
    with _quiet_transformers():
        if (path / "tokenizer.json").is_file() or not (path / "tokenizer.model").is_file():
            tokenizer = directory.read(path, path)
        else:
            with tempfile.TemporaryDirectory() as folder:
                directory.convert_sentencepiece(path, Path(folder))
                tokenizer = directory.read(Path(folder), path)
    found = Tokenizer(tokenizer, str(path), chat_template)
    # Files of models that do not chat, or chat otherwise, may have such tokens for other purposes.
    template = found.chat_template or ""
    added = tokenizer.get_added_vocab()
    found.add_ends(added, [token for token in added if token in template])
    return found


def from_gguf(
    metadata: Mapping[str, Any], source: str, chat_template: str | None = None
) -> "Tokenizer":
    """Builds the tokenizer that a GGUF file's metadata describes; raises as `load`."""
    with _quiet_transformers():
        from transformers import PreTrainedTokenizerFast

    backend, specials = vocabulary.from_gguf(metadata, source)
    own = metadata.get("tokenizer.chat_template")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=own, **specials)
    found = Tokenizer(tokenizer, source, chat_template)
    # As llama.cpp does, whatever the template: files often name the end of documents only.
    added = tokenizer.get_added_vocab()
    found.add_ends(added, added)
    return found


class Tokenizer:
    """A vocabulary with its text rules and chat template.

    Attributes:
        source: the file or directory it was read from.
        vocab_size: number of tokens; a model may pad its embedding beyond it.
        bos_token_id, eos_token_id: as the tokenizer states.
        end_ids: its EOS and the ends of turns that it knows by name; what ends a generation is
            `LoadedModel.stop_ids`.
        special_tokens: those that have no text, by id.
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
        self.end_ids: tuple[int, ...] = () if self.eos_token_id is None else (self.eos_token_id,)
        added = self._backend.get_added_tokens_decoder()
        self.special_tokens: dict[int, str] = {
            i: token.content for i, token in added.items() if token.special
        }
        self._templates: tuple[str, ...] = ()
        own = tokenizer.chat_template
        if isinstance(own, dict):
            self._templates = tuple(own)
            own = own.get("default") if len(own) > 1 else next(iter(own.values()), None)
        self.chat_template: str | None = own if chat_template is None else chat_template

    def add_ends(self, added: Mapping[str, int], used: Collection[str]) -> None:
        """Counts ends of turns among the added tokens, by name, as ends of a generation: those that are used."""
        known = dict.fromkeys(self.end_ids)
        by_name = {added[token] for token in used}
        self.end_ids = tuple(known | {i: None for i in special_ids.ends(added) if i in by_name})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written in it become their ids.

        Args:
            text: raw text, no chat template.
            add_special_tokens: add what the model's tokenizer puts around a text (usually BOS).
        """
        unicode_text("the text", text)
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream_decoder(
        self, prompt: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> StreamDecoder:
        """A decoder for ids that arrive one by one behind a prompt."""
        skipped = self.special_tokens if skip_special_tokens else ()
        return StreamDecoder(self._backend, prompt, skipped)

    def piece(self, token_id: int) -> str:
        """Text of one token within a text: blanks stay, special tokens are written out, a lone byte is U+FFFD."""
        decoder = self.stream_decoder(self.encode("a", False), skip_special_tokens=False)
        return decoder.step(token_id) + decoder.finish()

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Token ids of a conversation; see `render_chat`."""
        text = self.render_chat(messages, add_generation_prompt, continue_final_message)
        return self.encode(text, add_special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """Text of a conversation, special tokens written out.

        Args:
            messages: {"role": "system" | "user" | "assistant" | ..., "content": text, or parts of text} in order.
            add_generation_prompt: end where the assistant begins to speak; default: unless the last message goes on.
            continue_final_message: end with the last message's text, so that it is continued.
        Raises:
            ConfigError: malformed or no messages, no template, a template that fails, refuses the messages or
                changes the one to continue, or both of the flags.
        """
        checked = chat.messages(messages)
        opened = chat.generation_prompt(add_generation_prompt, continue_final_message)
        if self.chat_template is None:
            raise ConfigError(
                f"{self._lack_of_template()}, so messages cannot be rendered: give one with "
                "--chat_template=FILE (Jinja), or pass raw text or input_ids"
            )
        given = chat.marked(checked) if continue_final_message else checked
        try:
            text = self._tokenizer.apply_chat_template(
                given,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=opened,
            )
        except (
            Exception
        ) as error:  # templates are programs that come with models: they fail in every way
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ConfigError(f"the chat template of {self.source} failed: {reason}") from error
        return chat.continued(text, checked[-1]["content"]) if continue_final_message else text

    def _lack_of_template(self) -> str:
        if not self._templates:
            return f"{self.source} has no chat template"
        return f"{self.source} has the chat templates {', '.join(self._templates)} and none is 'default'"

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and the chat template into a folder."""
        self._tokenizer.save_pretrained(folder)

    def merges(self) -> tuple[dict[str, int], list[str]]:
        """The vocabulary, and what each merge of byte-pair encoding makes, in order; empty for other kinds."""
        model = json.loads(self._backend.to_str())["model"]
        pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model.get("merges", ())]
        return self._backend.get_vocab(with_added_tokens=True), ["".join(pair) for pair in pairs]

    def conflict(self, other: "Tokenizer") -> tuple[int, str, str] | None:
        """An id that is one token here and another one in `other`, with both; None if there is none."""
        mine = {i: token for token, i in self._backend.get_vocab(with_added_tokens=True).items()}
        theirs = other._backend.get_vocab(with_added_tokens=True)
        return next(
            (
                (i, mine[i], token)
                for token, i in sorted(theirs.items(), key=lambda item: item[1])
                if mine.get(i, token) != token
            ),
            None,
        )

    def digest(self) -> str:
        """SHA-256 over the (id, token) pairs: equal where ids mean the same tokens."""
        vocab = self._backend.get_vocab(with_added_tokens=True)
        lines = (f"{i}\t{token}\n" for token, i in sorted(vocab.items(), key=lambda item: item[1]))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


class Unreadable:
    """Stands for a tokenizer that cannot be built: whatever is asked of it raises the error that says why.

    Attributes:
        error: that error.
    """

    def __init__(self, error: SpecjaxError):
        self.error = error
        self._said = False

    def warn(self) -> None:
        """Logs, once, that there are token ids but no text, and why."""
        if not self._said:
            _log.warning("results have token ids and no text: %s", self.error)
        self._said = True

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise self.error


def unicode_text(name: str, text: str) -> str:
    """The text, if it is Unicode.

    Raises:
        ConfigError: it has half a surrogate pair, as JSON escapes and wrongly decoded bytes may leave; `name` is named.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{name} is not Unicode: half a surrogate pair, {text[error.start]!r}, at character {error.start}"
        ) from None
    return text


def usable(tokenizer: Any) -> "Tokenizer | None":
    """The tokenizer of a model, None where there is none that could be built."""
    return None if isinstance(tokenizer, Unreadable) else tokenizer


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
