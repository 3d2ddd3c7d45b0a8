"""Kinds of draft heads; `specjax.drafters.head` lists them."""
