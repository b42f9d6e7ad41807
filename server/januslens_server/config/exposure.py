"""Whom the settings let in: nobody by accident."""

from __future__ import annotations

import ipaddress

import click

from januslens_server.config.settings import Settings


def check_exposure(settings: Settings) -> None:
    """Refuse half a TLS configuration, and to be open to the network by accident."""
    if (settings.tls_certificate is None) != (settings.tls_key is None):
        raise click.UsageError("expected --tls-certificate and --tls-key together, got one of them")
    encrypted = settings.tls_certificate is not None
    if settings.tls_client_ca is not None and not encrypted:
        raise click.UsageError("expected --tls-certificate with --tls-client-ca, got none")
    known = settings.callers is not None or settings.tls_client_ca is not None
    if settings.insecure or (encrypted and known) or _is_loopback(settings.host):
        return
    missing = " and ".join(
        what
        for what, given in (
            ("--tls-certificate", encrypted),
            ("--callers or --tls-client-ca", known),
        )
        if not given
    )
    raise click.UsageError(
        f"expected {missing} to serve beyond loopback on {settings.host}; "
        "--insecure serves whoever reaches the port"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name, which may stand for any address
        return False
