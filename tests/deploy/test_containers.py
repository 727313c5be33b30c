"""The container files: linters take them, programs know the options in them, nothing runs as root or leaks a key."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from contract.identity import parse_public_key
from contract.tls import TlsFiles
from tests.deploy.command_lines import ROOT, faults, is_ours, shell_commands
from tests.deploy.node_configs import check_node_config
from tests.deploy.ports import documented_ports

DOCKER = ROOT / "deploy" / "docker"
DOCKERFILE = DOCKER / "Dockerfile"
BIN = Path(sys.executable).parent
OURS = "trunkline:0.1.0"


@cache
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    return loaded


SERVICES = sorted(compose()["services"])
OUR_SERVICES = [name for name in SERVICES if compose()["services"][name]["image"] == OURS]


def service(name: str) -> dict[str, Any]:
    found: dict[str, Any] = compose()["services"][name]
    return found


def instructions(name: str) -> list[str]:
    text = re.sub(r"\\\n", " ", DOCKERFILE.read_text(encoding="utf-8"))
    return re.findall(rf"^{name} +(.*)$", text, re.MULTILINE)


def ran(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_takes_the_dockerfile() -> None:
    ran(BIN / "hadolint", "--failure-threshold", "style", DOCKERFILE)


def test_the_compose_file_keeps_to_the_specification() -> None:
    ran(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DOCKER / "compose.yaml")


def test_compose_itself_takes_the_file(tmp_path: Path) -> None:
    settings = tmp_path / "env"
    settings.write_text("ROSTER_SIGNER=ed25519:x\n", encoding="utf-8")
    ran(BIN / "docker-compose", "--env-file", settings, "-f", DOCKER / "compose.yaml", "config", "--quiet")


def test_the_image_ends_as_a_user_without_rights_and_holds_no_secret() -> None:
    assert instructions("USER")[-1] == "10001:10001"
    assert len(instructions("FROM")) == 2, "what builds the image does not stay in it"
    assert not re.search(r"(?i)password|secret|token|\.key\b", "\n".join(instructions("ENV") + instructions("ARG")))
    assert instructions("ADD") == []


def test_what_the_image_copies_is_let_through_and_nothing_else_is() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_through = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    assert let_through == needed | {"LICENSE", "README.md", "pyproject.toml", "requirements.lock"}
    assert all((ROOT / name).exists() for name in let_through)


def test_the_image_runs_commands_that_are_there() -> None:
    (check,) = instructions("HEALTHCHECK")
    for told in (*instructions("CMD"), check.partition("CMD ")[2]):
        assert faults(json.loads(told)) == []


@pytest.mark.parametrize("name", OUR_SERVICES)
def test_its_program_knows_every_option(name: str) -> None:
    command = service(name)["command"]
    assert is_ours(command)
    assert faults(command) == []


@pytest.mark.parametrize("name", ["north", "south"])
def test_a_sites_node_config_is_one(name: str) -> None:
    (told,) = [word for word in service(name)["command"] if word.startswith("--node-config=")]
    check_node_config(told.partition("=")[2])


@pytest.mark.parametrize("name", SERVICES)
def test_it_runs_without_rights_and_writes_to_its_volumes_alone(name: str) -> None:
    told = service(name)
    assert not told["user"].startswith(("0", "root"))
    assert (told["read_only"], told["cap_drop"]) == (True, ["ALL"])
    assert told["security_opt"] == ["no-new-privileges:true"]
    assert not told.keys() & {"privileged", "cap_add", "network_mode", "ports", "pid", "ipc", "devices"}
    assert told["pids_limit"] > 0
    assert ":latest" not in told["image"]
    assert ":" in told["image"]


@pytest.mark.parametrize("name", SERVICES)
def test_secrets_are_files_and_each_service_has_its_own(name: str) -> None:
    told = service(name)
    for variable, value in (told.get("environment") or {}).items():
        assert not re.search(r"(?i)password|secret|token", variable) or variable.endswith("_FILE"), variable
        assert not re.search(r"://[^/@]*:[^/@]*@", str(value)), f"{variable} holds a password"
    keys = {secret for secret in told.get("secrets", []) if secret.endswith(".key")}
    owners = {key.removesuffix(".key").partition("-")[0] for key in keys}
    allowed = {
        "superlink": {"superlink", "orchestrator"},
        "trunk": {"trunk", "probe"},
        "operator": {"operator", "roster"},
    }
    assert owners <= allowed.get(name, {name})
    assert set(told.get("secrets", [])) <= set(compose()["secrets"])


def test_each_secret_is_used_and_lies_where_git_does_not_look() -> None:
    used = {secret for name in SERVICES for secret in service(name).get("secrets", [])}
    assert used == set(compose()["secrets"])
    assert "deploy/docker/*/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert all(told["file"].startswith("./secrets/") for told in compose()["secrets"].values())


def test_what_a_command_reads_of_its_secrets_is_given_to_it() -> None:
    for name in SERVICES:
        told = service(name)
        text = " ".join([*told.get("command", []), *map(str, (told.get("environment") or {}).values())])
        assert set(re.findall(r"/run/secrets/([\w.-]+)", text)) <= set(told.get("secrets", [])), name


def test_no_network_leads_outside_and_only_the_gate_stands_between_sites_and_superlink() -> None:
    assert all(network == {"internal": True} for network in compose()["networks"].values())
    of = {name: set(service(name)["networks"]) for name in SERVICES}
    assert of["north"] == of["south"] == {"fleet", "sites-trunk"}
    assert {name for name in SERVICES if "fleet" in of[name]} == {"north", "south", "gate"}
    assert {name for name in SERVICES if "sites-trunk" in of[name]} == {"north", "south", "trunk"}
    assert {name for name in SERVICES if "database" in of[name]} == {"database", "superlink", "operator"}


def test_every_service_that_lasts_has_a_health_check_or_needs_none() -> None:
    for name in SERVICES:
        told = service(name)
        if told["image"] == OURS and name != "trunk":
            assert "healthcheck" in told, name
    assert instructions("HEALTHCHECK"), "the trunk's is the image's"


def test_every_port_is_one_that_the_docs_tell_of() -> None:
    text = (DOCKER / "gate.conf").read_text(encoding="utf-8")
    text += "".join(str({**service(name), "user": ""}) for name in SERVICES)
    ports = {int(port) for port in re.findall(r"(?:[a-z0-9.]:|--port=|listen )(\d{4,5})\b", text)}
    assert {8000, 8443, 50051, 9094} <= ports
    assert ports <= documented_ports()


def test_prepare_calls_commands_that_are_there() -> None:
    called = shell_commands(DOCKER / "prepare")
    assert {tuple(words[:3]) for words in called} >= {("trunkline", "pki", "issue"), ("trunkline", "model", "split")}
    assert [fault for words in called for fault in faults(words)] == []


def test_prepare_makes_every_secret_for_the_users_that_read_it(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("prepare gives keys to the containers' users, which root alone can do")
    place = tmp_path / "docker"
    place.mkdir()
    shutil.copy(DOCKER / "prepare", place)
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    subprocess.run([str(place / "prepare")], check=True, timeout=240, env=environment, stdin=subprocess.DEVNULL)
    made = {path.name for path in (place / "secrets").iterdir()}
    assert made | {"ticket-signer.pub"} == set(compose()["secrets"]), "that one comes from the orchestrator's home"
    for name in SERVICES:
        owner = int(service(name)["user"].partition(":")[0])
        for secret in set(service(name).get("secrets", [])) & made:
            status = (place / "secrets" / secret).stat()
            readable = status.st_uid == owner or status.st_mode & 0o004
            assert readable, f"{name} cannot read {secret}"
            assert secret.endswith(".pem") or status.st_mode & 0o077 == 0, f"{secret} is not its owner's alone"
    for name in ("trunk", "probe", "orchestrator", "operator", "north", "south"):
        pair = (place / "secrets" / f"{name}.pem", place / "secrets" / f"{name}.key")
        TlsFiles(place / "secrets" / "ca.pem", *pair).channel_credentials()
    assert (place / "models" / "trunk" / "config.json").is_file()
    assert all((place / "data" / f"{site}.jsonl").is_file() for site in ("north", "south"))
    (signer,) = re.findall(r"^ROSTER_SIGNER=(.*)$", (place / ".env").read_text(), re.MULTILINE)
    assert len(parse_public_key(signer)) == 32
    again = subprocess.run([str(place / "prepare")], capture_output=True, text=True, timeout=60, env=environment)
    assert (again.returncode, "there already" in again.stderr) == (1, True)
