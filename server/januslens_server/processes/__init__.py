"""Several server processes on one port, each with its own models and device thread.

The supervisor starts the processes one after another and lets them open the port when all have
loaded their models. The kernel distributes connections among them (SO_REUSEPORT). The supervisor
serves health and metrics for all of them and replaces processes that end.
"""
