"""Acceptance rules: `Greedy` and `Rejection` keep the target's output, `Typical` and `Relaxed` do not."""

from specjax.errors import ConfigError
from specjax.verify.base import Acceptor, Verified
from specjax.verify.greedy import Greedy
from specjax.verify.rejection import Rejection
from specjax.verify.relaxed import Relaxed
from specjax.verify.typical import Typical

__all__ = [
    "ACCEPTANCES",
    "Acceptor",
    "Greedy",
    "Rejection",
    "Relaxed",
    "Typical",
    "Verified",
    "acceptor",
]

ACCEPTANCES = ("lossless", "typical", "relaxed", "greedy", "rejection")


def acceptor(rule: str | Acceptor, greedy: bool) -> Acceptor:
    """The rule by name, or the given one (`Typical(epsilon=0.2)`), checked against the temperature.

    "lossless" is `Greedy` for greedy decoding and `Rejection` for sampling.

    Raises:
        ConfigError: it is no rule, the name is unknown, or the rule has no meaning at this temperature.
    """
    if isinstance(rule, str):
        rule = _named(rule, greedy)
    if not isinstance(rule, Acceptor):
        raise ConfigError(
            f"acceptance={rule!r}: supported are {', '.join(ACCEPTANCES)}, or a rule itself"
        )
    if isinstance(rule, Greedy) and not greedy:
        raise ConfigError("acceptance='greedy' needs temperature=0; use 'lossless'")
    if isinstance(rule, Rejection) and greedy:
        raise ConfigError("acceptance='rejection' needs temperature > 0; use 'lossless'")
    if isinstance(rule, Typical) and greedy:
        raise ConfigError(
            "acceptance='typical' needs temperature > 0 (at 0 Medusa too matches greedily); "
            "use 'lossless' or set a temperature"
        )
    if isinstance(rule, Relaxed) and not greedy:
        raise ConfigError(
            "acceptance='relaxed' differs from 'lossless' at temperature 0 only; use 'lossless'"
        )
    return rule


def _named(name: str, greedy: bool) -> Acceptor:
    rules = {"typical": Typical, "relaxed": Relaxed, "greedy": Greedy, "rejection": Rejection}
    rules["lossless"] = Greedy if greedy else Rejection
    if name not in rules:
        raise ConfigError(f"acceptance={name!r}: supported are {', '.join(ACCEPTANCES)}")
    return rules[name]()
