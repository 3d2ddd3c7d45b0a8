"""specjax: quantized Llama models that decode speculatively, losslessly, in JAX."""

from specjax.conversion import Conversion, convert, convert_head
from specjax.errors import CapacityError, CheckpointError, ConfigError, SpecjaxError
from specjax.generate import GenerationResult, LanguageModel, Options, StreamEvent
from specjax.loading import load
from specjax.metrics import Metrics
from specjax.scoring import Perplexity, perplexity
from specjax.scoring import logits as score

__all__ = [
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "Conversion",
    "GenerationResult",
    "LanguageModel",
    "Metrics",
    "Options",
    "Perplexity",
    "SpecjaxError",
    "StreamEvent",
    "convert",
    "convert_head",
    "load",
    "perplexity",
    "score",
]
__version__ = "0.1.0"
