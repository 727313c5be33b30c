"""One seed from its first event to the last, and what is wrong with what it left."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from unittest import mock

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.supercore.task_identity import TaskIdentity
from sqlalchemy import Engine
from transformers import LlamaConfig

from clients.participation import RoundOrder, RoundWork
from clients.secure import SecureTurn, open_secure_site
from clients.site import Site
from contract import adapter
from contract.config import RunConfig
from contract.privacy_records import ADVERSARIES, Budget
from orchestrator.adapters import FirstAdapter, draw_first_adapter
from privacy.accountant import spent
from privacy.filters import used
from privacy.plan import register_budget
from storage import revisions
from storage.artifacts import ArtifactStore
from storage.engine import make_engine
from storage.ledger import Ledger, open_ledger
from storage.store import Store
from tests.simulation.books import Books, Version
from tests.simulation.driver import EPOCH, SPENT, Life, Machine, Operator
from tests.simulation.history import History
from tests.simulation.kernel import Kernel, StuckError
from tests.simulation.network import Network
from tests.simulation.site import SiteHost
from tests.simulation.trunk import ADDRESS, CUT, TrunkHost
from tests.simulation.weather import Plan, plan_of
from tests.storage.ledger_cases import Key

LIMIT_S = 3 * 3600.0
MODEL = "simulated/model"
RARE = {
    "a driver killed": "driver 1 is killed at",
    "a driver that stands still": "stands still for",
    "a second driver refused": "is being driven: its orchestrator was heard",
    "a driver taken over from while it lives": "drives it no more, and what it still had to write is not taken",
    "a run stopped": "the run is stopped by ada",
    "an attempt aborted": "sql.abort_round.after",
    "a commit killed in its transaction": "is killed at sql.commit_round.uncommitted",
    "a charge killed in its transaction": "is killed at ledger.uncommitted",
    "a site restarted": "connects again as",
    "a ClientApp killed": "the ClientApp of",
    "a trunk restarted": "trunk 2 starts",
    "a trunk's disk lost": "the trunk's disk is lost",
    "a round trained again": "begins its round again",
    "training for an attempt that is over ended": ": RoundError\n",
    "a second order to train refused": "this session's one turn was taken before",
    "a message refused by Flower": " refused\n",
    "an answer of Flower lost": "LinkError",
    "a full disk": "the disk is full at",
    "an answer of the database lost": "the database's answer is lost at",
    "a reply lost": " is lost\n",
    "budgets at their end": "can still pay for a round",
}
"""What is counted over all seeds, by the words that the trace then holds."""
OFTEN = frozenset(
    {
        *("a driver killed", "a driver that stands still", "a second driver refused", "a run stopped"),
        *("a driver taken over from while it lives", "an attempt aborted", "a round trained again", "a reply lost"),
        *("a site restarted", "a ClientApp killed", "a trunk restarted", "a message refused by Flower"),
        "training for an attempt that is over ended",
    }
)
"""What comes up in a tenth of all seeds and more: 200 without one of these test less than they say."""
_FAST_DISK = Path("/dev/shm")


@dataclass(frozen=True)
class Outcome:
    """What came of a seed. `wrong` is empty where all is as it must be."""

    seed: int
    wrong: tuple[str, ...]
    trace: tuple[str, ...]
    trace_sha256: str
    versions: tuple[Version, ...]
    whole: bool
    """Whether every committed round is over all of the sites."""
    virtual_s: float
    lives: int
    commits: int
    reason: str
    met: frozenset[str]
    """What of `RARE` came up."""


@dataclass(frozen=True)
class Surroundings:
    """What all seeds of a process share: a model's configuration, an empty database, and what is drawn once."""

    folder: Path
    model: Path
    database: Path

    def first(self, config: RunConfig) -> FirstAdapter:
        """Version 0, which follows from the seed and the structure alone."""
        kept = ("seed", "lora-r", "target-modules", "head-layers", "tail-layers")
        return _first(self.model, RunConfig.from_flower({key: config.to_flower()[key] for key in kept}))


_engines: dict[str, Engine] = {}


def engine_at(url: str) -> Engine:
    """One engine for each file, which keeps from seed to seed what it has compiled."""
    if url not in _engines:
        _engines[url] = make_engine(url)
    return _engines[url]


@lru_cache(maxsize=64)
def _first(model: Path, config: RunConfig) -> FirstAdapter:
    return draw_first_adapter(config, model)


@contextlib.contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """Nothing is logged: thousands of lives say thousands of things."""
    level, handler = logger.level, logging.NullHandler()
    logger.setLevel(logging.CRITICAL)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


