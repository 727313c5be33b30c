"""Flower's programs, started the way they work on one machine: own ports, own home, no network, no leftovers.

What each variable and flag is for is said where it is set; all of it was learned from Flower 1.41.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from contract.addresses import split_address
from contract.config import ConfigValue
from contract.errors import ConfigError, ConnectionFailedError, RoundError
from contract.openmp import waiting
from trunkline.ports import reserve_port
from trunkline.processes import Daemon, Supervisor
from trunkline.programs import runnable_scripts

START_LIMIT_S = 120.0
SUBMIT_LIMIT_S = 180.0
LOOPBACK = "127.0.0.1"
CONNECTION = "trunkline"
UNKNOWN = "unknown"
_LISTENER = "flwr-log"
_UNAVAILABLE = "Connection to the SuperLink is unavailable"  # as `flwr` says it
_STARTED = re.compile(r"Successfully started run (\d+)")


@dataclass(frozen=True, slots=True)
class SuperLinkAddress:
    """Where a SuperLink answers. Without `root_certificates` (an absolute path) the link is not encrypted."""

    address: str
    root_certificates: Path | None = None


@dataclass(frozen=True, slots=True)
class Submission:
    """A run that a SuperLink accepted. `stream` prints its log and ends with it: `flwr run --stream` to begin with."""

    flower_run_id: str
    stream: Daemon


def flower_environment(directory: Path, threads: int) -> dict[str, str]:
    """This process's environment, made fit for Flower's daemons and what they start.

    `directory` is the run's own temporary directory, its path short and without spaces; each torch process takes
    `threads` threads.
    """
    environment = dict(os.environ)
    # An address in the environment would make Ray join a cluster that is not ours.
    environment.pop("RAY_ADDRESS", None)
    bypass = [environment.get("NO_PROXY") or environment.get("no_proxy"), "127.0.0.1", "localhost"]
    no_proxy = ",".join(entry for entry in bypass if entry)
    return environment | {
        "PATH": os.pathsep.join([str(runnable_scripts(directory)), environment.get("PATH", os.defpath)]),
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # Else the SuperLink runs an installer before every run, which fails without a network.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        # Up to a second of idling per message by default; much below this the polling itself takes a core.
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray forks beside the ServerApp's calls to the trunk; gRPC's own handlers then crash some of the children
        # before they become Ray's programs (https://github.com/ray-project/ray/issues/63202).
        "GRPC_ENABLE_FORK_SUPPORT": "0",
        "RAY_TMPDIR": str(directory),
        "OMP_NUM_THREADS": str(threads),
        **waiting(environment),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def start_superlink(supervisor: Supervisor, simulation: bool) -> SuperLinkAddress:
    """Start a SuperLink on a free loopback port and wait until it answers."""
    port = reserve_port()
    home = supervisor.directory / "superlink-home"
    argv = [
        _program(supervisor, "flower-superlink"),
        "--insecure",
        "--disable-runtime-dependency-installation",
        *("--host", LOOPBACK, "--port", str(port)),
        *(["--simulation"] if simulation else []),
    ]
    daemon = supervisor.start("superlink", argv, {"FLWR_HOME": str(home)})
    supervisor.wait_for(lambda: _healthy(LOOPBACK, port), daemon, "the SuperLink", START_LIMIT_S)
    return SuperLinkAddress(f"{LOOPBACK}:{port}")


def start_supernode(
    supervisor: Supervisor, superlink: SuperLinkAddress, name: str, config: Mapping[str, ConfigValue]
) -> Daemon:
    """Start a SuperNode whose node config is `config`; it keeps trying until the SuperLink answers."""
    argv = [
        _program(supervisor, "flower-supernode"),
        "--insecure",
        *("--superlink", superlink.address),
        *("--host", LOOPBACK, "--port", str(reserve_port())),
        *("--node-config", node_config(config)),
    ]
    return supervisor.start(f"supernode-{name}", argv, {"FLWR_HOME": str(supervisor.directory / f"{name}-home")})


def node_config(values: Mapping[str, ConfigValue]) -> str:
    """`values` as `--node-config` takes them. Flower knows no escape: a value may hold one kind of quote only."""
    told = {key: _quoted(key, value) if isinstance(value, str) else str(value).lower() for key, value in values.items()}
    return " ".join(f"{key}={value}" for key, value in told.items())


def simulation_config(clients: int, cores: int) -> str:
    """`--federation-config` for `clients` virtual clients: at most one worker per client, one core for each."""
    workers = max(1, min(clients, cores))
    return f"num-supernodes={clients} client-resources-num-cpus=1 init-args-num-cpus={workers}"


def submit(
    supervisor: Supervisor, app: Path, superlink: SuperLinkAddress, federation_config: str | None = None
) -> Submission:
    """`flwr run` the staged `app`; raises ConnectionFailedError or RoundError where the SuperLink does not take it."""
    if not _listens(superlink.address):
        raise ConnectionFailedError(f"no SuperLink answers at {superlink.address}; start flower-superlink there first")
    argv = [_program(supervisor, "flwr"), "run", str(app), CONNECTION, "--stream"]
    if federation_config:
        argv += ["--federation-config", federation_config]
    stream = supervisor.start("flwr-run", argv, {"FLWR_HOME": str(_connection_home(supervisor, superlink))})
    try:
        supervisor.wait_for(lambda: _started_run(stream) is not None, stream, "the run", SUBMIT_LIMIT_S)
    except RoundError as error:
        if _UNAVAILABLE not in stream.log_path.read_text(encoding="utf-8", errors="replace"):
            raise
        how = "without TLS" if superlink.root_certificates is None else f"by TLS with {superlink.root_certificates}"
        raise ConnectionFailedError(
            f"the SuperLink at {superlink.address} cannot be talked to {how}: give --root-certificates where it uses "
            "TLS, and only there"
        ) from error
    return Submission(_started_run(stream) or "", stream)


def listen_again(supervisor: Supervisor, superlink: SuperLinkAddress, submission: Submission) -> Submission:
    """The same run with a new stream of its log, which repeats what was said before; the former stream is ended."""
    supervisor.end(submission.stream)
    if submission.stream.name == _LISTENER:
        submission.stream.log_path.unlink()  # or each stream would add all of the log to it once more
    argv = [_program(supervisor, "flwr"), "log", submission.flower_run_id, CONNECTION, "--stream"]
    home = str(_connection_home(supervisor, superlink))
    return Submission(submission.flower_run_id, supervisor.start(_LISTENER, argv, {"FLWR_HOME": home}))


def end_status(supervisor: Supervisor, superlink: SuperLinkAddress, flower_run_id: str) -> tuple[str, str]:
    """What Flower says of a run, such as ("finished:failed", its details); (UNKNOWN, why) where it says nothing."""
    argv = [_program(supervisor, "flwr"), "ls", "--run-id", flower_run_id, "--format", "json", CONNECTION]
    home = str(_connection_home(supervisor, superlink))
    try:
        asked = subprocess.run(
            argv,
            env={**supervisor.environment, "FLWR_HOME": home},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SUBMIT_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return UNKNOWN, f"the SuperLink at {superlink.address} did not say within {SUBMIT_LIMIT_S:.0f} s"
    try:
        run = json.loads(asked.stdout)["runs"][0]
        return str(run["status"]), str(run["status-details"])
    except (ValueError, LookupError, TypeError):
        return UNKNOWN, asked.stderr or asked.stdout


def _program(supervisor: Supervisor, name: str) -> str:
    """The path of Flower's program `name`, from the environment in which all that it starts will look, too."""
    found = shutil.which(name, path=supervisor.environment["PATH"])
    if found is None:
        raise ConfigError(f"{name} is not installed beside this Python; install trunkline again")
    return found


def _started_run(stream: Daemon) -> str | None:
    found = _STARTED.search(stream.log_path.read_text(errors="replace"))
    return found.group(1) if found else None


def _connection_home(supervisor: Supervisor, superlink: SuperLinkAddress) -> Path:
    """A FLWR_HOME whose only connection is `superlink`: the user's own stays as it is."""
    home = supervisor.directory / "flwr-home"
    home.mkdir(parents=True, exist_ok=True)
    certificates = superlink.root_certificates
    trust = "insecure = true" if certificates is None else f"root-certificates = {json.dumps(str(certificates))}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f"address = {json.dumps(superlink.address)}\n{trust}\n",
        encoding="utf-8",
    )
    return home


def _quoted(key: str, value: str) -> str:
    quote = '"' if '"' not in value else "'"
    if quote in value or "\\" in value and quote == '"':
        raise ConfigError(f"{key} is {value!r}; a node config's value must not hold a backslash or both kinds of quote")
    return f"{quote}{value}{quote}"


def _healthy(host: str, port: int) -> bool:
    # http.client knows no proxy settings, which is what a loopback address needs.
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _listens(address: str) -> bool:
    try:
        socket.create_connection(split_address("superlink", address), timeout=5).close()
    except OSError:
        return False
    return True
