"""A site: its SuperNode takes messages one at a time and gives each to the real ClientApp; only training is arithmetic.

Its vault, its identity and its ledger lie on its disk, which outlives the SuperNode.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import Context, Error, Message, RecordDict

from aggregation import tally
from aggregation.protocol import PlainSumClient
from aggregation.ring import RingVector
from clients import app
from clients.participation import RoundOrder, RoundWork
from clients.replay import may_begin_again
from clients.secure import SecureTurn
from clients.site import Site
from clients.spending import SiteSpending, open_spending
from clients.update import encode_update
from contract import adapter
from contract.config import ConfigValue, RunConfig
from contract.errors import ConnectionFailedError, SessionError, TrunklineError
from contract.identity import public_key_text
from contract.records import RoundKey
from tests.orchestrator.fakes import drift
from tests.simulation.kernel import Kernel, KilledError, Process
from tests.simulation.network import Grid, Network
from tests.simulation.trunk import ADDRESS, FINGERPRINT, Session, TrunkHost

STEP_S = 1.0
_LOOK_S = 1.0
PROCESS_DIED = 8
"""Flower's code for a ClientApp whose process died."""


class AppKilledError(KilledError):
    """The process of one ClientApp was killed, and not its SuperNode."""


@dataclass(frozen=True)
class Trained:
    """What a site made of one order: the update of the client's half, its ring elements before any mask, its weight.

    `trunk` are the trunk's values that it left there, by name; None where the trunk's half is frozen.
    """

    key: RoundKey
    order: RoundOrder
    update_d: npt.NDArray[np.float64]
    encoded: RingVector
    weight: int
    trunk: Mapping[str, npt.NDArray[np.float64]] | None


@dataclass(eq=False)
class SiteHost:
    """A site's machine. `made` holds what the message at work was trained to."""

    name: str
    weight: int
    node_id: int
    directory: Path
    kernel: Kernel
    network: Network
    trunk: TrunkHost
    entropy: Callable[[int], bytes]
    sizes: Mapping[str, int]
    identity: Ed25519PrivateKey
    process: Process = field(init=False)
    made: Trained | None = None
    faults: list[str] = field(default_factory=list)
    _inbox: deque[tuple[Grid, Message]] = field(default_factory=deque)
    _app_dead: bool = False

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True)
        pem = self.identity.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path = self.directory / "identity.pem"
        path.touch(0o600)
        path.write_bytes(pem)
        self._start()

    @property
    def public_key_text(self) -> str:
        return public_key_text(self.identity.public_key().public_bytes_raw())

    @property
    def node_config(self) -> dict[str, ConfigValue]:
        return {
            "model": "unused", "data": f"{self.name}.jsonl", "name": self.name, "trunk-address": ADDRESS,
            "state-dir": str(self.directory), "identity-key": str(self.directory / "identity.pem"),
            "dataset": "letters", "secagg-min-members": 2, "allow-secagg-off": True, "allow-deterministic": True,
        }  # fmt: skip

    def _start(self) -> None:
        self.process = Process(self.name, self._visit)
        self._inbox.clear()
        self.network.connect(self.node_id, self)
        self.kernel.say(f"{self.name} connects as {self.node_id}")

    def _visit(self, place: str) -> None:
        if self._app_dead:
            raise AppKilledError(self.name)
        self.kernel.say(f"{self.name} {place}")
        network = self.network
        if network.strikes(network.weather.app_killed):
            self.kernel.say(f"the ClientApp of {self.name} is killed")
            self._app_dead = True
            raise AppKilledError(self.name)
        if network.strikes(network.weather.site_killed):
            network.disconnect(self.node_id)
            self.kernel.at(network.rng.uniform(0.5, 30.0), self._start_again)
            self.kernel.die_at(place)
        network.spoil_disk(place)

    def _start_again(self) -> None:
        if self.network.rng.random() < 0.5:
            self.node_id += 100
        self._app_dead = False
        self.kernel.say(f"{self.name} connects again as {self.node_id}")
        self._start()

    def receive(self, grid: Grid, message: Message) -> None:
        """Take a message; it waits while another one is at work."""
        self._inbox.append((grid, message))
        if not self.process.tasks and len(self._inbox) == 1:
            self.kernel.spawn(self.process, self._serve)

    def _serve(self) -> None:
        while self._inbox:
            grid, message = self._inbox[0]
            self.kernel.sleep(self.network.rng.uniform(0.02, 0.4))  # the ClientApp's process starts
            self.made, self._app_dead = None, False
            content: RecordDict | Error
            try:
                content = self._answered(grid, message)
            except AppKilledError:
                content = Error(PROCESS_DIED)
            self._app_dead = False
            self._inbox.popleft()
            grid.reply(self.name, message, content)

    def _answered(self, grid: Grid, message: Message) -> RecordDict | Error:
        kind = message.metadata.message_type.partition(".")[0]
        training = {"train": True, "evaluate": False, "query": None}[kind]
        context = Context(grid.flower_run_id, self.node_id, dict(self.node_config), RecordDict(), dict(grid.values))
        answer: Any = app._answer(message, context, training=training)
        if answer.has_error():
            if answer.error.code == app.FAULT:
                self.faults.append(f"the ClientApp of {self.name} failed of itself: {answer.error.reason}")
            return Error(answer.error.code, answer.error.reason)
        content: RecordDict = answer.content
        return content

    # ---- what stands in for clients.participation.take_part -----------------------------------------------------

    def take_part(
        self, order: RoundOrder, config: RunConfig, site: Site, *, training: bool, turn: SecureTurn | None
    ) -> RoundWork:
        """As clients.participation.take_part, which trains a model, in the same order of what is kept and released."""
        try:
            return self._take_part(order, config, site, training=training, turn=turn)
        except TrunklineError as error:
            self.kernel.say(f"{self.name} fails in {order.key.round}.{order.key.attempt}: {type(error).__name__}")
            raise
        except Exception as error:
            self.faults.append(f"the simulated training of {self.name} failed of itself: {error!r}")
            raise

    def _take_part(
        self, order: RoundOrder, config: RunConfig, site: Site, *, training: bool, turn: SecureTurn | None
    ) -> RoundWork:
        self._await_trunk(config)
        if turn is not None:
            turn.check(order.key, config, order.factor, order.clients, FINGERPRINT, training=training)
        attempt = _Attempt(self, order, config, site, training, turn)
        left = config.trunk_retries
        while True:
            try:
                upload = attempt.play()
                break
            except (ConnectionFailedError, SessionError) as error:
                if not left or not may_begin_again(error, config, opened=attempt.opened, released=attempt.released):
                    raise
            left -= 1
            self.kernel.say(f"{self.name} begins its round again")
            self._await_trunk(config)
        told = {} if turn is not None or config.metrics == "off" else attempt.metrics()
        return RoundWork(upload, told)

    def _await_trunk(self, config: RunConfig) -> None:
        until_s = self.kernel.now_s + config.trunk_wait_s
        while not self.trunk.process.alive or self.network.held_s(self.name, "trunk"):
            if self.kernel.now_s > until_s:
                raise ConnectionFailedError("no trunk answers")
            self.kernel.sleep(_LOOK_S)


