"""One recipe per RPC, which runs on the device's thread.

A pipeline is a generator of result records. It takes a resolved request and a `CancelCheck`, a
function that raises when the request should stop. Requests take turns at the yields of their
pipelines. So at a yield, no hook, gradient mode or other global state is active, and no shared
buffer is in use. Between two results that take long to compute, a pipeline yields None, which
allows another request to run.
"""
