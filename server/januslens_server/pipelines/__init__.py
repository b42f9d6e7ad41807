"""One readable recipe per RPC, run on the device's thread.

A pipeline is a generator of result records. It takes a resident model, a spec and a checkpoint:
a callable that raises when the request should stop. Between two yields no hook, gradient mode
or other global state is left on, so that requests may take turns.
"""
