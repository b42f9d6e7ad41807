"""The server of the live page: HTTP for the browser, gRPC to the Januslens server."""
