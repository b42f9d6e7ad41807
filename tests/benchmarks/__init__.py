"""Benchmarks of time and memory, relative to plain passes and products on the same machine."""

from januslens_server.tuning import limit_spinning

# As in the server, set this before torch is imported, so that threads wait alike in both.
limit_spinning()
