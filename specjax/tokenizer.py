"""Tokenizers: the public name of `specjax.text.tokenizer`."""

from specjax.text.tokenizer import Tokenizer, load

__all__ = ["Tokenizer", "load"]