@contextlib.contextmanager
def surroundings() -> Iterator[Surroundings]:
    """Made once for many seeds; in memory where the system has such a disk."""
    where = _FAST_DISK if _FAST_DISK.is_dir() and os.access(_FAST_DISK, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="simulation-", dir=where) as name:
        folder = Path(name)
        llama = LlamaConfig(
            hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=16, max_position_embeddings=32, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
        )  # fmt: skip
        llama.save_pretrained(folder / "model")
        database = folder / "empty.db"
        open_ledger(f"sqlite:///{database}").close()
        around = Surroundings(folder, folder / "model", database)
        with contextlib.ExitStack() as patched:
            patched.enter_context(_silent(logging.getLogger("trunkline")))
            for field in ("_run_id", "_task_id", "_node_id"):
                patched.enter_context(mock.patch.object(TaskIdentity, field, 1))
            patched.enter_context(mock.patch.object(revisions, "_scripts", lru_cache(revisions._scripts)))
            patched.enter_context(mock.patch.object(revisions, "make_engine", engine_at))
            patched.enter_context(
                mock.patch("orchestrator.run.draw_first_adapter", lambda config, model: around.first(config))
            )
            # The model's name is among the settings that are hashed: a folder of chance would change every mask.
            patched.enter_context(mock.patch("orchestrator.run.find_model", return_value=around.model))
            yield around


class World:
    """All machines of one seed."""

    def __init__(self, around: Surroundings, plan: Plan, home: Path) -> None:
        self.plan = plan
        self.home = home
        settings = {**plan.settings, "model": MODEL, "trunk-address": ADDRESS}
        settings |= {"head-layers": CUT.head, "tail-layers": CUT.tail}
        self.config = RunConfig.from_flower(settings)
        self._chance = random.Random(f"trunkline simulation's secrets {plan.seed}")
        rng = random.Random(f"trunkline simulation's events {plan.seed}")
        self.kernel = Kernel(LIMIT_S)
        self.network = Network(self.kernel, plan.weather, rng)
        self.trunk = TrunkHost(self.kernel, self.network, home / "trunk")
        self.hosts = self._sites(around)
        shutil.copyfile(around.database, home / "trunkline.db")
        if self.config.dp != "off":
            for name in self.hosts:
                shutil.copyfile(around.database, home / name / "ledger.db")
        self.books = Books(home / "trunkline.db")
        artifacts = ArtifactStore(home / "artifacts")
        self.history = History(self.kernel, self.config, self.books, artifacts, self.hosts)
        self.history.site_books = {name: partial(self._site_books, name) for name in self.hosts}
        self.url = f"sqlite:///{home / 'trunkline.db'}"
        machine = Machine(
            self.kernel, self.network, self.trunk, self.history, self.books, engine_at(self.url), home, artifacts,
            Key(), self._chance.randbytes, settings,
        )  # fmt: skip
        self.operator = Operator(machine)
        if plan.enrolled:
            self._enroll()

    def _sites(self, around: Surroundings) -> dict[str, SiteHost]:
        client = adapter.from_bytes(around.first(self.config).client)
        sizes = {name: value.numel() for name, value in client.items()}
        return {
            name: SiteHost(
                name, weight, number, self.home / name, self.kernel, self.network, self.trunk, self._chance.randbytes,
                sizes, Ed25519PrivateKey.from_private_bytes(self._chance.randbytes(32)),
            )
            for number, (name, weight) in enumerate(self.plan.sites.items(), 1)
        }  # fmt: skip

    def _enroll(self) -> None:
        store = Store(engine_at(self.url), lambda: EPOCH)
        for name, host in self.hosts.items():
            store.enroll_client(name, host.public_key_text, "ada")

    def _site_books(self, name: str) -> Books | None:
        path = self.home / name / "ledger.db"
        return Books(path) if path.is_file() else None

    def live(self) -> None:
        """Play the seed to its end; what is wrong is in the history afterwards."""

        def take_part(
            order: RoundOrder, config: RunConfig, site: Site, *, training: bool, turn: SecureTurn | None = None
        ) -> RoundWork:
            return self.hosts[site.name].take_part(order, config, site, training=training, turn=turn)

        secure = partial(open_secure_site, entropy=self._chance.randbytes)
        with mock.patch("clients.participation.take_part", take_part):
            with mock.patch("clients.app.open_secure_site", secure):
                self.operator.begin()
                try:
                    self.kernel.run(lambda: bool(self.history.wrong or self._faults()) or self.operator.done)
                except StuckError as error:
                    self.history.refute(f"{error}; driven by {[life.name for life in self._alive()]}")
                finally:
                    processes = [life.process for life in self.operator.lives] + [self.trunk.process]
                    self.kernel.end(processes + [host.process for host in self.hosts.values()])
        for fault in self._faults():
            self.history.refute(fault)
        if not self.history.wrong:
            self._judge_the_end()

    def _alive(self) -> list[Life]:
        return [life for life in self.operator.lives if not life.outcome]

    def _faults(self) -> list[str]:
        return [fault for host in self.hosts.values() for fault in host.faults]

    def _judge_the_end(self) -> None:
        books, history = self.books, self.history
        for run_id in books.runs():
            status, _, reason, _ = books.run(run_id)
            history.look(run_id)
            if status == "running" or (status != "finished" and not reason):
                history.refute(f"run {run_id} ended as {status} with reason {reason}")
            for number, attempt, state, _, why in books.attempts(run_id):
                if state == "open" or (state == "aborted" and not why):
                    history.refute(f"attempt {number}.{attempt} of {run_id} ended as {state} with reason {why}")
            rounds = len(books.versions(run_id)) - 1
            if status == "finished" and rounds < self.config.num_rounds and SPENT not in (reason or ""):
                history.refute(f"run {run_id} finished after {rounds} rounds with reason {reason}")
            if SPENT in (reason or "") and not self._poor():
                history.refute(f"run {run_id} ended as {reason}, and every site can pay for one more")
        self._judge_ledgers()

    def _poor(self) -> list[str]:
        """The sites that cannot pay for one more of the releases that they paid for."""
        budget, poor = register_budget(self.config), []
        for client, counts in self.books.charged().items():
            for text in list(counts):
                more = spent(counts + Counter({text: 1}), "holder", budget.order)
                if used(more, budget, "holder") > 1.0:
                    poor.append(client)
        return poor

    def _judge_ledgers(self) -> None:
        if self.config.dp == "off":
            return
        heads = []
        budget = register_budget(self.config)
        books: dict[str, Books | None] = {name: self._site_books(name) for name in self.hosts}
        for name, own in books.items():
            if own is None:
                continue
            self._judge_spending(f"{name}'s own ledger", own, budget)
            ledger = Ledger(engine_at(f"sqlite:///{self.home / name / 'ledger.db'}"))
            for fault in ledger.verify():
                self.history.refute(f"the ledger of {name}: {fault}")
            heads += ledger.peer_heads()
            ledger.close()
            own.close()
        self._judge_spending("the orchestrator's ledger", self.books, budget)
        ledger = Ledger(engine_at(self.url))
        for fault in ledger.verify(heads, [Key().public_key_text]):
            self.history.refute(f"the orchestrator's ledger: {fault}")
        ledger.close()
        self._judge_coverage(books)

    def _judge_coverage(self, books: Mapping[str, Books | None]) -> None:
        """What was let go stays paid for to the end."""
        for (name, key), _ in self.history.releases.items():
            states = self.books.states(name, (key.run, key.round, key.attempt))
            if "RESERVED" not in states or "VOID" in states:
                ended = sorted(states)
                self.history.refute(f"{name} let round {key.round}.{key.attempt} go; its charge ended as {ended}")

    def _judge_spending(self, whose: str, books: Books, budget: Budget) -> None:
        for client, counts in books.charged().items():
            for adversary in ADVERSARIES:
                part = used(spent(counts, adversary, budget.order), budget, adversary)
                if part > 1.0:
                    self.history.refute(f"{whose} has {client} spend {part:.3f} of its budget")


