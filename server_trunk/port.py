"""The port that a trunk serves at: which addresses it may take, and what each connection may hold of the machine."""

from __future__ import annotations

import logging
import resource
import socket
from typing import Any

from contract.addresses import is_loopback, listen_address
from contract.errors import ConfigError, ListenError

logger = logging.getLogger("trunkline.server_trunk")

_OWN_FILES = 256  # descriptors that no connection may take
_MOST_CONNECTIONS = 1 << 14
_HANDSHAKE_S, _IDLE_CONNECTION_S = 10, 300


def check_listen(listen: str, insecure: bool, *, tls: bool = False, tickets: bool = False) -> tuple[str, int]:
    """(host, port) of HOST:PORT. Raises ConfigError when malformed, or not loopback without `tls` or `insecure`.

    Nor do `tickets` go without `tls` there: whoever reaches the port could commit rounds.
    """
    host, port = listen_address("listen", listen)
    loopback = is_loopback(host)
    if not loopback and not tls and tickets:
        raise ConfigError(
            f"ticket-signer is given, and listen is {listen!r}, which other machines can reach without TLS, and "
            "could commit rounds by: give --tls-certificate, --tls-key and --client-ca too"
        )
    if not loopback and not tls and not insecure:
        raise ConfigError(
            f"listen is {listen!r}, which other machines can reach, and there is no TLS: give --tls-certificate, "
            "--tls-key and --client-ca, listen on 127.0.0.1, or add --insecure-listen on a network that you trust"
        )
    return host, port


def require_free(host: str, port: int) -> None:
    """Raise ListenError with the system's reason; gRPC itself would tell it to the log only."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            raise ListenError(
                f"cannot listen on {host}:{port}: {error.strerror}; name another port, or 0 for a free one"
            ) from error


def transport_options(calls: int) -> list[tuple[str, Any]]:
    """For a server whose connections may each have so many calls."""
    return [
        ("grpc.so_reuseport", 0),  # two trunks on one port would each get some of the clients
        ("grpc.keepalive_time_ms", 30_000),  # a client whose machine died is noticed
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        # A message of 4 MiB could unfold to 4 GiB; tensors do not compress.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.max_metadata_size", 8 << 10),
        ("grpc.absolute_max_metadata_size", 16 << 10),
        ("grpc.max_concurrent_streams", calls),
        ("grpc.server_handshake_timeout_ms", 1000 * _HANDSHAKE_S),
        ("grpc.max_connection_idle_ms", 1000 * _IDLE_CONNECTION_S),
        ("grpc.max_allowed_incoming_connections", _connections()),
    ]


def _connections() -> int:
    """How many connections there may be, so that adapters and requests still find descriptors for their files.

    As many descriptors are asked for as this process may have.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    wanted = _MOST_CONNECTIONS + _OWN_FILES
    files = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if files > soft:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
            soft = files
        except (ValueError, OSError) as error:  # a system may forbid what it says is allowed
            logger.warning("this process keeps its limit of %d open files: %s", soft, error)
    return min(_MOST_CONNECTIONS, max(_OWN_FILES, soft - _OWN_FILES))
