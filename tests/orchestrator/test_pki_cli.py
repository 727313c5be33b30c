"""`trunkline pki`: a development CA whose certificates other programs take, and keys that nobody else can read."""

from __future__ import annotations

import json
import os
import socket
import ssl
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from contract.certificates import Party, Role, party_of, read_certificates, require_signed_by
from contract.identity import public_key_text, read_private_key
from orchestrator.pki_cli import app


def pki(*arguments: str | Path) -> Any:
    """What a command answered as data; its failure fails the test."""
    result = CliRunner().invoke(app, [*map(str, arguments), "-o", "json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["data"]


def refusal(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 2
    return " ".join(result.stderr.split())


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    pki("init", "--dir", tmp_path / "pki")
    return tmp_path / "pki"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_ca_and_its_keys_are_its_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        pki("init", "--dir", tmp_path / "a" / "pki")
        pki("issue", "north", "--role", "client", "--dir", tmp_path / "a" / "pki")
    finally:
        os.umask(before)
    folder = tmp_path / "a" / "pki"
    assert mode(folder) == 0o700
    assert {path.name: mode(path) for path in folder.iterdir()} == {
        "ca.pem": 0o644, "ca.key": 0o600, "north.pem": 0o644, "north.key": 0o600,
    }  # fmt: skip


@pytest.mark.parametrize("role", list(Role))
def test_each_role_gets_a_certificate_that_says_so(authority: Path, role: Role) -> None:
    server = role in (Role.TRUNK, Role.SUPERLINK)
    hosts = ("--host", "trunk.example", "--host", "10.0.0.7") if server else ()
    told = pki("issue", "north", "--role", role.value, "--dir", authority, *hosts, "--days", "7")
    chain = read_certificates(Path(told["certificate"]))
    assert party_of(chain[0]) == Party(role, "north")
    require_signed_by(chain, read_certificates(authority / "ca.pem"), "north.pem")
    assert sorted(told["hosts"]) == (["10.0.0.7", "127.0.0.1", "localhost", "trunk.example"] if server else [])
    shown = pki("show", told["certificate"], "--ca", authority / "ca.pem")
    assert (shown["role"], shown["name"], shown["problem"]) == (role.value, "north", None)
    assert shown["key_sha256"] == told["key_sha256"]


def test_nothing_is_ever_written_over(authority: Path) -> None:
    assert "ca.pem already" in refusal("init", "--dir", authority)
    issue = ("issue", "north", "--role", "client", "--dir", authority)
    pki(*issue)
    key = (authority / "north.key").read_bytes()
    assert "north.pem already" in refusal(*issue)
    (authority / "north.pem").unlink()
    assert "north.key already" in refusal(*issue)
    assert (authority / "north.key").read_bytes() == key


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("north", "--role", "client", "--host", "a.example"), "a certificate of role client has none"),
        (("north", "--role", "trunk", "--host", "a.example:50051"), "--host is 'a.example:50051'"),
        (("north", "--role", "trunk", "--host", "*.example"), "--host is '*.example'"),
        (("north", "--role", "trunk", "--host", "10.0.0.256"), "--host is '10.0.0.256'"),
        (("north", "--role", "trunk", "--host", ""), "--host is ''"),
        (("ca", "--role", "client"), "NAME is ca"),
        (("a/b", "--role", "client"), "NAME is 'a/b'"),
        (("..", "--role", "client"), "NAME is '..'"),
        (("north", "--role", "client", "--days", "4000"), "the certificate authority itself ends at"),
        (("north", "--role", "client", "--days", "40000"), "days is 40000; it must be 1 to 36500"),
        (("north", "--role", "boss"), "'boss' is not one of"),
    ],
)
def test_what_cannot_be_issued_is_told_and_leaves_nothing(
    authority: Path, arguments: tuple[str, ...], told: str
) -> None:
    assert told in refusal("issue", *arguments, "--dir", authority).replace("│ ", "")
    assert sorted(path.name for path in authority.iterdir()) == ["ca.key", "ca.pem"]


def test_a_directory_that_others_reach_holds_no_ca(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    assert "(mode 0750)" in refusal("init", "--dir", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert "make one with `trunkline pki init`" in refusal("issue", "x", "--role", "client", "--dir", tmp_path)


def test_a_ca_key_that_others_can_read_issues_nothing(authority: Path) -> None:
    (authority / "ca.key").chmod(0o644)
    assert "run `chmod 600" in refusal("issue", "north", "--role", "client", "--dir", authority)
    assert not (authority / "north.key").exists()


def test_show_tells_what_is_wrong_and_exits_with_1(authority: Path, tmp_path: Path) -> None:
    pki("issue", "north", "--role", "client", "--dir", authority)
    pki("init", "--dir", tmp_path / "other")
    arguments = ["show", str(authority / "north.pem"), "--ca", str(tmp_path / "other" / "ca.pem"), "-o", "json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "is not signed by the certificate authority" in json.loads(result.stdout)["data"]["problem"]


def test_the_tickets_key_is_made_once_and_its_public_line_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "home"))
    told = pki("ticket-key")
    assert told == pki("ticket-key")
    path = tmp_path / "home" / "ticket.pem"
    assert mode(path) == 0o600
    assert told["public_key"] == public_key_text(read_private_key(path).public_key().public_bytes_raw())
    path.chmod(0o604)
    assert "run `chmod 600" in refusal("ticket-key")


def test_openssl_takes_a_server_and_a_client_of_the_ca_for_what_they_are(authority: Path) -> None:
    """By Python's ssl in its strictest way; a client's certificate serves nobody, and a server's is no client's."""
    for name, role in (("trunk", "trunk"), ("north", "client")):
        pki("issue", name, "--role", role, "--dir", authority)
    assert handshake(authority, server="trunk", client="north")
    for server, client in (("north", "north"), ("trunk", "trunk")):
        assert not handshake(authority, server=server, client=client)


def handshake(authority: Path, server: str, client: str) -> bool:
    contexts = []
    for purpose, name in ((ssl.Purpose.CLIENT_AUTH, server), (ssl.Purpose.SERVER_AUTH, client)):
        context = ssl.create_default_context(purpose, cafile=str(authority / "ca.pem"))
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_cert_chain(authority / f"{name}.pem", authority / f"{name}.key")
        contexts.append(context)
    listener = socket.create_server(("127.0.0.1", 0))
    answered: list[bytes] = []

    def serve() -> None:
        connection, _ = listener.accept()
        try:
            with contexts[0].wrap_socket(connection, server_side=True) as secure:
                answered.append(secure.recv(5))
        except OSError:  # ssl.SSLError is one
            connection.close()

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        with socket.create_connection(listener.getsockname(), timeout=30) as plain:
            with contexts[1].wrap_socket(plain, server_hostname="localhost") as secure:
                secure.sendall(b"hello")
    except OSError:
        pass
    finally:
        serving.join(30)
        listener.close()
    return answered == [b"hello"]
