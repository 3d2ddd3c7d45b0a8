"""Draft models: loaded as their target computes, with the target's tokens."""

from specjax import loading
from specjax.drafters import common_vocabulary
from specjax.loading import LoadOptions


def load(target, model: str, scheme: str | None, quantize: str | None, keep_codes: bool = False):
    """Loads a draft model in the target's dtype and on its backend; `quantize` rounds a dense one to a scheme."""
    options = LoadOptions(
        dtype=target.dtype_name,
        backend=target.module.backend,
        scheme=scheme,
        quantize=quantize,
        dequantize="never" if keep_codes else "auto",
    )
    draft = loading.load_model(model, options)
    common_vocabulary.check(target, draft)
    if draft.config.vocab_size < target.config.vocab_size:
        common_vocabulary.clip(draft.module)
    return draft
