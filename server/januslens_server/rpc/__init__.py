"""The gRPC service: decode requests, run pipelines, encode results, map errors to statuses.

A request passes through `authentication`, `wire` and `service`, which uses `decode`, `admission`,
`streaming` and `encode`. `call` has the request's id, log line, metrics and status.
"""
