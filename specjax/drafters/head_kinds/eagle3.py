"""EAGLE-3 and 3.1 heads: EAGLE's (arXiv 2503.01840), SGLang's, speculators', DeepSpec's and ModelOpt's layouts."""

from specjax.checkpoints import head_settings, heads
from specjax.checkpoints.head_folder import HeadFolder
from specjax.drafters import head_options
from specjax.drafters.head_options import HeadOptions

_OWN_DEPTH = 5


def matches(folder: HeadFolder) -> bool:
    """What the configuration says, else a first layer that norms the feature; without the mask rows of P-EAGLE."""
    return heads.is_eagle3(folder) and not heads.is_parallel(folder)


def build(folder: HeadFolder, target, options: HeadOptions):
    """The drafter."""
    head = heads.open_eagle3(folder, target.module)
    own = head_settings.draft_length(
        folder, "num_speculative_tokens", "ttt_length", default=_OWN_DEPTH
    )
    return head_options.one_feature(head, options, own)
