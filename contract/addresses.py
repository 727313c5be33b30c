"""Where something listens, or is to listen, as settings name it: HOST:PORT; of trunks several, parted by commas."""

from __future__ import annotations

import ipaddress
import re

from contract.errors import ConfigError

_PORT = re.compile(r"[0-9]{1,5}")


def split_address(name: str, address: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT. Raises ConfigError, in which `name` says what the address is of."""
    host, _, port = address.rpartition(":")
    if not host or "," in host or not _PORT.fullmatch(port) or not 1 <= int(port) <= 65535:
        raise ConfigError(f"{name} is {address!r}; it must be HOST:PORT")
    return host.strip("[]"), int(port)


def listen_address(name: str, value: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT to listen at, port 0 for any. Raises ConfigError, naming `name`, when malformed."""
    host, _, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not _PORT.fullmatch(port) or int(port) > 65535:
        raise ConfigError(f"{name} is {value!r}; it must be HOST:PORT, with port 0 for any free one")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; a name other than localhost counts as one that others reach."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def trunk_addresses(value: str, name: str = "trunk-address") -> tuple[str, ...]:
    """The addresses in `value`, in its order. Raises ConfigError for one that is no HOST:PORT or is there twice."""
    addresses = tuple(part.strip() for part in value.split(","))
    for address in addresses:
        if len(addresses) == 1:
            split_address(name, value)
        else:
            split_address(f"{name} is {value!r}, and one of its addresses", address)
        if addresses.count(address) > 1:
            raise ConfigError(f"{name} is {value!r}; it names {address} more than once")
    return addresses
