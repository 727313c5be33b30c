"""The house's rules for every command there is: what emits data, lists, moves, changes or destroys has its options."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from contract.identity import public_key_text
from server_trunk.server import ServeOptions
from storage.artifacts import ArtifactStore
from storage.store import open_reader, open_store
from tests.server_trunk.conftest import CUT, RunningTrunk, running, save_llama
from trunkline.cli import app, commands

SERVES = {"trunk serve", "dashboard"}
"""They run until they are told to end, and emit no data."""
LISTS = {"runs list", "rounds list", "adapter list", "clients list", "trunk sessions", "db log"}
MOVES = {"budget show", "rounds show", *LISTS}
DESTROYS = {
    "runs stop": ("--last",),
    "clients revoke": ("ward", "--reason", "left"),
    "db gc": (),
    "db restore": ("BACKUP",),
    "trunk drain": ("TRUNK",),
}
"""With arguments by which each would destroy something in the home that the tests make."""
CHANGES = {
    *DESTROYS,
    *(
        "runs resume",
        "clients enroll",
        "clients certificate",
        "clients roster",
        "budget set",
        "adapter export",
        "db upgrade",
        "db backup",
    ),
}
NAMES_OF_DESTRUCTION = {"stop", "revoke", "gc", "restore", "drain", "delete", "remove", "purge", "reset", "abort"}


def leaves() -> Iterator[tuple[str, click.Command]]:
    """Every command that can be run, by the words that run it."""
    waiting: list[tuple[str, click.Command]] = list(commands())
    while waiting:
        name, command = waiting.pop(0)
        if isinstance(command, click.Group):
            waiting += [(f"{name} {child}", below) for child, below in command.commands.items()]
        else:
            yield name, command


TREE = dict(leaves())
EVERY = pytest.mark.parametrize("name", TREE)


def options(name: str) -> set[str]:
    return {flag for one in TREE[name].params if isinstance(one, click.Option) for flag in one.opts}


@EVERY
def test_every_command_and_each_of_its_parameters_says_what_it_is(name: str) -> None:
    command = TREE[name]
    assert command.help, f"{name} has no help"
    assert command.help.strip()
    for parameter in command.params:
        assert (getattr(parameter, "help", None) or "").strip(), f"{name}: {parameter.name} has no help"
    shown = CliRunner().invoke(app, [*name.split(), "--help"])
    assert shown.exit_code == 0, shown.output


@EVERY
def test_every_command_that_emits_data_has_an_output_format(name: str) -> None:
    assert ({"-o", "--output"} <= options(name)) == (name not in SERVES)


@pytest.mark.parametrize("name", sorted(LISTS))
def test_lists_are_bounded_and_begin_at_a_moment(name: str) -> None:
    assert {"--limit", "--since"} <= options(name)


def test_whatever_is_called_a_list_is_one() -> None:
    assert {name for name in TREE if name.split()[-1] == "list"} <= LISTS


@pytest.mark.parametrize("name", sorted(MOVES))
def test_what_moves_can_be_watched(name: str) -> None:
    assert "--watch" in options(name)


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_what_changes_anything_names_its_operator(name: str) -> None:
    assert "--operator" in options(name)


@pytest.mark.parametrize("name", sorted(DESTROYS))
def test_what_destroys_can_be_tried_and_must_be_agreed_to(name: str) -> None:
    assert {"--yes", "--dry-run"} <= options(name)


def test_whatever_sounds_like_destruction_is_among_what_destroys() -> None:
    assert {name for name in TREE if name.split()[-1] in NAMES_OF_DESTRUCTION} == set(DESTROYS)


@EVERY
def test_yes_and_dry_run_are_called_so_everywhere(name: str) -> None:
    assert not options(name) & {"--force", "-f", "--assume-yes", "--no-confirm", "--check", "--plan"}
    assert ("--yes" in options(name)) <= ("--dry-run" in options(name))


# ---- what destroys, where there is something to destroy --------------------------------------------------------------


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningTrunk]:
    made = tmp_path_factory.mktemp("trunk")
    model = save_llama(made / "model")
    with running(ServeOptions(str(model), CUT, "127.0.0.1:0", made / "state", device="cpu", batch_tokens=512)) as begun:
        yield begun


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a running run, an enrolled client, an adapter that nothing names, and a backup of all that."""
    home = tmp_path / "home"
    monkeypatch.setenv("TRUNKLINE_HOME", str(home))
    monkeypatch.delenv("TRUNKLINE_DATABASE_URL", raising=False)
    store, artifacts = open_store(), ArtifactStore(home / "artifacts")
    store.create_run("r1", "7", {"num-rounds": 3}, "simulation", "f" * 64)
    store.add_adapter_version("r1", 0, artifacts.put(b"client"), artifacts.put(b"trunk"))
    key = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    store.enroll_client("ward", public_key_text(key), "ada")
    store.close()
    orphan = artifacts.path(artifacts.put(b"an orphan"))
    long_ago = time.time() - 10 * 86_400
    os.utime(orphan, (long_ago, long_ago))
    assert CliRunner().invoke(app, ["db", "backup", str(tmp_path / "backup")]).exit_code == 0
    return home


