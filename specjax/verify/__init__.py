"""Acceptance rules: `Greedy` and `Rejection` keep the target's output."""

from specjax.errors import ConfigError
from specjax.verify.base import Acceptor, Verified
from specjax.verify.greedy import Greedy
from specjax.verify.rejection import Rejection

__all__ = ["ACCEPTORS", "Acceptor", "Greedy", "Rejection", "Verified", "acceptor"]

ACCEPTORS = {"greedy": Greedy, "rejection": Rejection}


def acceptor(name: str, greedy: bool) -> Acceptor:
    """The rule by name; "auto" is `Greedy` for greedy decoding and `Rejection` for sampling.

    Raises:
        ConfigError: the name is unknown, or the greedy rule is asked for at temperature > 0.
    """
    if name == "auto":
        name = "greedy" if greedy else "rejection"
    if name not in ACCEPTORS:
        raise ConfigError(f"acceptance={name!r}: supported are auto, {', '.join(ACCEPTORS)}")
    if name == "greedy" and not greedy:
        raise ConfigError("acceptance='greedy' needs temperature=0; use 'rejection' or 'auto'")
    if name == "rejection" and greedy:
        raise ConfigError("acceptance='rejection' needs temperature > 0; use 'greedy' or 'auto'")
    return ACCEPTORS[name]()
