"""PARD draft models: a causal language model of the target's family that was trained to draft in one pass."""

from specjax.checkpoints.head_folder import HeadFolder
from specjax.drafters import common_vocabulary, draft_model, head_options
from specjax.drafters.head_options import HeadOptions
from specjax.models.pard import PardHead

_OWN_DEPTH = 8  # slots that PARD trains


def matches(folder: HeadFolder) -> bool:
    """A language model whose configuration names a token to draft with."""
    return folder.setting("pard_token") is not None or folder.setting("spd_type") is not None


def build(folder: HeadFolder, target, options: HeadOptions):
    """The drafter."""
    folder.refuse("spd_type", "pard")
    draft = draft_model.load(target, str(folder.path), None, None)
    folder.leave_to_loader()
    model = common_vocabulary.fitted(draft.module, target.config.vocab_size)
    token = folder.token("pard_token", vocab_size=draft.config.vocab_size)
    return head_options.one_pass(lambda depth: PardHead(model, token, depth), options, _OWN_DEPTH)
