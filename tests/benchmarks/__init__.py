"""The goals in time and memory, measured against plain passes and products on this machine."""

from januslens_server.tuning import limit_spinning

# As the server does, before torch is imported: floors and ours wait alike.
limit_spinning()
