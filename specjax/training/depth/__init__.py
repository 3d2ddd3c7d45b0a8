"""Training routers and predictors of token-adaptive depth."""
