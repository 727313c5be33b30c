"""CPU seconds of a secure sum's stages beside training, each in a process of its own as in a deployment.

Flower starts a Python process for every message. What is read here is one such process's CPU time from where
`flwr.clientapp` has been imported to where the stage's answer is there: our imports, the site's settings, its secrets
from the disk, the stage. The sum is over `--clients` sites whose neighbours are all others.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.report import Cell, Report, Spread, Target

if TYPE_CHECKING:
    from aggregation.secure_server import SecureServer
    from contract.secure_records import SecureReply

LIMIT_CPU_S = 0.35
STAGES = ("greet", "join", "share", "confirm", "unmask")
HEAVY = ("torch", "transformers", "peft")

_CHILD = """
import json, sys, time
import flwr.clientapp
began = time.process_time()
from clients.app import open_secure_site, order_from, read_site, to_record
from contract.config import RunConfig
asked = json.load(sys.stdin)
config = RunConfig.from_flower({})
site = open_secure_site(read_site(asked["site"], config, asked["node_id"], "1", simulated=False), asked["node_id"])
record = {name: bytes.fromhex(value) for name, value in asked["order"].items()} | {"run": "bench"}
reply = to_record(site.answer(order_from(record), config))
spent = time.process_time() - began
told = {name: value if isinstance(value, str) else value.hex() for name, value in reply.items()}
heavy = [name for name in asked["heavy"] if name in sys.modules]
print(json.dumps({"cpu_s": spent, "reply": told, "heavy": heavy}))
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stage_cost", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    parser.add_argument("--clients", type=int, default=10, help="how many sites the sum has")
    parser.add_argument("--repeats", type=int, default=5, help="how many sums are played")
    options = parser.parse_args(argv)
    logging.getLogger("trunkline").setLevel(logging.ERROR)  # these sites pin no roster, and would say so each time
    found = Report("stage_cost", f"{options.clients} sites, one process a message, {options.repeats} sums")
    readings: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as directory:
            for stage, cpu_s in play(Path(directory), options.clients).items():
                readings[stage].append(cpu_s)
    for stage in STAGES:
        spread = Spread.of(readings[stage])
        row: dict[str, Cell] = {"stage": stage, "cpu_s": spread.median, "min_s": spread.min, "max_s": spread.max}
        found.results.append(row)
    dearest = max(Spread.of(readings[stage]).median for stage in STAGES)
    found.targets.append(Target.at_most("dearest_stage_cpu_s", dearest, LIMIT_CPU_S))
    return found.finish(options.json)


def play(directory: Path, clients: int) -> dict[str, float]:
    """CPU seconds of site 0 at each stage of one sum; the other sites answer within this process."""
    sum_ = _Sum(directory, clients)
    spent = {"greet": sum_.measured({"greet": b"n" * 16})}
    spent["join"] = sum_.stage({"join": sum_.terms.to_bytes()}, "advert", sum_.server.accept_advert)
    share = {"next_session": sum_.terms.session_id, "share": sum_.server.adverts()}
    spent["share"] = sum_.stage(share, "shares", sum_.server.accept_shares)
    sum_.upload()
    session = {"session": sum_.terms.session_id}
    confirm = {**session, "confirm": sum_.server.survivors_message()}
    spent["confirm"] = sum_.stage(confirm, "confirmation", sum_.server.accept_confirmation)
    unmask = {**session, "unmask": sum_.server.unmask_request()}
    spent["unmask"] = sum_.stage(unmask, "answer", sum_.server.accept_answer)
    sum_.server.finish()
    return spent


class _Sum:
    """One secure sum over sites that keep their state below `directory`."""

    def __init__(self, directory: Path, clients: int) -> None:
        from aggregation.graph import full_threshold
        from aggregation.ring import plan
        from aggregation.secure_server import SecureServer
        from aggregation.terms import Member, Terms
        from clients.secure import open_secure_site
        from clients.site import read_site
        from contract.config import RunConfig

        self.config = RunConfig.from_flower({})
        ids = sorted(f"site-{number}" for number in range(clients))
        site: dict[str, str | int] = {"model": "m", "data": "d", "trunk-address": "t:1", "secagg-min-members": 2}
        self.settings = {one: {**site, "state-dir": str(directory / one)} for one in ids}
        self.sites = {
            one: open_secure_site(read_site(self.settings[one], self.config, one, "1", simulated=False), one)
            for one in ids
        }
        keys = {one: site.identity.public_key().public_bytes_raw() for one, site in self.sites.items()}
        self.terms = Terms(
            run="bench", round=1, nonce=os.urandom(16), members=tuple(Member(one, keys[one]) for one in ids),
            threshold=full_threshold(clients), degree=0, size=1000,
            ring_bits=plan(clients, self.config.max_trained_tokens(), self.config.update_clip).bits,
            model_fingerprint="f", settings_sha256=self.config.sha256(),
        )  # fmt: skip
        self.server: SecureServer = SecureServer(self.terms)
        self.ids = ids

    def measured(self, order: Mapping[str, bytes]) -> float:
        return self._in_a_process(order)[0]

    def stage(self, order: Mapping[str, bytes], name: str, accept: Callable[[str, bytes], None]) -> float:
        """Every site answers `order`; site 0 in a process of its own, whose CPU seconds are answered."""
        from contract.secure_records import SecureOrder

        spent, reply = self._in_a_process(order)
        accept(self.ids[0], bytes.fromhex(reply[name]))
        for one in self.ids[1:]:
            answered: SecureReply = self.sites[one].answer(SecureOrder("bench", **order), self.config)
            accept(one, getattr(answered, name))
        return spent

    def upload(self) -> None:
        import numpy as np

        for one in self.ids:
            vector = np.ones(self.terms.size, dtype=f"uint{self.terms.ring_bits}")
            upload = self.sites[one].upload(self.terms.session_id, vector, "", self.server.inbox(one))
            self.server.accept_upload(one, upload)

    def _in_a_process(self, order: Mapping[str, bytes]) -> tuple[float, dict[str, str]]:
        asked = {
            "site": self.settings[self.ids[0]],
            "node_id": self.ids[0],
            "order": {name: value.hex() for name, value in order.items()},
            "heavy": HEAVY,
        }
        done = subprocess.run(
            [sys.executable, "-c", _CHILD], input=json.dumps(asked), capture_output=True, text=True, check=True
        )
        told = json.loads(done.stdout.splitlines()[-1])
        if told["heavy"]:
            raise RuntimeError(f"a stage imported {', '.join(told['heavy'])}")
        return float(told["cpu_s"]), told["reply"]


if __name__ == "__main__":
    sys.exit(main())
