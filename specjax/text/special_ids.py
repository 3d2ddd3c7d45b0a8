"""Special token ids from everything that names them: the model's configuration, its tokenizer, well-known names.

The configuration gives the ids of config.json, generation_config.json or a GGUF file's metadata (eos, eot, eom). The
tokenizer adds its own EOS and the ends of turns that it knows by name, because files often state one id of several.
"""

from collections.abc import Iterable, Mapping

from specjax.errors import ConfigError
from specjax.text import inputs

# Tokens that are ends of turns or documents wherever they are special tokens, by name.
UNMISTAKABLE = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
    *("<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_utterance>"),
    *("<turn|>", "<|end_of_turn|>", "<|eot|>", "<|END_OF_TURN_TOKEN|>"),
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
ENDS = (*UNMISTAKABLE, "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "</s>", "<eos>")
# Where a model ends its answers with these, <|end|> ends only a message of several.
_HARMONY = ({"<|return|>", "<|call|>"}, {"<|flush|>", "<|calls|>"})


def ends(tokens: Mapping[str, int]) -> tuple[int, ...]:
    """Ids of the tokens that are ends of turns by name."""
    inner = any(names <= tokens.keys() for names in _HARMONY)
    return tuple(tokens[n] for n in ENDS if n in tokens and not (inner and n == "<|end|>"))


def stop_ids(
    stated: Iterable[int], tokenizer_ids: Iterable[int], vocab_size: int
) -> tuple[int, ...]:
    """Ids that end a generation, within the vocabulary: what the configuration states, then the tokenizer's."""
    found = dict.fromkeys((*stated, *tokenizer_ids))
    return tuple(i for i in found if 0 <= i < vocab_size)


def chosen(name: str, ids: Iterable[int] | None) -> tuple[int, ...]:
    """Ids that a user names, as Python integers, each once.

    Raises:
        ConfigError: they are something else; the option `name` is named.
    """
    return tuple(dict.fromkeys(inputs.token_ids(name, () if ids is None else ids)))


def within(name: str, ids: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """The ids, if all are of the vocabulary.

    Raises:
        ConfigError: one is not; the option `name` is named.
    """
    for i in ids:
        if not 0 <= i < vocab_size:
            raise ConfigError(f"{name}: {i} is no token id of the vocabulary of {vocab_size}")
    return tuple(ids)
