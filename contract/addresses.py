"""Where trunks listen, as settings name them: HOST:PORT, several of them parted by commas."""

from __future__ import annotations

import re

from contract.errors import ConfigError

_PORT = re.compile(r"[0-9]{1,5}")


def split_address(name: str, address: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT. Raises ConfigError, in which `name` says what the address is of."""
    host, _, port = address.rpartition(":")
    if not host or "," in host or not _PORT.fullmatch(port) or not 1 <= int(port) <= 65535:
        raise ConfigError(f"{name} is {address!r}; it must be HOST:PORT")
    return host.strip("[]"), int(port)


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
