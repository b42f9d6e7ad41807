"""Januslens server: looks forward and backward through causal language models."""
