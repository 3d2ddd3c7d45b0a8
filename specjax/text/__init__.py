"""Text and token ids: tokenizers, chat templates, stop strings."""
