"""The Januslens server: projects forward and backward passes of language models."""
