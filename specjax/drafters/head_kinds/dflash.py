"""DFlash heads (z-lab, speculators, SpecForge) and JetSpec's causal ones: a block of drafts in one pass."""

from specjax.checkpoints import block_heads
from specjax.checkpoints.head_folder import HeadFolder
from specjax.drafters import head_options
from specjax.drafters.head_options import HeadOptions


def matches(folder: HeadFolder) -> bool:
    """Rows of context are normed for all layers together, and drafts do not depend on each other."""
    return block_heads.is_block(folder) and not block_heads.is_corrected(folder)


def build(folder: HeadFolder, target, options: HeadOptions):
    """The drafter."""
    head = block_heads.open_block(folder, target.module)
    return head_options.one_block(head, options, block_heads.own_depth(folder, head))
