"""A scrape as Prometheus makes it: HTTP, its own parser, numbers by name and labels."""

from __future__ import annotations

import http.client
import math
import re
from pathlib import Path

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

PATIENCE_S = 60.0
PAGE = Path(__file__).resolve().parent.parent / "docs" / "watching.md"


def ask(address: str, path: str) -> tuple[int, str]:
    """Status and body of GET PATH at HOST:PORT."""
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        return reply.status, reply.read().decode()
    finally:
        connection.close()


def documented(prefix: str, *, by_client: bool = False) -> dict[str, tuple[str, str]]:
    """Type and meaning of each metric of docs/watching.md whose name begins so; those that name clients if asked."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| [^|]* \| ([^|]+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    ours = {name: (kind, meaning) for name, kind, meaning in rows if name.startswith(prefix)}
    return {name: told for name, told in ours.items() if by_client or not name.startswith(f"{prefix}client_")}


class Scrape:
    """What /metrics at `address` says."""

    def __init__(self, address: str) -> None:
        status, body = ask(address, "/metrics")
        assert status == 200, body
        self.families: dict[str, Metric] = {family.name: family for family in text_string_to_metric_families(body)}

    def value(self, name: str, **labels: str) -> float:
        """The sample of that name with exactly those labels, 0 for one that is not there."""
        for family in self.families.values():
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return sample.value
        return 0.0

    def labels(self) -> set[str]:
        """Names of labels of all our own samples."""
        ours = (family for name, family in self.families.items() if name.startswith("trunkline"))
        return {label for family in ours for sample in family.samples for label in sample.labels}

    def described(self) -> dict[str, tuple[str, str]]:
        """Type and meaning of each of our own metrics, by the name that a query uses."""
        return {
            name + ("_total" if family.type == "counter" else ""): (family.type, family.documentation)
            for name, family in self.families.items()
            if name.startswith("trunkline")
        }

    def finite(self) -> bool:
        return all(math.isfinite(sample.value) for family in self.families.values() for sample in family.samples)
