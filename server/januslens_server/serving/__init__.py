"""Run a server: build it from its settings, open its ports, drain it on a signal."""
