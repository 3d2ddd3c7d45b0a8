"""Errors that users meet: each names the field or tensor, the value found, and what to do.

They derive from ValueError, so that code which does not know this package can still catch them; a runner that is closed
is no bad input and derives from RuntimeError.
"""


class SpecjaxError(ValueError):
    """Base of all errors raised for bad input to this package."""


class ConfigError(SpecjaxError):
    """A configuration field has a value that is not supported."""


class CheckpointError(SpecjaxError):
    """A checkpoint file is missing, truncated, malformed, or does not match its configuration."""


class RunnerClosedError(RuntimeError):
    """The runner takes no requests any more: it drains, is closed or has failed."""


class CapacityError(SpecjaxError):
    """A request does not fit the cache, the model's positions, or a drafter's limits."""
