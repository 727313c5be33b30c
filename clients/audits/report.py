"""An audit's report: report.json with everything, report.md to read, report.png to look at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from clients.audits.audit import AuditReport
from clients.audits.findings import CONTROL, Finding, ModeSettings
from contract.durable_file import replace_file
from contract.errors import ConfigError, StorageError
from contract.output import plain_data
from privacy.coverage import IN_WORDS

JSON_FILE, TEXT_FILE, PICTURE_FILE = "report.json", "report.md", "report.png"
NO_PICTURE = "no picture: matplotlib is not installed (pip install 'trunkline[audit]')"

_READABLE = 0o644


def require_writable(directory: Path) -> None:
    """Raise ConfigError where `directory` holds something else than an earlier report."""
    ours = {JSON_FILE, TEXT_FILE, PICTURE_FILE}
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is no directory; name one to write the report to")
    if directory.is_dir() and (others := sorted(path.name for path in directory.iterdir() if path.name not in ours)):
        raise ConfigError(f"{directory} holds {others[0]}, which is no audit's; name another directory")


def write_report(report: AuditReport, directory: Path) -> list[Path]:
    """The files written; the picture only where matplotlib is installed. Raises StorageError."""
    pictured = find_spec("matplotlib") is not None
    data = json.dumps(plain_data(report), indent=2, ensure_ascii=False) + "\n"
    files = {JSON_FILE: data.encode(), TEXT_FILE: text_of(report, pictured=pictured).encode()}
    if pictured:
        from clients.audits.picture import draw

        files[PICTURE_FILE] = draw(report)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            replace_file(directory / name, content, _READABLE)
        if not pictured:
            (directory / PICTURE_FILE).unlink(missing_ok=True)  # an earlier audit's
    except OSError as error:
        raise StorageError(f"cannot write the report to {directory}: {error.strerror or error}") from error
    return [directory / name for name in files]


def text_of(report: AuditReport, *, pictured: bool) -> str:
    """The report in Markdown."""
    parts = [
        "# What attacks found\n",
        f"{report.tokens} tokens in {report.rows} rows of `{report.data}`, model `{report.model}`. Attackers learned "
        f"from {', '.join(f'`{source}`' for source in report.auxiliary)}. Shares are in percent, with 95 % intervals "
        "over rows drawn anew. The best guesser knows all that the attacker knows, but for the wire or the adapter. An "
        "attack that finds nothing shows that this attack finds nothing; only an epsilon bounds them all.\n",
        f"![shares found, by attack and mode]({PICTURE_FILE})\n" if pictured else f"({NO_PICTURE})\n",
        "## Modes\n",
        *(_mode_lines(mode) for mode in report.modes),
        "\n## Controls\n\nWhere each attack must succeed. One that does not is broken, and shows nothing elsewhere.\n",
        _table([finding for finding in report.findings if finding.mode == CONTROL]),
    ]
    for mode in report.modes:
        parts += [f"\n## {mode.name}\n", _table([one for one in report.findings if one.mode == mode.name])]
    released = [one for one in report.findings if one.mode not in (CONTROL, *(mode.name for mode in report.modes))]
    if released:
        parts += ["\n## Released adapter\n", _table(released)]
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    parts.append(
        f"\nSeed {report.seed}; the noise is secret and was drawn anew. {report.seconds:.0f} s. Model fingerprint "
        f"`{report.fingerprint}`. {versions}.\n"
    )
    return "\n".join(parts)


def percent(finding: Finding, value: float) -> str:
    """A share as percent, bits as they are."""
    return f"{100 * value:.1f}" if finding.in_shares else f"{value:.2f}"


def summary_rows(report: AuditReport) -> list[dict[str, object]]:
    """The findings as a table for a terminal."""
    return [
        {
            "mode": one.mode,
            "attack": f"{one.attack}, {one.variant}",
            "measure": one.measure,
            "got": percent(one, one.value.value),
            "guesser": percent(one, one.guessed),
            "above": f"{percent(one, one.above.value)} ({percent(one, one.above.lower)} to "
            f"{percent(one, one.above.upper)})",
            "works": None if one.least is None else one.works,
        }
        for one in report.findings
    ]


def _mode_lines(mode: ModeSettings) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in mode.settings.items()) or "the defaults"
    spent = [f"epsilon {value:.3g} against {IN_WORDS[name]}" for name, value in mode.epsilon.items()]
    why = [f"none against {IN_WORDS[name]}: {reason}" for name, reason in mode.withheld.items()]
    sent = "once" if mode.passes == 1 else f"{mode.passes} times"
    return f"- **{mode.name}**: {settings}. Each row is sent {sent}. {'; '.join([*spent, *why])}."


def _table(findings: Sequence[Finding]) -> str:
    lines = ["| attack | measure | got | best guesser | above it | trials |", "|---|---|---|---|---|---|"]
    for one in findings:
        got = f"{percent(one, one.value.value)} ({percent(one, one.value.lower)} to {percent(one, one.value.upper)})"
        verdict = (
            "" if one.least is None else f", needs {percent(one, one.least)}: {'works' if one.works else 'BROKEN'}"
        )
        above = f"{percent(one, one.above.value)} ({percent(one, one.above.lower)} to {percent(one, one.above.upper)})"
        guesser = f"{percent(one, one.guessed)}: {one.guesser}"
        lines.append(
            f"| {one.attack}, {one.variant} | {one.measure} | {got}{verdict} | {guesser} | {above} | "
            f"{one.trials} {one.unit} |"
        )
    return "\n".join(lines)
