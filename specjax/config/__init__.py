"""What a model states about itself, read from its files: the ground that every room stands on."""

from specjax.config.depth import DepthConfig
from specjax.config.model import DTYPES, ModelConfig, RopeConfig

__all__ = ["DTYPES", "DepthConfig", "ModelConfig", "RopeConfig"]
