"""The gRPC service: decode a request, run its pipeline, encode the results, map errors to statuses.

A request passes `authentication`, `wire` and `service`, which calls `decode`, `admission`,
`streaming` and `encode`; `call` accompanies it from its first byte to its status.
"""
