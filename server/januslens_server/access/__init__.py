"""Callers of the server: their tokens, scopes and quotas."""
