"""Rotary embeddings: the kinds of transformers 5, read from either spelling.

transformers 4 wrote `rope_theta` and `rope_scaling`, transformers 5 writes `rope_parameters`. Where both are present,
`rope_scaling` wins, as in transformers 5 (`rope_scaling or rope_parameters`).
"""

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from specjax.config import fields as read
from specjax.errors import ConfigError

_log = logging.getLogger(__name__)

Kind = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]
KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_OLD_NAMES = {"su": "longrope"}
# Kinds that know how long the text was that the model was first trained on.
_ORIGINAL = ("yarn", "llama3", "longrope")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: base, frequency scaling, and which channels turn.

    The angles of "dynamic" and "longrope" depend on the length of the text. A key is rotated for the length that is
    known when it is computed: that of the prompt, later its own position + 1. This is what transformers computes with
    a cache; its pass without one rotates all keys anew at each length.

    Attributes:
        theta: base of the geometric series of wavelengths.
        kind: how it is stretched; "default" is not at all.
        factor: how many times longer texts may be (linear, dynamic, yarn, llama3).
        low_freq_factor: llama3: wavelengths above original / low_freq_factor are scaled fully.
        high_freq_factor: llama3: wavelengths below original / high_freq_factor are left alone.
        original_max_position_embeddings: length before scaling, in tokens (dynamic, yarn, llama3, longrope).
        beta_fast: yarn: frequencies that turn more often than this over the original length are left alone.
        beta_slow: yarn: those that turn less often than this are scaled fully.
        truncate: yarn: whether the channels between which it interpolates are whole numbers.
        attention_factor: yarn and longrope: cosines and sines are multiplied by it.
        short_factor: longrope: divisor of each frequency up to the original length.
        long_factor: longrope: the same beyond it.
        rotary_fraction: share of a head's channels that turn, from the first on.
        interleaved: the pairs are channels (2i, 2i + 1), not (i, i + half).
    """

    theta: float = 10000.0
    kind: Kind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    rotary_fraction: float = 1.0
    interleaved: bool = False

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's angles depend on the length of the text, too."""
        return self.kind in ("dynamic", "longrope")

    @property
    def extension(self) -> float:
        """How many times more positions than `max_position_embeddings` says the scaling is for."""
        return self.factor if self.kind in ("linear", "dynamic") else 1.0

    def rotary_dim(self, head_dim: int) -> int:
        """Channels that turn; even."""
        return 2 * len(self._exponents(head_dim))

    def _exponents(self, head_dim: int) -> np.ndarray:
        dim = int(head_dim * self.rotary_fraction)
        return np.arange(0, dim, 2, dtype=np.float64) / dim

    def to_hf(self) -> dict[str, Any]:
        """The object `rope_parameters` of a config.json."""
        names: tuple[str, ...] = ()
        match self.kind:
            case "linear" | "dynamic":
                names = ("factor",)
            case "llama3":
                names = ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL_FIELD)
            case "yarn":
                names = ("factor", _ORIGINAL_FIELD, "beta_fast", "beta_slow", "truncate")
                names += ("attention_factor",)
            case "longrope":
                names = (_ORIGINAL_FIELD, "attention_factor", "short_factor", "long_factor")
        stated: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.theta}
        for name in names:
            value = getattr(self, name)
            stated[name] = list(value) if isinstance(value, tuple) else value
        if self.rotary_fraction != 1:
            stated["partial_rotary_factor"] = self.rotary_fraction
        return stated

    def inv_freq(self, head_dim: int, long: bool = False) -> Float32[np.ndarray, "F"]:
        """Angle per position of each rotated pair, in radians, where it does not depend on the length of the text.

        Args:
            long: longrope: beyond the original length.
        """
        exponents = self._exponents(head_dim)
        frequencies = self.theta**-exponents
        match self.kind:
            case "linear":
                frequencies = frequencies / self.factor
            case "llama3":
                turns = frequencies * self.original_max_position_embeddings / (2 * math.pi)
                span = self.high_freq_factor - self.low_freq_factor
                keep = np.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
                frequencies = frequencies * (keep + (1.0 - keep) / self.factor)
            case "yarn":
                keep = 1 - self._yarn_ramp(head_dim, len(frequencies))
                frequencies = frequencies * (keep + (1.0 - keep) / self.factor)
            case "longrope":
                frequencies = frequencies / np.asarray(
                    self.long_factor if long else self.short_factor
                )
        return frequencies.astype(np.float32)

    def _yarn_ramp(self, head_dim: int, count: int) -> np.ndarray:
        """Share of the scaled frequency in each pair (arXiv 2309.00071, section 3.2)."""
        dim, length = int(head_dim * self.rotary_fraction), self.original_max_position_embeddings

        def channel(turns: float) -> float:
            return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        return np.clip((np.arange(count) - low) / ((high - low) or 0.001), 0.0, 1.0)

    @classmethod
    def from_hf(cls, config: dict[str, Any], **defaults: Any) -> "RopeConfig":
        """Reads `rope_scaling` or `rope_parameters`, with what stands beside them in the configuration.

        Args:
            defaults: what the architecture's layers do: `theta` and `rotary_fraction` where nothing is stated, whether
                they can turn a part of the channels (`partial`), `interleaved` pairs, kinds that they have `renamed`.

        Raises:
            ConfigError: the type is unknown, or a field of it is missing or out of range.
        """
        name, stated = rope_object(config)
        return read_rope(name, stated, config, **defaults)


