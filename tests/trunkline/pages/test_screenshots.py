"""Makes the pictures of docs/dashboard.md from real runs: one that is killed and resumed, one with privacy budgets.

`make screenshots` runs it; it writes docs/dashboard.png and docs/report.png.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from demo.settings import MODEL_DIR
from storage.records import RoundRow
from storage.store import has_database, open_reader
from tests.trunkline.pages.conftest import Browser, Dashboard, until
from tests.trunkline.test_run import of_home, runs
from trunkline.project import write_project

DOCS = Path(__file__).parents[3] / "docs"
CLIENTS, ROUNDS = 5, 6
MOST_BYTES = 300_000
SETTINGS = (
    f'model="{MODEL_DIR}" data="stdlib:{{partition}}" num-rounds={ROUNDS} quorum=4 local-steps=6 max-length=64 '
    "per-device-train-batch-size=4 eval-fraction=0.02 eval-batches=2 learning-rate=5e-3 lora-r=8 threads=1"
)
PRIVATE = 'dp="client" trunk-adapter="frozen" dp-noise-multiplier=4.0 dp-clip=0.02 dp-epsilon=8.0 num-rounds=4'
LIMIT_S = 1500.0
TRIES = 4


def newest(url: str) -> list[RoundRow]:
    """The attempts of the newest run."""
    if not has_database(url):
        return []
    with closing(open_reader(url)) as reader:
        return reader.rounds(reader.list_runs(1)[0].run_id) if reader.list_runs(1) else []


def stands(url: str, committed: int) -> bool:
    """Whether the round after so many committed ones is under way, with bytes or replies to show for it."""
    attempts = newest(url)
    done = sum(one.status == "committed" for one in attempts)
    return done >= committed and attempts[-1].status == "open" and attempts[-1].phase == "training"


def under_way(
    begin: Callable[[], subprocess.Popen[str]], log: Path, reached: Callable[[], bool]
) -> subprocess.Popen[str]:
    """A command that got so far; begun anew where Flower's engine did not come up, as on a machine that is busy."""
    for _ in range(TRIES):
        command = begin()
        until("a run under way", lambda started=command: reached() or started.poll() is not None, LIMIT_S)
        if command.poll() is None:
            return command
        assert "simulation engine crashed" in log.read_text(), log.read_text()
    raise AssertionError(f"Flower's engine did not come up in {TRIES} tries: {log.read_text()}")


@pytest.mark.screenshots
@pytest.mark.timeout(3 * LIMIT_S)
def test_the_pictures_of_the_docs_are_made_from_a_real_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start: Callable[..., subprocess.Popen[str]],
    dashboard: Callable[..., Dashboard],
    browser: Browser,
) -> None:
    home, url = tmp_path / "shown", f"sqlite:///{tmp_path / 'shown' / 'trunkline.db'}"
    project = tmp_path / "project"
    write_project(project)
    log, way = tmp_path / "shown.log", ("--simulate", str(CLIENTS))
    run = ("shown", "run", str(project), *way, "-c", SETTINGS)
    simulated = under_way(lambda: start(*run), log, lambda: stands(url, 2))
    family = of_home(home)
    simulated.send_signal(signal.SIGKILL)
    simulated.wait(60)
    until("the killed run's processes", lambda: not any(runs(process) for process in family))

    monkeypatch.setenv("TRUNKLINE_HOME", str(home))
    board = dashboard()
    resumed = under_way(lambda: start("shown", "runs", "resume", "--last", *way), log, lambda: stands(url, 4))
    with closing(open_reader(url)) as reader:
        run_id = reader.get_run("last").run_id
    browser.open(f"{board.url}runs/{run_id}", dark=True)
    until("the page to ask again", lambda: bool(browser.text("#checked")))
    browser.picture(DOCS / "dashboard.png", height=below(browser, "#time .legend"))

    assert resumed.wait(LIMIT_S) == 0, log.read_text()
    with closing(open_reader(url)) as reader:
        assert [one.status for one in reader.rounds(run_id)].count("committed") == ROUNDS
        assert any(one.status == "aborted" for one in reader.rounds(run_id))
        assert any(event.kind == "resumed" for event in reader.events(run_id))

    private = under_way(lambda: start(*run, "-c", PRIVATE), log, lambda: stands(url, 2))
    assert private.wait(LIMIT_S) == 0, log.read_text()
    browser.open(Path(report(home)["report"]).as_uri())
    assert len(browser.run("return document.querySelectorAll('#spent-in-run tbody tr')")) == CLIENTS
    browser.picture(DOCS / "report.png", height=below(browser, "#privacy"))  # below it this machine names its paths
    for name in ("dashboard.png", "report.png"):
        assert (DOCS / name).stat().st_size < MOST_BYTES, name


def below(browser: Browser, selector: str) -> int:
    """Just below an element, in pixels from the page's top."""
    script = "return document.querySelector(arguments[0]).getBoundingClientRect().bottom + scrollY"
    return int(browser.run(script, selector)) + 12


def report(home: Path) -> dict[str, str]:
    command = [sys.executable, "-m", "trunkline", "runs", "report", "--last", "-o", "json"]
    environment = {**os.environ, "TRUNKLINE_HOME": str(home)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    told: dict[str, str] = json.loads(done.stdout)["data"]
    return told
