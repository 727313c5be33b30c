"""The gate before a real SuperLink, by a real nginx: a SuperNode gets through, whoever would start a run does not."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from contract.certificates import Party, Role
from contract.config import RunConfig
from orchestrator.authority import create_authority, issue
from tests.deploy.command_lines import PROGRAMS, ROOT
from trunkline.bundle import stage_app
from trunkline.finding import DoubtfulError, NotReadyError
from trunkline.flower import flower_environment
from trunkline.ports import reserve_port
from trunkline.processes import Daemon, Supervisor
from trunkline.superlink_checks import check_superlink, check_superlink_clock

LIMIT_S = 200.0
CONTROL = "/v1/control/list-runs"
pytestmark = [pytest.mark.timeout(LIMIT_S + 100), pytest.mark.deployment]


@dataclass
class Gated:
    """A SuperLink at `link`, the gate at `gate`, both HOST:PORT, and what vouches for both."""

    supervisor: Supervisor
    superlink: Daemon
    link: str
    gate: str
    ca: Path

    def flwr(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(PROGRAMS / "flwr"), *map(str, arguments)],
            env=dict(self.supervisor.environment),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )

    def ask(self, address: str, path: str, method: str = "POST") -> int:
        """The status of the answer to a request for `path`, as it stands."""
        host, _, port = address.rpartition(":")
        trust = ssl.create_default_context(cafile=self.ca)
        connection = http.client.HTTPSConnection(host, int(port), timeout=LIMIT_S, context=trust)
        try:
            connection.putrequest(method, path, skip_host=False)
            connection.putheader("Content-Length", "0")
            connection.endheaders()
            return connection.getresponse().status
        finally:
            connection.close()

    def asked_of_the_superlink(self, path: str) -> int:
        """How many requests for `path` its own log tells of."""
        return len(re.findall(rf"\"\w+ {re.escape(path)} HTTP", self.superlink.log_path.read_text()))


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def gate_config(folder: Path, port: int, superlink_port: int) -> Path:
    """The shipped file, with this machine's places and ports."""
    text = (ROOT / "deploy" / "docker" / "gate.conf").read_text(encoding="utf-8")
    for shipped, ours in (
        ("listen 8443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("https://superlink:8000", f"https://127.0.0.1:{superlink_port}"),
        (" /tmp/", f" {folder}/"),
        ("/run/secrets/", f"{folder}/"),
    ):
        assert shipped in text
        text = text.replace(shipped, ours)
    path = folder / "gate.conf"
    path.write_text(text, encoding="utf-8")
    return path


def write_node_key(path: Path) -> Path:
    """A node key as ssh-keygen makes it; answers the public half's file."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = path.with_suffix(".pub")
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return public


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gated]:
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if nginx is None:
        told = "nginx is not installed (Debian: apt-get install nginx-light)"
        pytest.fail(told) if os.environ.get("CI") else pytest.skip(told)
    folder = tmp_path_factory.mktemp("gate")
    authority = create_authority(folder / "authority", datetime.now(UTC), 1)
    for name in ("superlink", "gate"):
        issue(authority, Party(Role.SUPERLINK, name), [name], datetime.now(UTC), 1)
    for file in authority.directory.iterdir():
        shutil.copy(file, folder)
    link_port, gate_port = reserve_port(), reserve_port()
    link, gate = f"127.0.0.1:{link_port}", f"127.0.0.1:{gate_port}"
    home = folder / "flwr-home"
    home.mkdir()
    (home / "config.toml").write_text(
        "".join(
            f'[superlink.{name}]\naddress = "{address}"\nroot-certificates = "{folder}/ca.pem"\n'
            for name, address in (("direct", link), ("gate", gate))
        )
    )
    environment = {**flower_environment(folder, threads=1), "FLWR_HOME": str(home)}
    with Supervisor(folder / "logs", environment) as supervisor:
        argv = [str(PROGRAMS / "flower-superlink"), "--enable-supernode-auth", "--port", str(link_port)]
        for option, name in (("ssl-ca-certfile", "ca.pem"), ("ssl-certfile", "superlink.pem")):
            argv += [f"--{option}", str(folder / name)]
        superlink = supervisor.start("superlink", [*argv, "--ssl-keyfile", str(folder / "superlink.key")])
        as_us = "user root; " if os.getuid() == 0 else ""
        config = gate_config(folder, gate_port, link_port)
        proxy = supervisor.start("gate", [nginx, "-c", str(config), "-g", f"{as_us}daemon off;"])
        supervisor.wait_for(lambda: listens(link), superlink, "the SuperLink", LIMIT_S)
        supervisor.wait_for(lambda: listens(gate), proxy, "the gate", LIMIT_S)
        yield Gated(supervisor, superlink, link, gate, folder / "ca.pem")


def test_a_registered_supernode_gets_through(gated: Gated, tmp_path: Path) -> None:
    public = write_node_key(tmp_path / "north")
    assert gated.flwr("supernode", "register", public, "direct").returncode == 0
    argv = [str(PROGRAMS / "flower-supernode"), "--superlink", gated.gate, "--root-certificates", str(gated.ca)]
    argv += ["--auth-supernode-private-key", str(tmp_path / "north"), "--port", str(reserve_port())]
    node = gated.supervisor.start("north", argv, {"FLWR_HOME": str(tmp_path / "home")})
    gated.supervisor.wait_for(
        lambda: gated.asked_of_the_superlink("/v1/fleet/activate-node") == 1, node, "the SuperNode", LIMIT_S
    )
    listed = json.loads(gated.flwr("supernode", "list", "direct", "--format", "json").stdout)
    assert [one["status"] for one in listed["nodes"]] == ["online"]


def test_nobody_starts_a_run_or_registers_a_node_through_it(gated: Gated, tmp_path: Path) -> None:
    app = stage_app(RunConfig(), tmp_path / "app")
    public = write_node_key(tmp_path / "stranger")
    asked = ("/v1/control/start-run", "/v1/control/register-node", "/v1/control/list-runs")
    before = [gated.asked_of_the_superlink(path) for path in asked]
    for arguments in (("run", app, "gate"), ("supernode", "register", public, "gate"), ("ls", "gate")):
        done = gated.flwr(*arguments)
        assert done.returncode != 0, done.stdout
    assert [gated.asked_of_the_superlink(path) for path in asked] == before


@pytest.mark.parametrize(
    "path",
    [
        CONTROL,
        "/",
        "/v1/runtime/x",
        f"/{CONTROL}",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/..%2fcontrol%2flist-runs",
        "/v1/fleet/x/../../control/list-runs",
        "/v1/fleet//../../control/list-runs",
        "/v1/fleet/%252e%252e/control/list-runs",
        "/V1/CONTROL/list-runs",
    ],
)
def test_no_spelling_of_another_path_gets_through(gated: Gated, path: str) -> None:
    before = gated.asked_of_the_superlink(CONTROL)
    assert gated.ask(gated.gate, path) in (400, 403, 404)
    assert gated.asked_of_the_superlink(CONTROL) == before


def test_the_doctor_tells_a_superlink_from_its_gate_and_what_vouches_for_both(gated: Gated, tmp_path: Path) -> None:
    for address, what in ((gated.link, "a SuperLink"), (gated.gate, "a gate that hands on what sites ask")):
        with pytest.raises(DoubtfulError, match=f"{address} is {what}, its certificate good for 1 days more"):
            check_superlink(address, gated.ca)
        assert f"the clock of {address} is" in check_superlink_clock(address, gated.ca)
        other = create_authority(tmp_path / what[:6].strip(), datetime.now(UTC), 1).directory / "ca.pem"
        with pytest.raises(NotReadyError, match=f"{address}: TLS came to nothing: "):
            check_superlink(address, other)


def test_without_the_gate_the_same_request_would_reach_who_starts_runs(gated: Gated) -> None:
    before = gated.asked_of_the_superlink(CONTROL)
    assert gated.ask(gated.link, CONTROL) not in (403, 404)
    assert gated.asked_of_the_superlink(CONTROL) == before + 1
