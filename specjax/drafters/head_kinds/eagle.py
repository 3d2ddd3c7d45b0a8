"""EAGLE-1/2 heads (arXiv 2401.15077, 2406.16858)."""

from specjax.checkpoints import heads
from specjax.checkpoints.head_folder import HeadFolder
from specjax.drafters import head_options
from specjax.drafters.head_options import HeadOptions

_OWN_DEPTH = 5


def matches(folder: HeadFolder) -> bool:
    """A decoder layer and `fc`."""
    return folder.says is None and heads.is_eagle(folder)


def build(folder: HeadFolder, target, options: HeadOptions):
    """The drafter."""
    head = heads.open_eagle(folder, target.module)
    return head_options.one_feature(head, options, _OWN_DEPTH)