_ORIGINAL_FIELD = "original_max_position_embeddings"


def rope_object(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The object that states the rotary embedding, and its name: `rope_scaling` where it says anything."""
    scaling = read.mapping("rope_scaling", config.get("rope_scaling"))
    parameters = read.mapping("rope_parameters", config.get("rope_parameters"))
    name = "rope_scaling" if scaling or not parameters else "rope_parameters"
    if scaling and parameters:
        theta = {"rope_theta": config.get("rope_theta")} if "rope_theta" in config else {}
        plain = _plain(parameters)
        read.settle({"rope_scaling": _plain({**theta, **scaling}, plain), "rope_parameters": plain})
    return name, scaling or parameters


def _plain(stated: dict[str, Any], other: dict[str, Any] | None = None) -> dict[str, Any]:
    """Without the spelling of the type and null, for comparison; what `other` alone says does not count."""
    kind = stated.get("rope_type", stated.get("type", "default"))
    kept = {k: v for k, v in stated.items() if v is not None and k not in ("type", "rope_type")}
    kept["rope_type"] = kind
    for key in ("rope_theta", "partial_rotary_factor", _ORIGINAL_FIELD):
        if other is not None and key in other:
            kept.setdefault(key, other[key])
    return kept


def read_rope(
    name: str,
    stated: dict[str, Any],
    config: dict[str, Any],
    *,
    theta: float = 10000.0,
    theta_field: str = "rope_theta",
    rotary_fraction: float = 1.0,
    partial: bool = False,
    interleaved: bool = False,
    renamed: dict[str, str] | None = None,
) -> RopeConfig:
    """One rotary embedding from the object `stated`, called `name`; see `RopeConfig.from_hf`."""
    base = read.settle(
        {f"{name}.rope_theta": stated.get("rope_theta"), theta_field: config.get(theta_field)}
    )
    theta = theta if base is None else read.positive("rope_theta", base)
    if theta <= 1:
        raise ConfigError(f"rope_theta = {theta}: expected a number above 1")
    kind = read.settle(
        {f"{name}.rope_type": stated.get("rope_type"), f"{name}.type": stated.get("type")}
    )
    kind = "default" if kind is None else kind
    if isinstance(kind, str):
        kind = {**_OLD_NAMES, **(renamed or {})}.get(kind, kind)
    if kind not in KINDS:
        raise ConfigError(
            f"{name}.rope_type = {kind!r} is not supported (supported: {', '.join(KINDS)})"
        )
    share = read.settle(
        {
            f"{name}.partial_rotary_factor": stated.get("partial_rotary_factor"),
            "partial_rotary_factor": config.get("partial_rotary_factor"),
        }
    )
    share = rotary_fraction if share is None else read.positive("partial_rotary_factor", share)
    if share > 1 or (share != 1 and not partial):
        raise ConfigError(f"partial_rotary_factor = {share!r} is not supported (only 1)")
    shape = dict(theta=theta, kind=kind, rotary_fraction=share, interleaved=interleaved)
    _check_keys(name, stated, kind)
    if kind == "default":
        return RopeConfig(**shape)
    return RopeConfig(**shape, **_SCALINGS[kind](name, stated, config))


def _check_keys(name: str, stated: dict[str, Any], kind: str) -> None:
    """Refuses what other libraries compute from the object and transformers does not; warns of what is not read."""
    typed = "rope_type" in stated or "type" in stated
    if not typed and stated.get("factor") not in (None, 1):
        raise ConfigError(
            f"{name} has factor = {stated['factor']!r} and no rope_type: state one of {', '.join(KINDS)}"
        )
    for key, nothing in _OF_OTHERS.items():
        if stated.get(key) not in (None, nothing):
            raise ConfigError(
                f"{name}.{key} = {stated[key]!r} is not supported for rope_type = {kind!r}: remove it if the model was "
                "trained without it"
            )
    known = {*_COMMON_KEYS, *_KEYS[kind], *_OF_OTHERS}
    unread = sorted(key for key in stated if key not in known and stated[key] is not None)
    if unread:
        _log.warning("%s has %s, which rope_type = %r does not read", name, ", ".join(unread), kind)


def _factor(name, stated, config) -> dict[str, Any]:
    return {"factor": read.positive(f"{name}.factor", stated.get("factor"))}


def _dynamic(name, stated, config) -> dict[str, Any]:
    # The original length is the model's own: what the field of that name says is not read by transformers.
    length = read.size(config, "max_position_embeddings")
    return _factor(name, stated, config) | {_ORIGINAL_FIELD: length}


def _original(name, stated, config) -> int:
    """The field beside the object wins over the one in it, as in transformers 5."""
    value = read.settle(
        {
            _ORIGINAL_FIELD: config.get(_ORIGINAL_FIELD),
            f"{name}.{_ORIGINAL_FIELD}": stated.get(_ORIGINAL_FIELD),
        }
    )
    if value is None:
        value = config.get("max_position_embeddings")
    value = int(read.positive(f"{name}.{_ORIGINAL_FIELD}", value))
    if value < 2:
        raise ConfigError(f"{name}.{_ORIGINAL_FIELD} = {value}: expected at least 2")
    return value


def _llama3(name, stated, config) -> dict[str, Any]:
    required = ("factor", "low_freq_factor", "high_freq_factor")
    values = {key: read.positive(f"{name}.{key}", stated.get(key)) for key in required}
    if values["high_freq_factor"] <= values["low_freq_factor"]:
        raise ConfigError(
            f"{name}.high_freq_factor = {values['high_freq_factor']} must exceed "
            f"low_freq_factor = {values['low_freq_factor']}"
        )
    return values | {_ORIGINAL_FIELD: _original(name, stated, config)}


def _stretch(name, stated, config, original: int) -> float:
    """The factor; where none is stated, the ratio of the two lengths."""
    value = stated.get("factor")
    if value is None:
        value = read.size(config, "max_position_embeddings") / original
    return read.positive(f"{name}.factor", value)


def _yarn(name, stated, config) -> dict[str, Any]:
    original = _original(name, stated, config)
    factor = _stretch(name, stated, config, original)

    def scale(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    # Zero says nothing, as in transformers; DeepSeek's files have it.
    scales = [read.number(stated, key) if stated.get(key) else None for key in _MSCALES]
    attention = scale(scales[0]) / scale(scales[1]) if all(scales) else scale(1.0)
    return {
        "factor": factor,
        _ORIGINAL_FIELD: original,
        "attention_factor": read.number(stated, "attention_factor", attention),
        "beta_fast": read.number(stated, "beta_fast", 32.0),
        "beta_slow": read.number(stated, "beta_slow", 1.0),
        "truncate": read.flag(stated, "truncate", True),
    }


_MSCALES = ("mscale", "mscale_all_dim")


def _longrope(name, stated, config) -> dict[str, Any]:
    original = _original(name, stated, config)
    factor = _stretch(name, stated, config, original)
    attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    factors = {}
    for key in ("short_factor", "long_factor"):
        values = stated.get(key)
        if not isinstance(values, list | tuple) or not values:
            raise ConfigError(f"{name}.{key} = {values!r}: expected a list of positive numbers")
        factors[key] = tuple(read.positive(f"{name}.{key}", value) for value in values)
    return {
        _ORIGINAL_FIELD: original,
        "attention_factor": read.number(stated, "attention_factor", attention),
        **factors,
    }


_OF_OTHERS = {"alpha": None, "extrapolation_factor": 1, "attn_factor": 1}
_COMMON_KEYS = (
    *("type", "rope_type", "rope_theta", "partial_rotary_factor", _ORIGINAL_FIELD),
    *("finetuned", "mrope_section"),  # of all tokens of a text the three positions are the same
)
_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor", *_MSCALES),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
}
_SCALINGS = {
    "linear": _factor,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}


def check_rope(rope: RopeConfig, head_dim: int) -> None:
    """Refuses a rotary embedding that does not fit the heads.

    Raises:
        ConfigError: the field, with both sizes.
    """
    pairs = rope.rotary_dim(head_dim) // 2
    if pairs < 1 or 2 * pairs > head_dim:
        raise ConfigError(
            f"head_dim = {head_dim} with partial_rotary_factor = {rope.rotary_fraction}: the rotary embedding "
            "needs an even number of channels"
        )
    for name in ("short_factor", "long_factor"):
        found = len(getattr(rope, name))
        if rope.kind == "longrope" and found != pairs:
            raise ConfigError(f"{name} has {found} entries, the rotary embedding {pairs} pairs")
