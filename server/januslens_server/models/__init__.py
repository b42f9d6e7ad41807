"""Resident models: loading, what their parts are called, and running them with capture."""
