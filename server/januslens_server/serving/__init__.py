"""Settings to a running server, and signals to a drained one."""