def play(around: Surroundings, plan: Plan) -> Outcome:
    """Play a plan in a home of its own, which is gone afterwards."""
    home = around.folder / "home"
    home.mkdir()
    try:
        world = World(around, plan, home)
        world.live()
        run_id, history = world.operator.run_id, world.history
        versions = tuple(world.books.versions(run_id)) if run_id else ()
        committed = [(run_id, n, a) for n, a, status, *_ in world.books.attempts(run_id) if status == "committed"]
        whole = all(len(world.books.trained(of)) == len(world.hosts) for of in committed)
        reason = (world.books.run(run_id)[2] or "") if run_id else ""
        world.books.close()
        return Outcome(
            plan.seed, tuple(history.wrong), tuple(world.kernel.trace), world.kernel.trace_sha256(), versions, whole,
            world.kernel.now_s, len(world.operator.lives), history.commits, reason, _met(world.kernel.trace),
        )  # fmt: skip
    finally:
        for engine in _engines.values():
            engine.dispose()
        shutil.rmtree(home)


def _met(trace: list[str]) -> frozenset[str]:
    text = "\n".join(trace)
    return frozenset(name for name, words in RARE.items() if words in text)


def judged(around: Surroundings, seed: int) -> Outcome:
    """Play a seed. In deterministic mode its adapters must also be those of the same run in calm weather."""
    plan = plan_of(seed)
    outcome = play(around, plan)
    if outcome.wrong or not plan.settings.get("deterministic") or not outcome.whole or not plan.weather.clears_s:
        return outcome
    calm = play(around, plan_of(seed, calm=True))
    if calm.wrong:
        return calm
    if calm.versions != outcome.versions:
        wrong = f"its adapters are {outcome.versions}, and {calm.versions} in calm weather"
        return replace(outcome, wrong=(wrong,))
    return outcome
