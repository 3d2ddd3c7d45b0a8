"""P-EAGLE heads (speculators' `peagle`): EAGLE-3's network with rows of a mask token drafts in one pass."""

import jax.numpy as jnp

from specjax.checkpoints import head_settings, heads
from specjax.checkpoints.head_folder import HeadFolder
from specjax.drafters import head_options
from specjax.drafters.head_options import HeadOptions
from specjax.models.peagle import PEagleHead

_OWN_DEPTH = 5
# As vLLM looks for it.
_MASK_TOKEN = ("mask_token_id", "dspark_noise_token_id", "pard_token", "ptd_token_id")


def matches(folder: HeadFolder) -> bool:
    """EAGLE-3's network with a learned feature of mask rows."""
    return heads.is_eagle3(folder) and heads.is_parallel(folder)


def build(folder: HeadFolder, target, options: HeadOptions):
    """The drafter."""
    body = heads.open_eagle3(folder, target.module, "qwen3")
    width = len(body.needs) * target.config.hidden_size
    stored = folder.checkpoint(body.config).tensor("mask_hidden", (1, 1, width))
    mask = jnp.asarray(stored.reshape(-1), target.module.dtype)
    token = folder.token(*_MASK_TOKEN, vocab_size=body.config.vocab_size)
    own = head_settings.draft_length(folder, "num_speculative_tokens", default=_OWN_DEPTH)
    return head_options.one_pass(lambda depth: PEagleHead(body, mask, token, depth), options, own)
