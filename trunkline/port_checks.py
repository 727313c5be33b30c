"""Whether a deployment's ports are free, or who listens on them."""

from __future__ import annotations

import ipaddress
import socket

import psutil

from trunkline.finding import DoubtfulError

SUPERLINK_PORT, TRUNK_PORT, SUPERNODE_PORT = 8000, 50051, 9094
_OURS = ("trunkline", "flower-superlink", "flower-supernode", "flwr")
_LOOK_ARGUMENTS = 8
"""How many of a process's arguments may name its program: `python -m trunkline`, `torchrun ... -m trunkline`."""


def check_port(port: int, *, loopback_only: bool = False) -> str:
    """Who listens on a port, if anybody does. Warns of a stranger, and where others reach what is for this machine."""
    listeners = _listeners(port)
    if listeners is None:
        return "in use, and this system does not tell by whom" if _taken(port) else "free"
    if not listeners:
        return "free"
    told = ", ".join(sorted(f"{name} at {address}" for address, _, name in listeners))
    strangers = [name for _, known, name in listeners if not known]
    if strangers:
        raise DoubtfulError(told, f"end {strangers[0]}, or give the trunk or Flower's program another port")
    if loopback_only and any(not ipaddress.ip_address(address).is_loopback for address, _, _ in listeners):
        raise DoubtfulError(told, "leave it on 127.0.0.1: only the SuperNode's own client processes use it")
    return told


def _listeners(port: int) -> set[tuple[str, bool, str]] | None:
    """Address, whether it may be one of ours, and name of each that listens; None where the system does not say."""
    try:
        found = psutil.net_connections(kind="tcp")
    except (psutil.AccessDenied, OSError):
        return None
    return {
        (str(one.laddr.ip), *_named(one.pid))
        for one in found
        if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port
    }


def _named(pid: int | None) -> tuple[bool, str]:
    if pid is None:
        return True, "another user's process"
    try:
        process = psutil.Process(pid)
        program, arguments = process.name(), process.cmdline()
    except psutil.Error:
        return True, f"process {pid}"
    ours = any(word in argument for argument in arguments[:_LOOK_ARGUMENTS] for word in _OURS)
    return ours, f"{program} (process {pid})"


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
        return False
