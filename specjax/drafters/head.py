"""Drafting with any draft head: the folder tells the kind.

To add a kind: write its file in `head_kinds/`, with `matches(folder)` and `build(folder, target, options)`, and name it
in `KINDS`. `matches` looks at names of tensors and settings; `build` reads the head through
`specjax.checkpoints.head_folder`, which refuses what was left unread, and hands the network to
`head_options.one_feature` (a feature a pass) or `head_options.one_pass` (all drafts in one pass), where rounds, trees,
rollback, batches and sampling are. `head_kinds/peagle.py` and `models/peagle.py` are the shortest with a network of
their own.
"""

import importlib
from types import ModuleType

from specjax.checkpoints.head_folder import HeadFolder
from specjax.drafters import head_options, options
from specjax.drafters.base import Drafter
from specjax.drafters.head_options import HeadOptions
from specjax.errors import CheckpointError, ConfigError
from specjax.files import hub
from specjax.quantize import heads as rotated

# Files in head_kinds/, in the order in which they are asked.
KINDS = ("medusa", "mtp", "dspark", "dflash", "peagle", "eagle3", "eagle", "pard")


def find_kind(folder: HeadFolder) -> str | None:
    """The kind of head that a folder holds, one of `KINDS`; None where it holds none that is known."""
    return next((name for name in KINDS if module_of(name).matches(folder)), None)


def module_of(name: str) -> ModuleType:
    """The module of a kind."""
    return importlib.import_module(f"specjax.drafters.head_kinds.{name}")


def kind_of(folder: HeadFolder) -> ModuleType:
    """The module of the kind of head that a folder holds.

    Raises:
        CheckpointError: of none that is known.
    """
    if (name := find_kind(folder)) is not None:
        return module_of(name)
    stated = folder.says or ", ".join(folder.classes) or "nothing"
    some = ", ".join(sorted(folder.names)[:3])
    raise CheckpointError(
        f"{folder.path}: a draft head of no known kind; config.json says {stated}, and it holds {some}, ... "
        f"(supported: {', '.join(KINDS)})"
    )


def build(
    target,
    model: str,
    tree: str | None = None,
    num_nodes: int | None = None,
    draft_depth: int | None = None,
    topk: int | None = None,
    window: int | None = None,
    layer_ids: list[int] | None = None,
    confidence: float | None = None,
) -> Drafter:
    """Opens the head in the folder `model`.

    Args:
        tree: "chain" (of the head's own length, unless `draft_depth` is given), "best-first" or "topk"; None: what
            suits the kind.
        topk: children per node of a `topk` tree.
        confidence: of heads that know it, the least probability of being kept that a draft of a chain may have; the
            chain ends before the first that is below.
        window: tokens of the text that the head's attention sees at most.
        layer_ids: states of the target that the head reads (i is the input of layer i), where its settings mean others.
    """
    wanted = HeadOptions(
        tree=tree, num_nodes=num_nodes, draft_depth=draft_depth, topk=topk, confidence=confidence
    )
    head_options.check(wanted)
    lengths = {"draft_depth": draft_depth, "window": window}
    options.lengths(target, **{name: v for name, v in lengths.items() if v is not None})
    path = hub.shipped_head(str(model)) or hub.resolve(str(model))
    folder = HeadFolder(path, window, layer_ids)
    drafter = kind_of(folder).build(folder, target, wanted)
    folder.finish()
    if unused := folder.unused():
        raise ConfigError(f"{unused}: heads of this kind have no such setting; leave it out")
    if drafter.needs is not None:
        rotated.check_pair(hub.resolve(target.name), path, folder.tensors)
    return drafter
