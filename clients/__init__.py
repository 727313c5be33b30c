"""A site's side of a split model. The names below are loaded when they are used, so that this import costs nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import contract as contract  # before torch and transformers, which it keeps from telling what nobody here could mend

if TYPE_CHECKING:
    from clients.pipeline import accumulate
    from clients.split_model import close, export_adapter, load_split_model, trunk_state

__all__ = ["accumulate", "close", "export_adapter", "load_split_model", "trunk_state"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "clients.pipeline" if name == "accumulate" else "clients.split_model"
    return getattr(importlib.import_module(module), name)
