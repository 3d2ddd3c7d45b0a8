"""Multi-token-prediction layers in a file of their own (speculators' `mtp`)."""

from specjax.checkpoints import head_settings
from specjax.checkpoints.head_folder import HeadFolder, check_fit
from specjax.drafters import head_options
from specjax.drafters.head_options import HeadOptions
from specjax.models import mtp

_OWN_DEPTH = 3


def matches(folder: HeadFolder) -> bool:
    """What the configuration says, else tensors below `mtp_layers`."""
    stored = any(name.startswith("mtp_layers.") for name in folder.names)
    return folder.says == "mtp" or (folder.says is None and stored)


def build(folder: HeadFolder, target, options: HeadOptions):
    """The drafter."""
    folder.refuse("num_nextn_predict_layers", 1)
    config = folder.shape("qwen3")
    check_fit(folder, config, target.config, "hidden_size", "vocab_size")
    head = mtp.build(folder.checkpoint(config), target.module.dtype, target.config.num_layers)
    own = head_settings.draft_length(folder, "num_speculative_tokens", default=_OWN_DEPTH)
    return head_options.one_feature(head, options, own)
