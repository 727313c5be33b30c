"""`trunkline clients` and `trunkline secagg` as an operator and a site use them."""

from __future__ import annotations

import getpass
import json
import stat
import subprocess
import sys
import threading
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from contract import output, watching
from contract.errors import StorageError
from contract.identity import parse_public_key, read_private_key
from contract.roster import Roster, read_roster, write_roster
from orchestrator import publication
from orchestrator.clients_cli import app
from orchestrator.publication import Publication
from orchestrator.secagg_cli import app as secagg_app
from storage.store import Store, open_reader, open_store
from tests.pki import Pki


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRUNKLINE_DATABASE_URL", raising=False)
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")


def clients(*arguments: str | Path, typed: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=typed)


def data(*arguments: str | Path) -> Any:
    done = clients(*arguments, "-o", "json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["data"]


def refused(code: int, told: str, *arguments: str | Path, typed: str | None = None) -> None:
    done = clients(*arguments, typed=typed)
    assert done.exit_code == code, done.output
    assert told in done.stderr
    assert done.stdout == ""


def keygen(path: Path) -> str:
    return clients("keygen", "--out", path).stdout.strip()


@pytest.fixture
def signer(tmp_path: Path) -> Path:
    keygen(tmp_path / "signer.key")
    return tmp_path / "signer.key"


def signed(path: Path, signer: Path) -> Roster:
    return read_roster(path, read_private_key(signer).public_key().public_bytes_raw())


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_keygen_prints_the_public_line_alone_and_keeps_the_private_half_private(tmp_path: Path) -> None:
    done = clients("keygen", "--out", tmp_path / "site.key")
    assert done.exit_code == 0
    public = parse_public_key(done.stdout.removesuffix("\n"))
    assert read_private_key(tmp_path / "site.key").public_key().public_bytes_raw() == public
    assert stat.S_IMODE((tmp_path / "site.key").stat().st_mode) == 0o600
    assert (tmp_path / "site.key").read_text().splitlines()[1] not in done.output
    assert "give the public line above" in done.stderr


def test_keygen_tells_scripts_where_the_key_is(tmp_path: Path) -> None:
    told = data("keygen", "--out", tmp_path / "site.key")
    assert told["private_key_file"] == str(tmp_path / "site.key")
    assert told["public_key"].startswith("ed25519:")


def test_keygen_overwrites_nothing(tmp_path: Path) -> None:
    keygen(tmp_path / "site.key")
    before = (tmp_path / "site.key").read_bytes()
    refused(2, "a key is never overwritten", "keygen", "--out", tmp_path / "site.key")
    assert (tmp_path / "site.key").read_bytes() == before


# ---- enrolling and revoking ------------------------------------------------------------------------------------------


def test_a_client_is_enrolled_listed_and_revoked(tmp_path: Path) -> None:
    line = keygen(tmp_path / "a.key")
    done = clients("enroll", "site-a", "--public-key", line)
    assert done.exit_code == 0, done.output
    assert "publish: trunkline clients roster" in done.stderr
    (tmp_path / "b.pub").write_text(keygen(tmp_path / "b.key") + "\n")
    enrolled = data("enroll", "site-b", "--public-key", f"@{tmp_path / 'b.pub'}", "--operator", "bob")
    assert enrolled == {"client_id": "site-b", "roster_version": 2, "published": None}
    rows = data("list")
    assert [(row["client_id"], row["enrolled_by"], row["roster_version"]) for row in rows] == [
        ("site-a", "ada", 1),
        ("site-b", "bob", 2),
    ]
    assert rows[0]["public_key"] == line

    assert data("revoke", "site-a", "--reason", "laptop stolen", "--yes")["roster_version"] == 3
    assert [row["client_id"] for row in data("list")] == ["site-b"]
    revoked = data("list", "--all")[0]
    assert (revoked["client_id"], revoked["revoke_reason"]) == ("site-a", "laptop stolen")
    table = clients("list", "--all").stdout
    assert "roster version 3" in table
    assert "laptop stolen" in table
    assert len(clients("list", "--all", "-o", "jsonl").stdout.splitlines()) == 2
    reader = open_reader()
    assert [event.detail["operator"] for event in reader.events()] == ["ada", "bob", "ada"]
    reader.close()


def test_who_watches_the_list_sees_who_is_enrolled_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = keygen(tmp_path / "a.key"), keygen(tmp_path / "b.key")
    clients("enroll", "site-a", "--public-key", first)

    def pause(seconds: float) -> None:
        """Another client is enrolled between the first look and the second, and the watcher goes after the third."""
        pauses.append(seconds)
        if len(pauses) == 1:
            with closing(open_store()) as store:
                store.enroll_client("site-b", second, "bob")
        if len(pauses) == 3:
            raise KeyboardInterrupt

    pauses: list[float] = []
    monkeypatch.setattr(watching.time, "sleep", pause)
    done = clients("list", "--watch", "-o", "jsonl")
    told = [[row["client_id"] for row in json.loads(line)["data"]] for line in done.stdout.splitlines()]
    assert told == [["site-a"], ["site-a", "site-b"]]


def test_a_client_is_bound_to_the_key_of_its_certificate_and_the_list_shows_it(tmp_path: Path) -> None:
    pki, line = Pki.made(tmp_path / "pki"), keygen(tmp_path / "a.key")
    north, south = (pki.files(name).certificate for name in ("north", "south"))
    data("enroll", "site-a", "--public-key", line, "--certificate", north)
    (row,) = data("list")
    assert row["certificate_key_sha256"] == pki.key_sha256("north")
    assert pki.key_sha256("north")[:12] in clients("list").stdout
    told = data("certificate", "site-a", "--certificate", south, "--operator", "bob")
    assert told == {"client_id": "site-a", "certificate_key_sha256": pki.key_sha256("south")}
    with closing(open_reader()) as reader:
        assert reader.events()[-1].detail["operator"] == "bob"
    expired = Pki.expired(tmp_path / "expired").files("north").certificate
    refused(
        2,
        "is of role trunk; a client's must be",
        "certificate",
        "site-a",
        "--certificate",
        pki.files("trunk").certificate,
    )
    refused(2, "north.pem expired at", "certificate", "site-a", "--certificate", expired)
    refused(1, "client b is not enrolled", "certificate", "b", "--certificate", north)
    line = keygen(tmp_path / "b.key")
    refused(1, "is that of client site-a", "enroll", "b", "--public-key", line, "--certificate", south)
    assert [row["client_id"] for row in data("list")] == ["site-a"]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("enroll", "site-a", "--public-key", "LINE"), 1, "client site-a was enrolled on"),
        (("enroll", "site-b", "--public-key", "LINE"), 1, "is the key of client site-a"),
        (("enroll", "a/b", "--public-key", "LINE"), 2, "client id is 'a/b'"),
        (("enroll", "site-b", "--public-key", "ed25519:AAAA"), 2, "public key is of 3 bytes"),
        (("enroll", "site-b", "--public-key", "@HERE/a.key"), 2, "which must not leave its file"),
        (
            ("enroll", "site-b", "--public-key", "@HERE/none"),
            2,
            "cannot read the file of --public-key, HERE/none: No such file",
        ),
        (("enroll", "site-b", "--public-key", "LINE", "--operator", " "), 2, "--operator is empty"),
        (("enroll", "site-b", "--public-key", "LINE", "--roster", "r"), 2, "--roster and --signing-key go together"),
        (("revoke", "site-b", "--reason", "x", "--yes"), 1, "client site-b is not enrolled"),
        (("revoke", "site-a", "--reason", " ", "--yes"), 2, "--reason is empty"),
        (("revoke", "site-a", "--reason", "x"), 2, "there is no terminal to ask at: give --yes"),
        (("revoke", "site-a", "--yes"), 2, "Missing option '--reason'"),
        (("roster", "--out", "HERE/r", "--signing-key", "HERE/none"), 2, "cannot read the key file HERE/none"),
        (("roster", "--out", "HERE/no/r", "--signing-key", "HERE/a.key"), 2, "there is no directory HERE/no"),
    ],
)
def test_what_is_refused_has_its_reason_and_code_and_changes_nothing(
    tmp_path: Path, arguments: tuple[str, ...], code: int, told: str
) -> None:
    line = keygen(tmp_path / "a.key")
    data("enroll", "site-a", "--public-key", line)
    before = data("list", "--all")
    named = [argument.replace("LINE", line).replace("HERE", str(tmp_path)) for argument in arguments]
    done = clients(*named)
    assert done.exit_code == code, done.output
    assert told.replace("HERE", str(tmp_path)) in " ".join(done.stderr.replace("│", " ").split())
    assert done.stdout == ""
    assert (tmp_path / "a.key").read_text().splitlines()[1] not in done.output
    assert data("list", "--all") == before


