"""What users ask of a draft head, and the drafters that networks of the two families become."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from specjax.decoding import sampling as sample
from specjax.drafters import arrangements, eagle
from specjax.drafters.base import Drafter
from specjax.drafters.feature_chain import FeatureChain
from specjax.drafters.one_pass import OnePass
from specjax.errors import ConfigError
from specjax.models.one_pass import OnePassHead

Shape = Literal["chain", "best-first", "topk"]


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Options of the drafter `head`; None is the kind's own choice.

    Attributes:
        tree: shape of the draft.
        num_nodes: nodes of a tree, the root included; of a chain it follows from its length.
        draft_depth: levels of the tree, length of the chain.
        topk: children per node of a `topk` tree.
        confidence: least probability of being kept that a draft of a chain may have.
    """

    tree: Shape | None = None
    num_nodes: int | None = None
    draft_depth: int | None = None
    topk: int | None = None
    confidence: float | None = None

    def shape(self, *supported: Shape) -> Shape:
        """The tree asked for, by default the first that the kind supports.

        Raises:
            ConfigError: the kind does not support it.
        """
        if self.tree is None:
            return supported[0]
        if self.tree not in supported:
            known = ", ".join(repr(s) for s in supported)
            raise ConfigError(f"tree={self.tree!r}: heads of this kind draft {known}")
        return self.tree

    def chain_depth(self, own: int) -> int:
        """Length of a chain: what was asked for, else the head's own.

        Raises:
            ConfigError: num_nodes contradicts it.
        """
        depth = own if self.draft_depth is None else self.draft_depth
        if self.draft_depth is None and self.num_nodes is not None:
            depth = self.num_nodes - 1
        if depth < 1 or self.num_nodes not in (None, depth + 1):
            raise ConfigError(
                f"num_nodes={self.num_nodes} with tree='chain' and draft_depth={depth}: a chain has one node per draft "
                "and the root; leave num_nodes out"
            )
        return depth


def check(options: HeadOptions) -> None:
    """Checks values by themselves.

    Raises:
        ConfigError: an unknown tree, or no positive whole number; the option is named.
    """
    if options.tree is not None and options.tree not in get_args(Shape):
        raise ConfigError(
            f"tree={options.tree!r}: supported are {', '.join(map(repr, get_args(Shape)))}"
        )
    if options.confidence is not None:
        value = options.confidence
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(f"confidence={value!r}: must be a probability, from 0 to 1")
    asked = {"num_nodes": 2, "draft_depth": 1, "topk": 1}
    for name, least in asked.items():
        value = getattr(options, name)
        if value is not None and sample.whole(name, value) < least:
            raise ConfigError(f"{name}={value!r}: must be a whole number of at least {least}")


def one_feature(head, options: HeadOptions, own_depth: int) -> Drafter:
    """A drafter from a network that predicts one feature a pass (EAGLE-1/2/3, MTP); see `models.eagle.EagleHead`.

    Args:
        own_depth: chain that the head itself states.
    """
    if options.confidence is not None:
        raise ConfigError(f"confidence={options.confidence}: this head has no confidence head")
    if options.shape("topk", "chain") == "chain":
        if options.topk not in (None, 1):
            raise ConfigError(f"topk={options.topk} with tree='chain': leave it out")
        return FeatureChain(head=head, draft_depth=options.chain_depth(own_depth))
    chosen = {
        name: value
        for name in ("draft_depth", "topk", "num_nodes")
        if (value := getattr(options, name)) is not None
    }
    return eagle.eagle(head, **chosen)


def one_pass(make: Callable[[int], OnePassHead], options: HeadOptions, own_depth: int) -> Drafter:
    """A drafter from a network that drafts in one pass.

    Args:
        make: the network for so many drafts a pass.
        own_depth: drafts that the head itself states.
    """
    shape = options.shape(*arrangements.SHAPES)
    depth = options.chain_depth(own_depth) if shape == "chain" else options.draft_depth or own_depth
    head = make(depth)
    if depth > head.num_drafts:
        raise ConfigError(f"draft_depth={depth}: a pass of this head drafts {head.num_drafts}")
    if shape != "topk" and options.topk is not None:
        raise ConfigError(f"topk={options.topk} with tree={shape!r}: it is of tree='topk'")
    if options.confidence is not None and (shape != "chain" or not head.knows_confidence):
        raise ConfigError(
            f"confidence={options.confidence}: only chains (tree='chain') of heads with a confidence head end by it"
        )
    return OnePass(head=head, arrangement=arrangements.SHAPES[shape](options, depth))


def one_block(head: OnePassHead, options: HeadOptions, own_depth: int) -> Drafter:
    """As `one_pass`, of a network whose passes have one size; trees take fewer levels of it where that is asked for."""
    return one_pass(lambda depth: head, options, own_depth)
