"""Certificates of an authority that lives as long as a test."""

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
        """The settings for TLS."""
        return ["--tls-certificate", str(self.certificate), "--tls-key", str(self.key)]

    @property
    def mutual_flags(self) -> list[str]:
        """The settings for mutual TLS."""
        return [*self.flags, "--tls-client-ca", str(self.client_ca)]


def server_files(authority: trustme.CA, folder: Path) -> ServerFiles:
    """A certificate for loopback, written into `folder`."""
    files = ServerFiles(folder / "tls.crt", folder / "tls.key", folder / "ca.crt")
    authority.cert_pem.write_to_path(str(files.client_ca))
    replace_certificate(files, authority)
    return files


def replace_certificate(files: ServerFiles, authority: trustme.CA) -> None:
    """Another certificate in the same files, each replaced in one step, one after the other."""
    issued = authority.issue_cert("127.0.0.1", "localhost")
    replace(files.key, issued.private_key_pem.bytes())
    replace(files.certificate, b"".join(pem.bytes() for pem in issued.cert_chain_pems))


def replace(path: Path, content: bytes) -> None:
    """Put a new file in the place of an old one: who reads sees the one or the other."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    os.replace(fresh, path)  # noqa: PTH105 - Path.replace reads as if the text were replaced


def trusting(*authorities: trustme.CA) -> grpc.ChannelCredentials:
    """A client's, that knows the server by these."""
    return grpc.ssl_channel_credentials(roots(*authorities))


def showing(authority: trustme.CA, name: str, issuer: trustme.CA) -> grpc.ChannelCredentials:
    """A client's, that shows a certificate of its own from `issuer`."""
    own = issuer.issue_cert(name, common_name=name)
    chain = b"".join(pem.bytes() for pem in own.cert_chain_pems)
    return grpc.ssl_channel_credentials(roots(authority), own.private_key_pem.bytes(), chain)


def roots(*authorities: trustme.CA) -> bytes:
    """Their certificates, as one file holds them."""
    return b"".join(authority.cert_pem.bytes() for authority in authorities)