@dataclass
class _Attempt:
    """The round's work with one trunk session."""

    host: SiteHost
    order: RoundOrder
    config: RunConfig
    site: Site
    training: bool
    turn: SecureTurn | None
    opened: bool = False
    released: bool = False

    def play(self) -> bytes | None:
        order, host = self.order, self.host
        session = Session.open(host.trunk, host.name, order.key, order.client_id, order.trunk_sha256)
        self.opened = True
        if self.config.dp == "off":
            return self._work(session, None)
        with open_spending(self.site, self.config) as spending:
            if self.turn is not None and self.turn.head:
                spending.keep_head(self.turn.head)
            return self._work(session, spending)

    def _work(self, session: Session, spending: SiteSpending | None) -> bytes | None:
        order, config, turn, host = self.order, self.config, self.turn, self.host
        size = sum(host.sizes[name] for name in adapter.trainable_names(host.sizes, order.factor))
        if spending is not None and self.training and turn is not None:
            spending.reserve(order.key, order.clients, turn.threshold, size, {})
        if not self.training:
            self.released = True
            return None if turn is None else turn.upload(order.adapter_sha256, None, self._tally())
        update_d = drift(size, f"client {self._drawn_by()}")
        trunk = self._trained_trunk(session)
        for _ in range(config.local_steps):
            host.kernel.sleep(STEP_S)
            session.step(host.weight // config.local_steps)
        threshold = None if turn is None else turn.threshold
        encoded = encode_update(update_d, host.weight, order.clients, config, threshold, host.entropy)
        kept = {name: value.double().numpy().copy() for name, value in trunk.items()} if trunk else None
        weight = host.weight if config.dp == "off" else 1
        host.made = Trained(order.key, order, update_d, encoded.copy(), weight, kept)
        if turn is None:
            upload = PlainSumClient(encoded.size, 8 * encoded.itemsize).upload(encoded)
        else:
            self.released = True
            upload = turn.upload(order.adapter_sha256, encoded, self._tally())
        if trunk is not None:
            session.contribute(weight, adapter.to_bytes(trunk))
        if spending is not None:
            spending.committed(order.key)
        return upload

    def _drawn_by(self) -> str:
        """What the site's batches are drawn from, as order_key and repeated_order_key say."""
        key = self.order.key
        if self.config.deterministic:
            return f"{self.host.name} {key.round}"
        return f"{self.host.name} {key.run} {key.round} {key.attempt}"

    def _trained_trunk(self, session: Session) -> dict[str, Any] | None:
        if self.config.trunk_adapter == "frozen":
            return None
        tensors = adapter.from_bytes(session.base())
        for name in adapter.trainable_names(tensors, self.order.factor):
            moved = drift(tensors[name].numel(), f"trunk {self._drawn_by()} {name}")
            tensors[name] += adapter.unflatten(moved, {name: tuple(tensors[name].shape)}, [name])[name]
        return tensors

    def _tally(self) -> dict[str, int]:
        if self.config.metrics == "off":
            return {}
        told = {"eval_tokens": 10, "eval_nats": round((6.0 - self.order.key.round) * 10 * tally.NATS_STEPS)}
        if self.training:
            weight, steps = self.host.weight, self.config.local_steps
            told |= {"train_nats": 3 * weight * tally.NATS_STEPS, "train_tokens": weight, "steps": steps}
        return told

    def metrics(self) -> dict[str, float]:
        told: dict[str, float] = {"eval_tokens": 10, "eval_loss": 6.0 - self.order.key.round}
        if self.training:
            told |= {"train_loss": 3.0, "trained_tokens": self.host.weight, "steps": self.config.local_steps}
        return told
