"""Several processes that serve one port, each a whole server with a device's thread of its own.

The supervisor starts members, one after the other, and opens the port once all of them have loaded
their models. The kernel spreads connections over them (SO_REUSEPORT). The supervisor computes
nothing: it answers for all of them on the health and metrics ports, and replaces who ends.
"""
