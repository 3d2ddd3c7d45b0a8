"""Drafters: who proposes the trees that the target verifies."""
