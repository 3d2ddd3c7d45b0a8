"""The depth policy that a caller asks for, read from a checkpoint and a predictor's folder."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from specjax.config import ModelConfig
from specjax.depth import checkpoint as stored
from specjax.depth import predictor as predictors
from specjax.depth.routed import Routed
from specjax.depth.selection import DEFAULT_SURVIVORS, MODES, Selection
from specjax.errors import ConfigError
from specjax.models.llama import Llama

Depth = Literal["auto", "full", "routed"]
DEPTHS = ("auto", "full", "routed")


def policy(
    checkpoint,
    depth: Depth = "auto",
    tree_selection: str = "off",
    predictor: str | Path | None = None,
    survivors: int | None = None,
) -> Routed | None:
    """Checks the settings and reads routers and predictor; None is full depth.

    Args:
        checkpoint: a `specjax.checkpoints.base.Checkpoint`.
        depth: "auto" routes where the checkpoint has routers, "full" leaves them out.
        tree_selection: see `specjax.depth.selection.Selection`.
        predictor: folder that experiments.train_predictor wrote.
        survivors: nodes that tree_selection "prune" keeps.
    Raises:
        ConfigError: a combination without meaning.
        FileNotFoundError, CheckpointError: routers or predictor are missing or do not fit.
    """
    config = checkpoint.config
    if depth not in DEPTHS:
        raise ConfigError(f"{depth=}: supported are {', '.join(DEPTHS)}")
    if depth == "routed" and config.depth is None:
        raise ConfigError(
            "depth='routed': the model has no routers (no dynamic_* keys in its config.json); train them with "
            "experiments.train_depth, or drop --depth"
        )
    selection = _selection(tree_selection, predictor, survivors)
    if depth == "full" or config.depth is None:
        if selection.mode != "off":
            reason = "depth='full'" if depth == "full" else "the model has no routers"
            raise ConfigError(
                f"{tree_selection=} chooses who decides on skipping layers, and {reason}; "
                "drop --tree_selection, or load a model with routers at --depth=auto"
            )
        return None
    scorer = None
    if predictor is not None:
        scorer = predictors.load(Path(predictor), config.hidden_size, config.num_layers)
    return Routed(config.depth, stored.routers_from(checkpoint, config.depth), selection, scorer)


def attach(model: Llama, config: ModelConfig, depth: Routed | None) -> Llama:
    """The model with a depth policy; `config` is its checkpoint's."""
    config = replace(model.config, depth=None if depth is None else config.depth)
    return Llama(config, model.model, model.lm_head, depth)


def _selection(mode: str, predictor: str | Path | None, survivors: int | None) -> Selection:
    if mode not in MODES:
        raise ConfigError(f"tree_selection={mode!r}: supported are {', '.join(MODES)}")
    if mode != "off" and predictor is None:
        raise ConfigError(
            f"tree_selection={mode!r} needs a predictor (--predictor=DIR, from experiments.train_predictor)"
        )
    if mode == "off" and predictor is not None:
        raise ConfigError(
            f"predictor={str(predictor)!r} has no effect with tree_selection='off'; use 'vote' or 'prune'"
        )
    if mode != "prune" and survivors is not None:
        raise ConfigError(f"{survivors=} has no effect with tree_selection={mode!r}; use 'prune'")
    return Selection(mode=mode, survivors=DEFAULT_SURVIVORS if survivors is None else survivors)
