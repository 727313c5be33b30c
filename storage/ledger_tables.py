"""The ledger's tables for statements that are built once.

A reservation is to take milliseconds. Building its statements anew from the mapped classes took half of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import BindParameter, bindparam

from storage import schema

UNITS, ROWS, TALLIES = (
    schema.Base.metadata.tables[name] for name in ("privacy_units", "privacy_rows", "privacy_tallies")
)
NAMED: BindParameter[Any] = bindparam("named", expanding=True)
"""Stands for the values of one of `chunks`, given as {"named": chunk}."""
_CHUNK = 500
_Item = TypeVar("_Item")


def chunks(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    """`items` in lists short enough for one statement: both databases bound a statement's parameters."""
    left = iter(items)
    while chunk := list(islice(left, _CHUNK)):
        yield chunk
