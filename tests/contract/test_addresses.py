"""Addresses as settings write them."""

from __future__ import annotations

import pytest

from contract.addresses import split_address, trunk_addresses
from contract.config import RunConfig
from contract.errors import ConfigError


def test_one_address_and_several_are_read_in_their_order() -> None:
    assert trunk_addresses("127.0.0.1:50051") == ("127.0.0.1:50051",)
    assert trunk_addresses("b.example:2, a.example:1,[::1]:3") == ("b.example:2", "a.example:1", "[::1]:3")
    assert split_address("trunk", "[::1]:3") == ("::1", 3)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("a.example", "trunk-address is 'a.example'; it must be HOST:PORT"),
        ("a:1,", "trunk-address is 'a:1,', and one of its addresses is ''; it must be HOST:PORT"),
        ("a:1,b", "trunk-address is 'a:1,b', and one of its addresses is 'b'; it must be HOST:PORT"),
        ("a:1,b:70000", "one of its addresses is 'b:70000'; it must be HOST:PORT"),
        ("a:1,b:2, a:1", "trunk-address is 'a:1,b:2, a:1'; it names a:1 more than once"),
    ],
)
def test_what_is_no_address_or_is_there_twice_is_refused_by_the_settings(value: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_flower({"trunk-address": value})
    assert told in str(caught.value)


def test_an_address_alone_may_not_be_several() -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        split_address("trunk", "a:1,b:2")
