"""Self-speculation (QSpec, arXiv 2410.11305): the target drafts for itself under a cheaper activation scheme.

The draft writes the target's own cache slots; verification overwrites every one of them with its own keys and values.
So there is no second cache, no second set of weights, and nothing to keep in step.
"""

from dataclasses import dataclass, field

import jax

from specjax.decoding import tree
from specjax.drafters import base, options
from specjax.drafters import chain as chains
from specjax.models import layers


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SelfDraft:
    """Drafts `draft_depth` tokens with the target under another activation scheme.

    Attributes:
        draft_depth: chain length, gamma in the paper.
        scheme: name of the scheme to draft under; None drafts with the target as it is (a perfect drafter).
    """

    draft_depth: int = field(default=3, metadata={"static": True})
    scheme: str | None = field(default=None, metadata={"static": True})

    needs = None

    @property
    def num_nodes(self) -> int:
        return self.draft_depth + 1

    @property
    def max_depth(self) -> int:
        return self.draft_depth

    @property
    def scratch(self) -> int:
        return self.num_nodes

    def following(self, depth: int) -> "SelfDraft":
        """The same where steps may commit `depth` drafts, its own or others'."""
        return self

    def init(self, target, batch, capacity):
        return ()

    def prefill(self, target, state, chunk):
        return state

    def propose(self, target, cache, state, root, lengths, keys, sampling) -> base.Proposal:
        model = target if self.scheme is None else target.with_scheme(self.scheme)
        block = layers.causal_block(root[:, None], lengths)
        drafts, q, cache = chains.draft_chain(model, cache, block, self.draft_depth, keys, sampling)
        return base.Proposal(
            tree=tree.chain(root, drafts), q=chains.with_root(q), cache=cache, state=state
        )

    def commit(self, target, state, lengths, verified):
        return state

    def rollback(self, state, lengths, root, features):
        return state


def build(target, scheme: str | None = None, draft_depth: int = 3) -> SelfDraft:
    """Refuses a `scheme` that the target has no codes for before anything is compiled."""
    options.lengths(target, draft_depth=draft_depth)
    if scheme is not None:
        target.module.with_scheme(scheme)
    return SelfDraft(draft_depth=draft_depth, scheme=scheme)


def reads_codes(spec) -> bool:
    """Whether the target must be loaded with its codes kept."""
    return spec.get("scheme") is not None
