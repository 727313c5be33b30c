"""What a site decides for itself: its model, its data, its way to the trunk. Never the run's to choose.

In a deployment all of it comes from the SuperNode's node config, so that whoever starts a run cannot make a site read
another file. In a simulation there are no sites, and the run's own settings stand in.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aggregation.terms import DEFAULT_MAX_WEIGHT, DEFAULT_MIN_MEMBERS, Policy
from contract.config import ConfigValue, RunConfig
from contract.errors import ConfigError
from contract.identity import check_client_id, parse_public_key
from contract.tls import TlsFiles
from storage.home import home_dir, simulation_dir

_TLS_KEYS = ("trunk-ca", "trunk-certificate", "trunk-key")
_KEYS = (
    *("model", "data", "name", "trunk-address", "wire-log"),
    *("state-dir", "identity-key", "roster", "roster-signer", "dataset"),
    *_TLS_KEYS,
)
_BUDGET_KEYS = ("privacy-epsilon", "privacy-delta")
_SIMULATED = Policy(min_members=2, max_weight=1 << 62)
"""All of a simulation is on one machine: its clients have nobody to insist against."""
CLEAR_KEY = "allow-secagg-off"
DETERMINISTIC_KEY = "allow-deterministic"
LEDGER_FILE = "ledger.db"
_COUNTS = {
    "secagg-min-members": DEFAULT_MIN_MEMBERS,
    "secagg-min-threshold": 0,
    "secagg-max-weight": DEFAULT_MAX_WEIGHT,
}


@dataclass(frozen=True, slots=True)
class RosterPin:
    """Where the roster lies, and the public key, 32 bytes, whose signature on it this site believes."""

    path: Path
    signer: bytes


@dataclass(frozen=True, slots=True)
class Site:
    """`model` is a checkpoint (whole, or the client part), `data` a file or `stdlib:NAME`; `wire_log` "" for none.

    `state_dir` keeps the secrets of open secure sums, `ledger` is the site's own record of the privacy that it spent;
    `roster` is None where no roster is pinned. `dataset` names the data whose privacy budget is spent; `budget` is the
    site's own (epsilon, delta) for it, None where the first run's is taken. With `trunk_tls` the trunk is talked to by
    TLS and in no other way.
    """

    model: str
    data: str
    name: str
    trunk_address: str
    wire_log: str
    state_dir: Path
    ledger: Path
    identity_key: Path
    identity_named: bool
    dataset: str
    budget: tuple[float, float] | None
    policy: Policy
    roster: RosterPin | None
    simulated: bool
    clear_allowed: bool
    trunk_tls: TlsFiles | None = None

    def require_clear_allowed(self) -> None:
        """Raise ConfigError unless this site lets a run see its update in clear: a run cannot lower its floors so."""
        if not self.clear_allowed:
            raise ConfigError(
                "the run's secagg is off, so that its orchestrator would see this site's update in clear; this site "
                f"takes part in no such run ({CLEAR_KEY}=true in its node config allows it)"
            )


def read_site(
    node_config: Mapping[str, ConfigValue], config: RunConfig, node_id: str, flower_run_id: str, *, simulated: bool
) -> Site:
    """The site's settings. Raises ConfigError naming the node-config key that is missing or not what it must be."""
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
    if not simulated and config.secagg == "on" and "trunk-address" not in told:
        # The trunk can read the text, and could return gradients that leave one client alone in a sum.
        raise ConfigError(
            "trunk-address is not set; with secagg on it must be in the node config of this SuperNode, so that whoever "
            "starts a run cannot choose who receives this site's activations"
        )
    if config.deterministic and not simulated:
        _require_repeatable(told, node_config, masked=config.secagg == "on")
    if config.dp != "off":
        _require_lasting(told, config, simulated=simulated)
    elif any(key in node_config for key in _BUDGET_KEYS):
        raise ConfigError(
            "the run's dp is off, and this site's node config gives its data a privacy budget (privacy-epsilon): it "
            "takes part in no run that releases without a price"
        )
    state_dir, identity_key = _places(told, node_id, flower_run_id, simulated=simulated)
    return Site(
        model=told["model"],
        data=told["data"],
        name=told.get("name", f"client-{node_config.get('partition-id', 0)}" if simulated else node_id),
        trunk_address=told.get("trunk-address", config.trunk_address),
        wire_log=told.get("wire-log", ""),
        state_dir=state_dir,
        ledger=_ledger(state_dir, told["data"], simulated=simulated),
        identity_key=identity_key,
        identity_named="identity-key" in told,
        dataset=_dataset(told),
        budget=_budget(node_config),
        policy=_SIMULATED if simulated else _policy(node_config),
        roster=None if simulated else _pin(told),
        simulated=simulated,
        clear_allowed=simulated or _flag(node_config, CLEAR_KEY),
        trunk_tls=TlsFiles.named([told.get(key) for key in _TLS_KEYS], [f"node config {key}" for key in _TLS_KEYS]),
    )