@pytest.mark.parametrize(
    ("typed", "code", "left"), [("y\n", 0, []), ("n\n", 1, ["a"]), ("\n", 1, ["a"]), ("", 130, ["a"])]
)
def test_at_a_terminal_revoking_asks_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, code: int, left: list[str]
) -> None:
    monkeypatch.setattr(output, "has_terminal", lambda: True)
    data("enroll", "a", "--public-key", keygen(tmp_path / "a.key"))
    done = clients("revoke", "a", "--reason", "left", typed=typed)
    assert done.exit_code == code, done.output
    assert "Revoke client a for ever?" in done.stderr
    assert [row["client_id"] for row in data("list")] == left


def test_a_login_without_a_name_is_told_to_give_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(getpass, "getuser", nameless)
    line = keygen(tmp_path / "a.key")
    refused(2, "say who you are with --operator", "enroll", "a", "--public-key", line)
    assert clients("enroll", "a", "--public-key", line, "--operator", "ada").exit_code == 0


def test_listing_without_a_database_makes_none(tmp_path: Path) -> None:
    refused(1, "there is no Trunkline database", "list")
    assert not list(tmp_path.rglob("*.db"))


# ---- publishing ------------------------------------------------------------------------------------------------------


def test_the_published_roster_follows_enrolling_and_revoking(tmp_path: Path, signer: Path) -> None:
    roster, line = tmp_path / "roster", keygen(tmp_path / "a.key")
    publishing = ("--roster", roster, "--signing-key", signer)
    assert data("enroll", "a", "--public-key", line, *publishing)["published"] == str(roster)
    assert dict(signed(roster, signer).members) == {"a": parse_public_key(line)}
    data("enroll", "b", "--public-key", keygen(tmp_path / "b.key"))
    assert signed(roster, signer).version == 1
    told = data("roster", "--out", roster, "--signing-key", signer)
    assert (told["version"], told["members"]) == (2, 2)
    assert told["signer"] == clients("roster", "--out", roster, "--signing-key", signer).stdout.split()[-1]
    data("revoke", "a", "--reason", "left", "--yes", *publishing)
    assert (signed(roster, signer).version, list(signed(roster, signer).members)) == (3, ["b"])
    reader = open_reader()
    published = [entry for entry in reader.audit_log() if entry.action == "roster-published"]
    reader.close()
    assert [(entry.operator, entry.target, entry.detail["version"]) for entry in published] == [
        ("ada", str(roster), version) for version in (3, 2, 1)
    ], "what was published already is published once"


