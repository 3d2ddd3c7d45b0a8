"""specjax: quantized Llama models that decode speculatively, losslessly, in JAX."""

from specjax.errors import CapacityError, CheckpointError, ConfigError, SpecjaxError
from specjax.generate import GenerationResult, LanguageModel, Options, StreamEvent
from specjax.loading import load
from specjax.metrics import Metrics

__all__ = [
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "GenerationResult",
    "LanguageModel",
    "Metrics",
    "Options",
    "SpecjaxError",
    "StreamEvent",
    "load",
]
__version__ = "0.1.0"
