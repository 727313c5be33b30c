"""What a site decides for itself: its model, its data, its way to the trunk. Never the run's to choose.

In a deployment all of it comes from the SuperNode's node config, so that whoever starts a run cannot make a site read
another file. In a simulation there are no sites, and the run's own settings stand in.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from contract.config import ConfigValue, RunConfig
from contract.errors import ConfigError

_KEYS = ("model", "data", "name", "trunk-address", "wire-log")


@dataclass(frozen=True, slots=True)
class Site:
    """`model` is a checkpoint (whole, or the client part), `data` a file or `stdlib:NAME`; `wire_log` "" for none."""

    model: str
    data: str
    name: str
    trunk_address: str
    wire_log: str


def read_site(node_config: Mapping[str, ConfigValue], config: RunConfig, node_id: str, *, simulated: bool) -> Site:
    """The site's settings. Raises ConfigError naming the node-config key that is missing or not text."""
    for key in _KEYS:
        if key in node_config and not isinstance(node_config[key], str):
            raise ConfigError(f"node config {key} is {node_config[key]!r}; it must be text")
    told = {key: str(node_config[key]) for key in _KEYS if node_config.get(key)}
    if simulated:
        partition = str(node_config.get("partition-id", 0))
        told = {"model": config.model, "data": config.data.replace("{partition}", partition)} | told
    for key in ("model", "data"):
        if not told.get(key):
            where = "run config (this is a simulation)" if simulated else "node config of this SuperNode"
            raise ConfigError(f"{key} is not set; it must be in the {where}")
    return Site(
        model=told["model"],
        data=told["data"],
        name=told.get("name", node_id),
        trunk_address=told.get("trunk-address", config.trunk_address),
        wire_log=told.get("wire-log", ""),
    )


def in_simulation() -> bool:
    """Whether this process is one of Flower's simulation workers, which are Ray actors."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
