"""OpenAI's HTTP API over a runner (`specjax.serving.types.Runner`); needs the extra `serve`."""