def destroying(name: str, *more: str, tmp_path: Path, trunk: RunningTrunk, monkeypatch: pytest.MonkeyPatch) -> Result:
    places = {"BACKUP": str(tmp_path / "backup"), "TRUNK": trunk.address}
    if name == "db restore":
        monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "new home"))
    return CliRunner().invoke(app, [*name.split(), *(places.get(one, one) for one in DESTROYS[name]), *more])


def standing(tmp_path: Path, trunk: RunningTrunk, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """All that one of the commands could have destroyed, and the log of what operators did."""
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "home"))
    reader = open_reader()
    try:
        return [
            reader.get_run("last").status,
            reader.list_identities(),
            sorted(path.name for path in (tmp_path / "home" / "artifacts").iterdir()),
            (tmp_path / "new home" / "trunkline.db").exists(),
            trunk.server.told_to_end.is_set(),
            reader.audit_log(),
        ]
    finally:
        reader.close()


@pytest.mark.parametrize("name", sorted(DESTROYS))
def test_what_destroys_is_refused_without_a_terminal_and_changes_nothing(
    name: str, home: Path, tmp_path: Path, trunk: RunningTrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = standing(tmp_path, trunk, monkeypatch)
    done = destroying(name, tmp_path=tmp_path, trunk=trunk, monkeypatch=monkeypatch)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert "there is no terminal to ask at: give --yes" in done.stderr
    assert standing(tmp_path, trunk, monkeypatch) == before


@pytest.mark.parametrize("name", sorted(DESTROYS))
def test_a_dry_run_says_what_it_would_do_and_changes_nothing(
    name: str, home: Path, tmp_path: Path, trunk: RunningTrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = standing(tmp_path, trunk, monkeypatch)
    done = destroying(name, "--dry-run", tmp_path=tmp_path, trunk=trunk, monkeypatch=monkeypatch)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip()
    assert "would be" in done.stderr
    assert standing(tmp_path, trunk, monkeypatch) == before


@pytest.mark.parametrize("name", sorted(DESTROYS.keys() - {"trunk drain"}))
def test_with_yes_it_is_done_and_the_log_names_who_did_it(
    name: str, home: Path, tmp_path: Path, trunk: RunningTrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = standing(tmp_path, trunk, monkeypatch)
    done = destroying(name, "--yes", "--operator", "eve", tmp_path=tmp_path, trunk=trunk, monkeypatch=monkeypatch)
    assert done.exit_code == 0, done.output
    reader = open_reader()
    assert reader.audit_log(1)[0].operator == "eve"
    reader.close()
    assert standing(tmp_path, trunk, monkeypatch)[:-1] != before[:-1]
