"""DSpark heads (DeepSpec, speculators, SpecForge): DFlash's block, corrected from token to token."""

from specjax.checkpoints import block_heads
from specjax.checkpoints.head_folder import HeadFolder
from specjax.drafters import head_options
from specjax.drafters.head_options import HeadOptions


def matches(folder: HeadFolder) -> bool:
    """A block head with a term of the token before, or a confidence."""
    return block_heads.is_block(folder) and block_heads.is_corrected(folder)


def build(folder: HeadFolder, target, options: HeadOptions):
    """The drafter."""
    head = block_heads.open_block(folder, target.module)
    return head_options.one_block(head, options, block_heads.own_depth(folder, head))
