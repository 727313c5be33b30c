"""Flower's programs get an environment that works offline, on one machine, beside other runs."""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
from pathlib import Path

import pytest

from contract.config import ConfigValue, RunConfig
from contract.errors import ConfigError, ConnectionFailedError
from trunkline.bundle import stage_app
from trunkline.flower import SuperLinkAddress, flower_environment, node_config, simulation_config, submit
from trunkline.processes import Supervisor
from trunkline.workplace import open_workplace


def test_the_environment_is_offline_and_joins_nobodys_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "somebody:6379")
    monkeypatch.setenv("NO_PROXY", "intranet")
    environment = flower_environment(tmp_path, threads=3)
    assert "RAY_ADDRESS" not in environment
    assert environment["NO_PROXY"] == environment["no_proxy"] == "intranet,127.0.0.1,localhost"
    assert environment["OMP_NUM_THREADS"] == "3"
    assert shutil.which("flower-superexec", path=environment["PATH"]), "the SuperLink looks for it on the PATH"


def test_node_config_quotes_paths_with_spaces_as_flower_reads_them() -> None:
    from flwr.common.config import parse_config_args

    values: dict[str, ConfigValue] = {"data": "/my data/it's.jsonl", "model": '/odd "name"/m', "name": "site"}
    values |= {"secagg-min-members": 4, "privacy-epsilon": 8.0, "privacy-delta": 1e-6, "allow-secagg-off": True}
    assert parse_config_args([node_config(values)]) == values


@pytest.mark.parametrize("path", ["both ' and \" quotes", "back\\slash"])
def test_a_path_that_flower_cannot_carry_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="data is .* must not hold"):
        node_config({"data": path})


@pytest.mark.parametrize("address", ["superlink", "host:port", ":9093", "127.0.0.1:70000"])
def test_a_superlink_that_is_no_address_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="superlink is .*HOST:PORT"):
        submit(Supervisor(tmp_path), tmp_path, SuperLinkAddress(address))


def test_a_simulation_starts_no_more_workers_than_clients_or_cores() -> None:
    assert simulation_config(50, 2).endswith("num-supernodes=50 client-resources-num-cpus=1 init-args-num-cpus=2")
    assert simulation_config(2, 16).endswith("init-args-num-cpus=2")


def test_a_workplace_keeps_relative_places_and_leaves_no_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRUNKLINE_HOME", "here")
    monkeypatch.setenv("TRUNKLINE_DATABASE_URL", "sqlite:///runs.db")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with open_workplace(2) as workplace:
        environment = workplace.supervisor.environment
        assert workplace.directory.is_dir()
        assert len(str(workplace.directory)) < 45, "Ray's sockets need the rest"
    assert not workplace.directory.exists()
    assert environment["TRUNKLINE_HOME"] == str(tmp_path / "here")
    assert environment["TRUNKLINE_DATABASE_URL"] == f"sqlite:///{tmp_path}/runs.db"
    assert environment["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize("started", [True, False])
def test_logs_are_kept_only_where_something_that_ran_failed(capsys: pytest.CaptureFixture[str], started: bool) -> None:
    with pytest.raises(ValueError, match="broken"):  # noqa: PT012
        with open_workplace(1) as workplace:
            if started:
                workplace.supervisor.start("talker", ["echo", "hello"]).process.wait(10)
            raise ValueError("broken")
    assert workplace.directory.exists() is started
    assert (str(workplace.logs) in capsys.readouterr().err) is started
    shutil.rmtree(workplace.directory, ignore_errors=True)


def test_a_superlink_that_does_not_speak_as_told_is_a_connection_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute, open_workplace(1) as workplace:
        threading.Thread(target=hang_up, args=(mute,), daemon=True).start()
        app = stage_app(RunConfig(), workplace.directory / "app")
        with pytest.raises(ConnectionFailedError, match="cannot be talked to without TLS: give --root-certificates"):
            submit(workplace.supervisor, app, SuperLinkAddress(f"127.0.0.1:{mute.getsockname()[1]}"))


def hang_up(server: socket.socket) -> None:
    """Accept and close, as a server does that waits for a TLS greeting and gets none."""
    with contextlib.suppress(OSError):
        while True:
            server.accept()[0].close()