def test_publishing_once_more_leaves_the_file_as_it_is(tmp_path: Path, signer: Path) -> None:
    data("enroll", "a", "--public-key", keygen(tmp_path / "a.key"))
    data("roster", "--out", tmp_path / "roster", "--signing-key", signer)
    before = (tmp_path / "roster").stat().st_ino, (tmp_path / "roster").read_bytes()
    data("roster", "--out", tmp_path / "roster", "--signing-key", signer)
    assert ((tmp_path / "roster").stat().st_ino, (tmp_path / "roster").read_bytes()) == before


def test_before_anybody_is_enrolled_there_is_nothing_to_publish(tmp_path: Path, signer: Path) -> None:
    open_store().close()
    refused(2, "nobody was ever enrolled", "roster", "--out", tmp_path / "roster", "--signing-key", signer)
    assert not (tmp_path / "roster").exists()


def test_a_signing_key_that_others_can_read_signs_nothing_and_enrolls_nobody(tmp_path: Path, signer: Path) -> None:
    signer.chmod(0o644)
    line = keygen(tmp_path / "a.key")
    arguments = ("enroll", "a", "--public-key", line, "--roster", tmp_path / "roster", "--signing-key", signer)
    refused(2, f"run `chmod 600 {signer}`", *arguments)
    refused(1, "there is no Trunkline database", "list")


@pytest.mark.parametrize("version", [1, 9])
def test_an_older_database_publishes_nothing_over_a_newer_roster(tmp_path: Path, signer: Path, version: int) -> None:
    key = read_private_key(signer)
    public = key.public_key().public_bytes_raw()
    issued = datetime(2026, 1, 1, tzinfo=UTC)
    write_roster(tmp_path / "roster", Roster(version, issued, public, {"other": b"o" * 32}), key)
    before = (tmp_path / "roster").read_bytes()
    data("enroll", "a", "--public-key", keygen(tmp_path / "a.key"))
    publishing = ("--roster", tmp_path / "roster", "--signing-key", signer)
    told = f"is version {version} of another list than the database's version 1"
    refused(1, told, "roster", "--out", tmp_path / "roster", "--signing-key", signer)
    refused(1, told, "enroll", "b", "--public-key", keygen(tmp_path / "b.key"), *publishing)
    assert (tmp_path / "roster").read_bytes() == before
    assert [row["client_id"] for row in data("list")] == ["a"], "it was enrolled although it could not be published"


def test_a_file_that_is_no_roster_of_this_key_is_not_replaced(tmp_path: Path, signer: Path) -> None:
    data("enroll", "a", "--public-key", keygen(tmp_path / "a.key"))
    (tmp_path / "notes").write_text("mine")
    refused(2, "publish under another name", "roster", "--out", tmp_path / "notes", "--signing-key", signer)
    assert (tmp_path / "notes").read_text() == "mine"
    data("roster", "--out", tmp_path / "roster", "--signing-key", signer)
    keygen(tmp_path / "other.key")
    refused(2, "is not signed by", "roster", "--out", tmp_path / "roster", "--signing-key", tmp_path / "other.key")


