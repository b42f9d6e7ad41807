"""TLS credentials from files that may change while the server runs."""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
from cryptography import x509

from januslens_server import telemetry

logger = logging.getLogger(__name__)

Stamp = Sequence[tuple[int, int, int]]

# Seconds before new files are used. gRPC frees the state of the old ones although a handshake that
# has already asked for the current files may still read it, which ends the process
# (https://github.com/grpc/grpc/issues/36693). Other handshakes wait meanwhile, so that those which
# have asked before can finish reading.
SETTLING_SECONDS = 0.1

# The label of the server's certificate and key in metrics.
_FILE = "certificate"


class CertificateFiles:
    """The server's certificate, its key and, for mutual TLS, the client authorities.

    New connections use the current files; open connections keep their certificate. While
    certificate and key do not match, for example between two writes, the last matching pair is
    used.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        """All paths are those of PEM files; without `client_ca`, callers need no certificate."""
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        self._lock = threading.Lock()
        self._seen: Stamp = ()

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials that follow the files. Raises `OSError` if the files are invalid."""
        self._seen = self._stamp()
        return grpc.dynamic_ssl_server_credentials(
            self._read(),
            self._changed,  # type: ignore[arg-type]  # None means "unchanged", which the stubs lack
            require_client_authentication=self._client_ca is not None,
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the configuration for a new connection; None if the files have not changed."""
        with self._lock:
            stamp: Stamp = ()  # differs from every file's, so that missing files are read again
            try:
                stamp = self._stamp()
                if stamp == self._seen:
                    return None
                fresh = self._read()
            except OSError as error:
                telemetry.RELOAD_FAILED.labels(_FILE).set(1)
                logger.warning("certificate not reloaded: %s", error)
                return None
            finally:
                self._seen = stamp
        time.sleep(SETTLING_SECONDS)
        logger.info("certificate reloaded from %s", self._certificate)
        return fresh

    def _stamp(self) -> Stamp:
        """Return times, sizes and inodes; a path may be a link that now points to another file."""
        found = [path.stat() for path in self._paths]
        return [(stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in found]

    @property
    def _paths(self) -> list[Path]:
        return [p for p in (self._certificate, self._key, self._client_ca) if p is not None]

    def _read(self) -> grpc.ServerCertificateConfiguration:
        """Read the files. Raises `OSError` if they are invalid."""
        self._check()
        roots = None if self._client_ca is None else self._client_ca.read_bytes()
        pair = (self._key.read_bytes(), self._certificate.read_bytes())
        self._show_expiry()
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=roots)

    def _show_expiry(self) -> None:
        """Report when the files expire, and that they were read."""
        for name, path in ((_FILE, self._certificate), ("client_ca", self._client_ca)):
            if path is None:
                continue
            try:
                found = x509.load_pem_x509_certificates(path.read_bytes())
            except ValueError as error:  # OpenSSL accepts more certificates than this parser
                logger.warning("expiry of %s is unknown: %s", path, error)
                continue
            expiry = min(certificate.not_valid_after_utc for certificate in found)
            telemetry.CERTIFICATE_EXPIRY.labels(name).set(expiry.timestamp())
        telemetry.RELOAD_FAILED.labels(_FILE).set(0)

    def _check(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # With an empty password, an encrypted key causes an error instead of a prompt on the
            # terminal.
            context.load_cert_chain(self._certificate, self._key, password="")
        except ssl.SSLError as error:
            raise OSError(f"{self._certificate} and {self._key}: {_reason(error)}") from error
        if self._client_ca is None:
            return
        try:
            context.load_verify_locations(self._client_ca)
        except ssl.SSLError as error:
            raise OSError(f"{self._client_ca}: {_reason(error)}") from error


def _reason(error: ssl.SSLError) -> str:
    words = error.reason or str(error)
    return words.replace("_", " ").lower()
