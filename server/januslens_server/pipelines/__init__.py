"""One readable recipe per RPC, run on the device's thread.

A pipeline is a generator of result records. It takes a resident model, a spec and a `CancelCheck`:
a callable that raises when the request should stop. Between two yields no hook, gradient mode,
buffer that requests share or other global state is in use, so that requests may take turns. Where
one works for long between two results it yields None: there, too, it may be set aside or stopped.
"""