def _require_repeatable(told: Mapping[str, str], node_config: Mapping[str, ConfigValue], *, masked: bool) -> None:
    """Raise ConfigError unless this site lets a run have one update from it twice, and has a name to draw it by."""
    if not _flag(node_config, DETERMINISTIC_KEY) and masked:
        raise ConfigError(
            "deterministic is true: a round that is played twice has the same update from this site, so that two sums "
            "over other clients would differ by just that; this site takes part in no such run "
            f"({DETERMINISTIC_KEY}=true in its node config allows it)"
        )
    if "name" not in told:
        raise ConfigError(
            "deterministic is true, and this SuperNode's node config gives no name: its batches are drawn by it, since "
            "Flower gives a SuperNode that starts anew another id"
        )


def _require_lasting(told: Mapping[str, str], config: RunConfig, *, simulated: bool) -> None:
    """Raise ConfigError unless a spent privacy budget is found again after this SuperNode started anew."""
    if "name" in told:
        check_client_id(told["name"], "node config name")
    lasting = {"name": ("name",), "a place for its ledger": ("state-dir", "identity-key")}
    for what, keys in lasting.items():
        if not simulated and not told.keys() & set(keys):
            raise ConfigError(
                f"dp is {config.dp}, and this SuperNode's node config gives no {' nor '.join(keys)}: Flower gives a "
                f"SuperNode that starts anew another id, and without {what} its spent privacy budget would be forgotten"
            )


def _places(told: Mapping[str, str], node_id: str, flower_run_id: str, *, simulated: bool) -> tuple[Path, Path]:
    """The state's directory and the identity's file.

    Flower gives a SuperNode that starts anew another node id: a state beside the key that was named outlives that.
    """
    named = Path(told["identity-key"]) if "identity-key" in told else None
    if simulated:
        state_dir = simulation_dir(flower_run_id) / node_id
    elif "state-dir" in told:
        state_dir = Path(told["state-dir"])
    elif named is not None:
        state_dir = named.with_name(f"{named.name}.state")
    else:
        state_dir = home_dir() / "clients" / node_id
    return state_dir, named or state_dir / "identity.pem"


def _dataset(told: Mapping[str, str]) -> str:
    """The name under which the data's privacy is spent: the site's own, or one that follows from where it lies."""
    named = told.get("dataset")
    if named is None:
        return f"data-{hashlib.sha256(told['data'].encode()).hexdigest()[:12]}"
    return check_client_id(named, "node config dataset")


def _ledger(state_dir: Path, data: str, *, simulated: bool) -> Path:
    """A simulated client is gone with its run, but its data's spent privacy is not."""
    if not simulated:
        return state_dir / LEDGER_FILE
    return home_dir() / "simulated-ledgers" / hashlib.sha256(data.encode()).hexdigest()[:16] / LEDGER_FILE


def _budget(node_config: Mapping[str, ConfigValue]) -> tuple[float, float] | None:
    """Raises ConfigError where only one of the two keys is there, or one is no number within its limits."""
    told = [key for key in _BUDGET_KEYS if key in node_config]
    if not told:
        return None
    if len(told) == 1:
        raise ConfigError(f"node config holds {told[0]} alone; a privacy budget is {' and '.join(_BUDGET_KEYS)}")
    numbers = []
    for key, most in zip(_BUDGET_KEYS, (math.inf, 1.0), strict=True):
        value = node_config[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < most:
            raise ConfigError(f"node config {key} is {value!r}; it must be a number above 0, below {most:g}")
        numbers.append(float(value))
    return numbers[0], numbers[1]


def _flag(node_config: Mapping[str, ConfigValue], key: str) -> bool:
    value = node_config.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"node config {key} is {value!r}; it must be true or false")
    return value


def _pin(told: Mapping[str, str]) -> RosterPin | None:
    """Raises ConfigError where only one of the two keys is there, or the signer's is no public key."""
    if ("roster" in told) != ("roster-signer" in told):
        missing, there = ("roster", "roster-signer") if "roster-signer" in told else ("roster-signer", "roster")
        raise ConfigError(f"node config holds {there} but no {missing}; a roster is pinned by its file and its signer")
    if "roster" not in told:
        return None
    return RosterPin(Path(told["roster"]), parse_public_key(told["roster-signer"], "node config roster-signer"))


def _policy(node_config: Mapping[str, ConfigValue]) -> Policy:
    """What the site insists on in secure sums. Raises ConfigError naming the key that is no count."""
    counts = {}
    for key, default in _COUNTS.items():
        value = node_config.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(f"node config {key} is {value!r}; it must be a whole number, >= 0")
        counts[key] = value
    return Policy(
        min_members=counts["secagg-min-members"],
        min_threshold=counts["secagg-min-threshold"],
        max_weight=counts["secagg-max-weight"],
    )


def in_simulation() -> bool:
    """Whether this process is one of Flower's simulation workers, which are Ray actors."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
