"""Draft models: loaded as their target computes, with the target's tokens."""

from specjax import loading
from specjax.errors import ConfigError
from specjax.loading import LoadOptions


def load(target, model: str, scheme: str | None, quantize: str | None, keep_codes: bool = False):
    """Loads a draft model in the target's compute dtype; `quantize` rounds a dense one to a scheme."""
    options = LoadOptions(
        dtype=target.dtype_name,
        scheme=scheme,
        quantize=quantize,
        dequantize="never" if keep_codes else "auto",
    )
    draft = loading.load_model(model, options)
    _same_tokenizer(target, draft)
    return draft


def _same_tokenizer(target, draft) -> None:
    """Refuses a draft model whose token ids mean something else."""
    vocabularies = target.config.vocab_size, draft.config.vocab_size
    if vocabularies[0] != vocabularies[1]:
        raise ConfigError(
            f"draft model {draft.name!r} has vocab_size {vocabularies[1]}, the target {target.name!r} has "
            f"{vocabularies[0]}; they need the same tokenizer"
        )
    known = target.tokenizer and draft.tokenizer
    if known and target.tokenizer.digest() != draft.tokenizer.digest():
        raise ConfigError(
            f"draft model {draft.name!r} has another tokenizer than the target {target.name!r} (same size, "
            "other tokens); use a draft model of the same family"
        )
