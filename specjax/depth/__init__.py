"""Token-adaptive depth (D-LLM, SpaDec): which layers a token runs through."""
