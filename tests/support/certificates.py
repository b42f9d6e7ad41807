"""Certificates of an authority that exists for one test."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import grpc
import trustme


@dataclass(frozen=True)
class ServerFiles:
    """The three files that a server with mutual TLS reads."""

    certificate: Path
    key: Path
    client_ca: Path

    @property
    def flags(self) -> list[str]:
        """The flags for TLS."""
        return ["--tls-certificate", str(self.certificate), "--tls-key", str(self.key)]

    @property
    def mutual_flags(self) -> list[str]:
        """The flags for mutual TLS."""
        return [*self.flags, "--tls-client-ca", str(self.client_ca)]


def server_files(authority: trustme.CA, folder: Path) -> ServerFiles:
    """Write a certificate for loopback into `folder`."""
    files = ServerFiles(folder / "tls.crt", folder / "tls.key", folder / "ca.crt")
    authority.cert_pem.write_to_path(str(files.client_ca))
    replace_certificate(files, authority)
    return files


def replace_certificate(files: ServerFiles, authority: trustme.CA) -> None:
    """Replace certificate and key in the same files, one after the other, each atomically."""
    issued = authority.issue_cert("127.0.0.1", "localhost")
    replace(files.key, issued.private_key_pem.bytes())
    replace(files.certificate, b"".join(pem.bytes() for pem in issued.cert_chain_pems))


def replace(path: Path, content: bytes) -> None:
    """Replace a file atomically: readers see the old content or the new one."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    os.replace(fresh, path)  # noqa: PTH105 - Path.replace reads as if the text were replaced


def trusting(*authorities: trustme.CA) -> grpc.ChannelCredentials:
    """Return credentials of a client that trusts these authorities."""
    return grpc.ssl_channel_credentials(roots(*authorities))


def showing(authority: trustme.CA, name: str, issuer: trustme.CA) -> grpc.ChannelCredentials:
    """Return credentials of a client with its own certificate from `issuer`."""
    own = issuer.issue_cert(name, common_name=name)
    chain = b"".join(pem.bytes() for pem in own.cert_chain_pems)
    return grpc.ssl_channel_credentials(roots(authority), own.private_key_pem.bytes(), chain)


def roots(*authorities: trustme.CA) -> bytes:
    """Return these certificates in one file's format."""
    return b"".join(authority.cert_pem.bytes() for authority in authorities)
