"""The gRPC surface: decode a message, run a pipeline, encode its records, map its errors."""
