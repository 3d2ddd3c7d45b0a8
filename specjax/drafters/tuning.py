"""How large a draft tree pays: a cost model of measured times and acceptance.

A step that verifies n nodes after d levels of drafting takes T_verify(n) + T_propose(n, d) and yields 1 + E[min(a, d)]
tokens, where a is how many drafted tokens a tree of n nodes gets accepted. The choice minimizes time per token; where
nothing is faster than plain decoding (one row, no drafting), drafting is off.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specjax.errors import ConfigError
from specjax.files import writer

_FORMAT = "specjax-tuned"


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Measurements of one model and drafter on one device.

    Attributes:
        verify_ms: time of the target's pass by rows; holds 1.
        propose_ms: by number of nodes the drafting times by depth, {nodes: {depth: ms}}; linear between depths.
        acceptance: by number of nodes how many steps accepted 0, 1, 2, ... drafted tokens.
    """

    verify_ms: dict[int, float]
    propose_ms: dict[int, dict[int, float]]
    acceptance: dict[int, list[int]]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model expects of a tree.

    Attributes:
        num_nodes: of the tree, root included; 1 is plain decoding.
        draft_depth: its levels; 0 is plain decoding.
        acceptance_length: tokens per step.
        step_ms: time of a step.
        speedup: over plain decoding.
    """

    num_nodes: int
    draft_depth: int
    acceptance_length: float
    step_ms: float
    speedup: float


def verify_ms(costs: Costs, rows: int) -> float:
    """Time of a pass over `rows` nodes, linear between those measured."""
    known = sorted(costs.verify_ms)
    return float(np.interp(rows, known, [costs.verify_ms[n] for n in known]))


def predictions(costs: Costs) -> Iterator[Prediction]:
    """Plain decoding, then every tree size with every depth up to the one it was measured with."""
    plain = costs.verify_ms[1]
    yield Prediction(num_nodes=1, draft_depth=0, acceptance_length=1.0, step_ms=plain, speedup=1.0)
    for nodes, histogram in sorted(costs.acceptance.items()):
        counts = np.asarray(histogram, np.float64)
        times = costs.propose_ms[nodes]
        for depth in range(1, min(len(counts) - 1, nodes - 1) + 1):
            accepted = np.minimum(np.arange(len(counts)), depth)
            length = 1 + float(accepted @ counts / max(counts.sum(), 1))
            drafting = float(np.interp(depth, sorted(times), [times[d] for d in sorted(times)]))
            step = verify_ms(costs, nodes) + drafting
            yield Prediction(
                num_nodes=nodes,
                draft_depth=depth,
                acceptance_length=length,
                step_ms=step,
                speedup=plain * length / step,
            )


def choose(costs: Costs, margin: float = 0.05) -> Prediction:
    """The fastest tree, or plain decoding unless a tree gains more than `margin`."""
    plain, *trees = predictions(costs)
    best = max(trees, key=lambda prediction: prediction.speedup, default=plain)
    return best if best.speedup > 1 + margin else plain


def write(
    path: Path, *, spec: dict[str, Any], choice: Prediction, costs: Costs, facts: dict
) -> None:
    """Writes the drafter to use (`spec`), the prediction, the measurements and where they are from."""
    content = {"format": _FORMAT, "drafter": spec, "predicted": asdict(choice)}
    content |= {"costs": asdict(costs), **facts}
    writer.replace_json(path, content, indent=1)


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: it is something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"tuned={path}: no such file; make it with experiments.tune")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content["format"] == _FORMAT and isinstance(content["drafter"], dict)
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ConfigError(f"tuned={path}: not a file that experiments.tune wrote")
    return content
