"""Benchmarks of time and memory, relative to plain passes and products on the same machine."""

from januslens_server.tuning import limit_spinning

# As the server does, before torch is imported: floors and ours wait alike.
limit_spinning()
