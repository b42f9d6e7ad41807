"""Where the server listens, and to whom."""

from __future__ import annotations

import click

from januslens_server.config.types import FILE, PORT, option

NETWORK: tuple[click.Parameter, ...] = (
    option("--host", default="127.0.0.1", help="Address to serve on."),
    option("--port", type=PORT, default=50051, help="gRPC port; 0 picks a free one."),
    option(
        "--tls-certificate",
        type=FILE,
        default=None,
        help="PEM file: the server's certificate and its chain. Read again on change.",
    ),
    option("--tls-key", type=FILE, default=None, help="PEM file: the certificate's private key."),
    option(
        "--tls-client-ca",
        type=FILE,
        default=None,
        help="PEM file: callers must show a certificate that one of these has signed.",
    ),
    option(
        "--health-port",
        type=PORT,
        default=None,
        help="Answer health alone, in plaintext, on this port too; 0 picks a free one.",
    ),
    option(
        "--callers",
        type=FILE,
        default=None,
        help="YAML file of callers, their tokens' hashes, scopes and quotas. Read again on change.",
    ),
    option(
        "--insecure",
        is_flag=True,
        default=False,
        help="Serve beyond loopback without TLS or without authentication.",
    ),
    option("--metrics-host", default="127.0.0.1", help="Address of the metrics page."),
    option("--metrics-port", type=PORT, default=9464, help="Prometheus port; 0: free one."),
)
