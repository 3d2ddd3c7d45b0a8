"""specjax: quantized Llama models that decode speculatively, losslessly, in JAX."""

from specjax.conversion import Conversion, convert, convert_head
from specjax.engine.metrics import Metrics
from specjax.errors import CapacityError, CheckpointError, ConfigError, SpecjaxError
from specjax.language_model import GenerationResult, LanguageModel, Options, StreamEvent, load
from specjax.scoring import Perplexity, perplexity
from specjax.scoring import logits as score
from specjax.version import __version__ as __version__

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
