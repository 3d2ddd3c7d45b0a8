"""Medusa-1 heads (arXiv 2401.10774)."""

from specjax.checkpoints import heads
from specjax.checkpoints.head_folder import MEDUSA_FILES, HeadFolder
from specjax.drafters import medusa
from specjax.drafters.head_options import HeadOptions
from specjax.errors import ConfigError


def matches(folder: HeadFolder) -> bool:
    """Weights in Medusa's own file."""
    return any((folder.path / name).is_file() for name in MEDUSA_FILES)


def build(folder: HeadFolder, target, options: HeadOptions):
    """The drafter: a static tree over the heads' best tokens, or their chain."""
    loaded, _ = heads.open_medusa(folder, target.module)
    count = len(loaded.heads)
    if options.shape("topk", "chain") == "chain":
        depth = options.chain_depth(count)
        if depth > count:
            raise ConfigError(f"draft_depth={depth}: the file has {count} heads; at most so many")
        return medusa.medusa(loaded, [(0,) * (d + 1) for d in range(depth)])
    depth = options.draft_depth or count
    if depth > count:
        raise ConfigError(f"draft_depth={depth}: the file has {count} heads; at most so many")
    chosen = {"num_nodes": options.num_nodes, "topk": options.topk}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    return medusa.medusa(loaded, medusa.default_choices(depth, **chosen))