def test_when_publishing_fails_after_enrolling_both_are_told(
    tmp_path: Path, signer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise StorageError("cannot write the roster: No space left on device")

    monkeypatch.setattr(publication, "write_roster", full)
    line = keygen(tmp_path / "a.key")
    done = clients("enroll", "a", "--public-key", line, "--roster", tmp_path / "roster", "--signing-key", signer)
    assert done.exit_code == 1
    assert "client a is enrolled, but the roster was not published" in done.stderr
    assert "No space left on device" in done.stderr
    assert [row["client_id"] for row in data("list")] == ["a"]


def test_who_publishes_meanwhile_waits_and_leaves_the_newest_roster(
    tmp_path: Path, signer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, store = Publication.at(tmp_path / "roster", signer), open_store()
    store.enroll_client("a", keygen(tmp_path / "a.key"), "ada")
    second = keygen(tmp_path / "b.key")
    waited: list[bool] = []

    def enroll_another() -> None:
        other: Store = open_store()
        other.enroll_client("b", second, "bob")
        place.publish(other, datetime.now(UTC), "bob")
        other.close()

    thread = threading.Thread(target=enroll_another)

    def write_slowly(*arguments: Any) -> None:
        monkeypatch.setattr(publication, "write_roster", write_roster)
        thread.start()
        thread.join(1)
        waited.append(thread.is_alive())
        write_roster(*arguments)

    monkeypatch.setattr(publication, "write_roster", write_slowly)
    assert place.publish(store, datetime.now(UTC), "ada").version == 1
    thread.join(60)
    store.close()
    assert waited == [True]
    assert (signed(place.path, signer).version, len(signed(place.path, signer).members)) == (2, 2)


def test_who_publishes_waits_for_no_process_that_never_ends(
    tmp_path: Path, signer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publication, "LOCK_WAIT_S", 0.2)
    data("enroll", "a", "--public-key", keygen(tmp_path / "a.key"))
    roster = tmp_path / "roster"
    hold = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print(flush=True); "
    argv = [sys.executable, "-c", hold + "sys.stdin.read()", str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"\n"
        told = f"the roster {roster} is not published: another process has held the lock of {tmp_path} for 0.2 s"
        refused(1, told, "roster", "--out", roster, "--signing-key", signer)
        assert not roster.exists()
        other.communicate()
    assert data("roster", "--out", roster, "--signing-key", signer)["version"] == 1


def test_a_publication_never_shows_its_key(tmp_path: Path, signer: Path) -> None:
    assert "signing_key" not in repr(Publication.at(tmp_path / "roster", signer))


# ---- secagg plan -----------------------------------------------------------------------------------------------------


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(secagg_app, ["plan", *arguments])


def test_a_small_cohort_is_planned_as_the_full_graph() -> None:
    told = json.loads(plan("--clients", "100", "-o", "json").stdout)["data"]
    assert (told["members"], told["degree"], told["threshold"], told["neighbourhood"]) == (100, 0, 67, 100)
    assert "any 33 of the 100 clients on its side" in told["stands_against"]
    assert "any 33 of the 100 clients in a round" in told["stands_losing"]
    assert told["but"] is None


def test_a_large_cohort_is_planned_as_a_ring_and_called_weaker() -> None:
    told = json.loads(plan("--clients", "1000", "-o", "json").stdout)["data"]
    assert told["degree"] > 0
    assert told["neighbourhood"] == told["degree"] + 1 < 2 * told["threshold"]
    assert "50 of the 1000 clients (5%)" in told["stands_against"]
    assert "2^-40" in told["stands_against"]
    assert "2^-20" in told["stands_losing"]
    assert "weaker than the full graph" in told["but"]


def test_a_cohort_below_the_clients_own_floor_says_so() -> None:
    assert "fewer than 10 unless its own node config allows them" in plan("--clients", "4").stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--clients", "1"), "1 is not in the range"),
        (("--clients", "20000"), "at most 16384 members"),
        (("--clients", "10", "--corrupt", "1"), "corrupt is 1.0; it must be a fraction"),
        (("--clients", "10", "--corrupt", "0.4"), "10 clients stand 3 on the server's side, not 4 (40%)"),
        (("--clients", "10", "--dropout", "0.5"), "10 clients can lose 3 in a round, not 5 (50%)"),
        (("--clients", "200", "--corrupt", "0.7"), "no graph of 200 members stands 70% corrupt"),
    ],
)
def test_what_nothing_stands_is_refused(arguments: tuple[str, ...], told: str) -> None:
    done = plan(*arguments)
    assert done.exit_code == 2
    assert told in " ".join(done.stderr.replace("│", " ").split())
