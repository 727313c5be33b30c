"""`trunkline audit run` as a user calls it: a report, an exit code for CI, and clear words for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.clients.sites import save_site_model, write_texts
from trunkline.audit import app


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model, a site's text and public text like it, as options."""
    folder = tmp_path_factory.mktemp("audited")
    model = save_site_model(folder / "model")
    own, public = (write_texts(folder / f"{seed}.jsonl", rows, seed=seed) for seed, rows in ((1, 60), (2, 400)))
    options = ["--model", str(model), "--data", str(own), "--auxiliary", str(public), "--tokens", "200"]
    return [*options, "-c", "max-length=16 head-layers=1 tail-layers=1"]


def audited(sources: list[str], out: Path, *more: str) -> Result:
    return CliRunner().invoke(app, ["run", *sources, "--attacks", "inversion,labels", "--out", str(out), *more])


def test_a_wire_that_is_off_fails_the_check_and_leaves_a_report(sources: list[str], tmp_path: Path) -> None:
    done = audited(sources, tmp_path / "report", "--fail-above", "2")
    assert done.exit_code == 1
    assert "points or more above the best guesser; at most 2 are allowed" in done.output
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {found["attack"] for found in report["findings"]} == {"inversion", "labels"}
    assert {found["mode"] for found in report["findings"]} == {"control", "wire off, dp off"}
    assert (tmp_path / "report" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "# What attacks found" in (tmp_path / "report" / "report.md").read_text()


def test_noise_passes_the_check_that_clear_text_fails(sources: list[str], tmp_path: Path) -> None:
    private = 'dp: wire="dp" dp="example" metrics="off" trunk-adapter="frozen" num-rounds=1'
    noise = " wire-noise-multiplier=8.0 dp-noise-multiplier=8.0 wire-length-bucket=16"
    done = audited(sources, tmp_path / "report", "--fail-above", "2", "--mode", private + noise)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--attacks", "magic"], "--attacks has 'magic'; it must be some of enumeration, inversion, labels"),
        (["--mode", "nonsense"], "--mode is 'nonsense'; it must be 'NAME: KEY=VALUE ...'"),
        (["--adapter", "somewhere", "--attacks", "membership"], "--adapter needs --members and --nonmembers"),
        (["--data", "{partition}.jsonl"], "an audit needs one site's text"),
        (["-c", 'wire="loud"'], "wire is 'loud'; it must be off or empirical or dp"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_attacked(
    sources: list[str], tmp_path: Path, more: list[str], told: str
) -> None:
    done = audited(sources, tmp_path / "report", *more)
    assert done.exit_code == 2
    assert told in " ".join(done.output.split())
    assert not (tmp_path / "report").exists()


def test_a_folder_that_is_no_audits_is_left_alone(sources: list[str], tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    done = audited(sources, tmp_path)
    assert done.exit_code == 2
    assert "holds letters.txt, which is no audit's" in done.output
