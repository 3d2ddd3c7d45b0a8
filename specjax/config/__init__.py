"""What a model states about itself, read from its files: the ground that every room stands on."""

from specjax.config.architectures import ARCHITECTURES
from specjax.config.depth import DepthConfig
from specjax.config.model import DTYPES, LayerKind, ModelConfig
from specjax.config.rope import RopeConfig

__all__ = ["ARCHITECTURES", "DTYPES", "DepthConfig", "LayerKind", "ModelConfig", "RopeConfig"]
