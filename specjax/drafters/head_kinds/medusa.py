"""Medusa-1 heads (arXiv 2401.10774)."""

from specjax.checkpoints import heads
from specjax.checkpoints.head_folder import MEDUSA_FILES, HeadFolder
from specjax.drafters import head_options
from specjax.drafters.head_options import HeadOptions
from specjax.models.medusa import MedusaSlots


def matches(folder: HeadFolder) -> bool:
    """Weights in Medusa's own file."""
    return any((folder.path / name).is_file() for name in MEDUSA_FILES)


def build(folder: HeadFolder, target, options: HeadOptions):
    """The drafter; trees of medusa_choices.json are what the drafter `medusa` drafts."""
    slots = MedusaSlots(heads.open_medusa(folder, target.module)[0])
    return head_options.one_block(slots, options, slots.num_drafts)
