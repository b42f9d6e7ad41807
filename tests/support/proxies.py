"""Real proxies in front of several servers: Debian's nginx and haproxy, run by a test."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.tethered import tethered

NGINX = """
daemon off;
error_log stderr warn;
pid {folder}/nginx.pid;
worker_processes 1;
events {{ worker_connections 512; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  upstream januslens {{
    {servers}
  }}
  server {{
    listen 127.0.0.1:{port} http2;
    location / {{
      grpc_pass grpc://januslens;
      grpc_read_timeout 120s;
      # A call that a server may have begun is never sent to another.
      grpc_next_upstream error;
      grpc_connect_timeout 1s;
    }}
  }}
}}
"""

HAPROXY = """
defaults
  mode http
  timeout connect 1s
  timeout client 120s
  timeout server 120s
frontend grpc
  bind 127.0.0.1:{port} proto h2
  default_backend januslens
backend januslens
  balance roundrobin
  # A call is sent to another server only where none was reached.
  retry-on conn-failure
  option redispatch
  retries 3
{servers}
"""


def nginx(ports: Sequence[int], port: int, folder: Path) -> list[str]:
    """The command that runs nginx on `port` in front of `ports`."""
    servers = "\n    ".join(f"server 127.0.0.1:{p} max_fails=1 fail_timeout=1s;" for p in ports)
    path = folder / "nginx.conf"
    path.write_text(NGINX.format(folder=folder, servers=servers, port=port))
    return [needed("nginx"), "-p", str(folder), "-c", str(path), "-e", "stderr"]


def haproxy(ports: Sequence[int], port: int, folder: Path) -> list[str]:
    """The command that runs haproxy on `port` in front of `ports`."""
    lines = (f"  server s{p} 127.0.0.1:{p} proto h2 check inter 500ms" for p in ports)
    path = folder / "haproxy.cfg"
    path.write_text(HAPROXY.format(servers="\n".join(lines), port=port))
    return [needed("haproxy"), "-f", str(path), "-db"]


def needed(program: str) -> str:
    """Return the program's path, or fail with what to install."""
    found = shutil.which(program) or shutil.which(program, path="/usr/sbin")
    if found is None:
        raise LookupError(f"expected {program}: apt-get install nginx-light haproxy")
    return found


@contextmanager
def running_proxy(command: Sequence[str], port: int) -> Iterator[None]:
    """Run a proxy until the block is left."""
    process = subprocess.Popen(tethered(command), stdin=subprocess.DEVNULL)
    try:
        _wait_until_listening(process, port)
        yield
    finally:
        process.terminate()
        process.wait(timeout=10)


def _wait_until_listening(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return
