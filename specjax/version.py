"""The version of this package: known without an installer, where a copy of the folder runs."""

__version__ = "0.1.0"
