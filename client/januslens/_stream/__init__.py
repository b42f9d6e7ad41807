"""Putting streams together, without any input or output of their own."""
