"""A run, from its settings to its exported adapter."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from aggregation.rules import rule_named
from contract import logs
from contract.config import ConfigValue, RunConfig
from contract.errors import BudgetError, ConfigError, TrunklineError
from contract.tls import TlsFiles
from orchestrator.adapters import ClientPart, draw_first_adapter
from orchestrator.audience import Audience
from orchestrator.base_model import find_model, model_fingerprint
from orchestrator.desk import Desk, Version
from orchestrator.exchange import Clock, Exchange, MessageGrid
from orchestrator.export import Export, export_adapter, record_structure
from orchestrator.lease import Lease, renewed
from orchestrator.membership import Membership
from orchestrator.metrics import best_version, has_stalled, judged_losses
from orchestrator.protection import told_coverage, told_spent
from orchestrator.replicas import ConnectedTrunk, connect
from orchestrator.resumption import RESUMED, newest_version, require_same_run
from orchestrator.round import end_run, play_round
from orchestrator.secure_round import end_secure_run, play_secure_round
from orchestrator.secure_run import SecureRun
from orchestrator.spending import Spending
from orchestrator.tickets import open_office
from orchestrator.trunk import ServedModel, require_served
from orchestrator.trunk_sessions import TrunkSessions
from orchestrator.watchers import Watched, metrics_place, watching
from storage.artifacts import ArtifactStore
from storage.home import simulation_dir
from storage.ledger import Ledger
from storage.records import RunMode
from storage.store import Store, utc_now

log = logging.getLogger("trunkline.orchestrator")


@dataclass(frozen=True, slots=True)
class Start:
    """What a run is started with.

    `ledger` is where a run with differential privacy keeps what it spends. `runs_dir` receives RUN_ID/adapter;
    `at_exit` registers what must still be done when a signal ends the process. The last five stand in for the network,
    the heartbeat, the calendar, chance and who watches, so that a whole run can be simulated from a seed.
    """

    values: Mapping[str, ConfigValue]
    flower_run_id: str
    mode: RunMode
    grid: MessageGrid
    store: Store
    artifacts: ArtifactStore
    runs_dir: Path
    clock: Clock
    at_exit: Callable[[Callable[[], None]], None] = lambda ending: None
    ledger: Ledger | None = None
    connect: Callable[[str, float], ConnectedTrunk] = lambda addresses, patience_s: connect(
        addresses, patience_s=patience_s, tls=TlsFiles.from_environment(os.environ)
    )
    lease: Callable[[Store, str], AbstractContextManager[Lease]] = renewed
    now: Callable[[], datetime] = utc_now
    entropy: Callable[[int], bytes] = os.urandom
    watch: Callable[[Watched], AbstractContextManager[tuple[Audience, Callable[[], None]]]] = watching


def conduct(start: Start) -> Export:
    """Conduct one run, or what is left of one that is resumed, to its end and return its exported adapter.

    However it ends, SQL then holds how and why, and what ended it is raised.
    """
    run_id = str(start.values.get(RESUMED, "")) or new_run_id(start.now(), start.entropy)
    with ExitStack() as held:
        held.enter_context(logs.about(run=run_id))
        with _refusal_recorded(start, run_id):
            metrics_place()
            config = RunConfig.from_flower(start.values)
            model_dir = find_model(config.model)
            trunk = held.enter_context(closing(start.connect(config.trunk_address, config.trunk_wait_s)))
            served = trunk.describe()
            tickets = open_office(config, served, start.store, trunk.address)
            _take_up(start, run_id, config, served)
        lease = held.enter_context(start.lease(start.store, run_id))
        sessions = TrunkSessions(trunk, run_id)
        held.callback(sessions.end)  # once SQL has the run's end, which a silent trunk must not hold up
        directory = start.runs_dir / run_id
        watched = Watched(run_id, config, lease, trunk, start.store, start.ledger, directory)
        ending = held.enter_context(_end_recorded(start, run_id))
        audience, moves = held.enter_context(start.watch(watched))
        audience.join(sessions)

        def check() -> None:
            moves()
            lease.require()

        exchange = Exchange(start.grid, start.clock, check, audience.exchanged)
        desk = Desk(
            *(run_id, config, exchange, trunk, start.store, start.artifacts, start.clock),
            tickets=tickets,
            audience=audience,
            entropy=start.entropy,
        )
        if start.mode == "simulation":
            held.callback(_forget_simulation, start.flower_run_id)
            start.at_exit(partial(_forget_simulation, start.flower_run_id))
        log.info("run %s: %d rounds, trunk at %s", run_id, config.num_rounds, trunk.address)
        log.info("%s (%s)", config.aggregation, rule_named(config.aggregation).label)
        for line in told_coverage(config):
            log.info("privacy: %s", line)
        require_served(config, served, model_fingerprint(model_dir), trunk.address)
        if config.resume_run:
            sessions.take_over(start.store.rounds(run_id))
        version = newest_version(desk) or first_version(desk, model_dir)
        play, end = _player(desk, served.fingerprint, start)
        spent = None
        while version.number < config.num_rounds and not has_stalled(_losses(desk), config.early_stopping_patience):
            try:
                version = play(version)
            except BudgetError as error:
                if version.number == 0:
                    raise
                spent = f"ended after round {version.number} of {config.num_rounds}: {error}"
                log.warning("%s", spent)
                break
        run, exported = start.store.get_run(run_id), directory / "adapter"
        export = export_adapter(start.store, start.artifacts, run, version.number, exported)
        end(version)
        if config.dp != "off" and start.ledger is not None:
            for line in told_spent(config, start.ledger.accounts(run_id)):
                log.info("privacy: %s", line)
        ending.reason = spent or _told_end(desk, version)
    with logs.about(run=run_id):
        log.info("run %s finished: adapter of round %d in %s", run_id, export.round, export.directory)
    return export


def _take_up(start: Start, run_id: str, config: RunConfig, served: ServedModel) -> None:
    """Write the new run to SQL, or take over the one that is resumed."""
    if not config.resume_run:
        start.store.create_run(run_id, start.flower_run_id, config.to_flower(), start.mode, served.fingerprint)
        return
    before = start.store.get_run(run_id)
    require_same_run(before, config, served)
    start.store.resume_run(run_id, start.flower_run_id)
    if start.mode == "simulation":
        _forget_simulation(before.flower_run_id)  # which a kill kept from doing so itself


def _player(
    desk: Desk, model_fingerprint: str, start: Start
) -> tuple[Callable[[Version], Version], Callable[[Version], None]]:
    """How a round is played, and what is done after the last one, by the setting `secagg`."""
    if desk.config.secagg == "off":
        log.warning("secagg is OFF: the orchestrator sees every client's update, losses and counts")
        return partial(play_round, desk), partial(end_run, desk)
    spending = _spending(desk, start)
    membership = Membership(desk, enrolled=start.mode != "simulation")
    if spending is not None:
        membership.remember(account.unit for account in spending.ledger.accounts(desk.run_id))
    run = SecureRun(desk, membership, model_fingerprint, spending)
    return partial(play_secure_round, run), partial(end_secure_run, run)


def _spending(desk: Desk, start: Start) -> Spending | None:
    """What the run may spend; None where nothing of it has a price. Raises ConfigError where no ledger is kept."""
    if desk.config.dp == "off":
        return None
    if start.ledger is None:
        raise ConfigError(f"dp is {desk.config.dp}, but no ledger is open to keep what it spends")
    return Spending(desk.run_id, desk.config, start.ledger, start.flower_run_id)


def first_version(desk: Desk, model_dir: Path) -> Version:
    """Draw version 0 from the seed, keep both parts, and give the trunk its own."""
    first = draw_first_adapter(desk.config, model_dir)
    client_sha256, trunk_sha256 = desk.artifacts.put(first.client), desk.artifacts.put(first.trunk)
    desk.trunk.put_adapter(first.trunk)
    record_structure(desk.store, desk.run_id, first.spec)
    desk.store.add_adapter_version(desk.run_id, 0, client_sha256, trunk_sha256)
    return Version(0, ClientPart.from_bytes(first.client), client_sha256, trunk_sha256)


def new_run_id(now: datetime, entropy: Callable[[int], bytes] = os.urandom) -> str:
    """YYYYMMDD-HHMMSS-xxxx: sorts by time, and two runs of one second differ."""
    return f"{now:%Y%m%d-%H%M%S}-{entropy(2).hex()}"


def _losses(desk: Desk) -> dict[int, float]:
    return judged_losses(desk.store.metrics(desk.run_id, over_clients=True))


def _told_end(desk: Desk, last: Version) -> str | None:
    """Why the run ended as it did, where that is not just that its rounds were played."""
    losses = _losses(desk)
    best = best_version(losses)
    told = []
    if last.number < desk.config.num_rounds:
        told.append(f"stopped early: no lower held-out loss in the last {desk.config.early_stopping_patience} rounds")
    if best is not None and best != last.number and desk.config.dp == "off":
        told.append(f"round {best} has the lowest held-out loss ({losses[best]:.4f}); `adapter export --best` takes it")
    return "; ".join(told) or None


@contextmanager
def _refusal_recorded(start: Start, run_id: str) -> Iterator[None]:
    """Keep a run that cannot even start, so that `runs show --last` says why. One that exists is left as it is."""
    try:
        yield
    except TrunklineError as error:
        if start.values.get(RESUMED):
            log.error("run %s is not resumed: %s", run_id, error)
            raise
        if start.store.find_run(run_id) is None:
            start.store.create_run(run_id, start.flower_run_id, dict(start.values), start.mode, "", refused=str(error))
        else:  # that it was written is what this process was not told
            start.store.finish_run(run_id, "failed", str(error), flower_run_id=start.flower_run_id)
        log.error("run %s failed: %s", run_id, error)
        raise


@dataclass(slots=True)
class _Ending:
    reason: str | None = None


@contextmanager
def _end_recorded(start: Start, run_id: str) -> Iterator[_Ending]:
    """Give the run its end in SQL, whatever happens inside: finished, failed with the error, or stopped."""
    start.at_exit(lambda: _stop(start, run_id))
    ending = _Ending()
    try:
        yield ending
    except Exception as error:
        told = str(error) if isinstance(error, TrunklineError) else f"{type(error).__name__}: {error}"
        start.store.finish_run(run_id, "failed", told, flower_run_id=start.flower_run_id)
        log.error("run %s failed: %s", run_id, told)
        raise
    except BaseException:
        _stop(start, run_id)
        raise
    start.store.finish_run(run_id, "finished", ending.reason, flower_run_id=start.flower_run_id)


def _forget_simulation(flower_run_id: str) -> None:
    """Virtual clients have no home of their own: their identities and secrets end with the run."""
    directory = simulation_dir(flower_run_id)
    try:
        if directory.exists():
            shutil.rmtree(directory)
    except OSError as error:
        log.warning("the simulated clients' secrets in %s could not be removed: %s", directory, error)


def _stop(start: Start, run_id: str) -> None:
    reason = "the ServerApp was told to end, by a person or by Flower"
    if start.store.finish_run(run_id, "stopped", reason, flower_run_id=start.flower_run_id):
        log.warning("run %s stopped", run_id)
