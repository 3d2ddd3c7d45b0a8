"""The version of this package, also where it is a folder that no installer knows."""

__version__ = "0.1.0"
