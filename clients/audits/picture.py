"""The report's picture: what each attack got, in each mode, beside the best guesser. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from clients.audits.audit import AuditReport
from clients.audits.findings import CONTROL, WIRE_ATTACKS, Finding

# Told apart in grey and by the colour-blind (Okabe and Ito).
_COLOURS = ("#999999", "#D55E00", "#E69F00", "#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#F0E442")
_BAR_INCHES, _GAP_INCHES, _FRAME_INCHES = 0.2, 0.2, 1.9
_DPI = 150


def draw(report: AuditReport) -> bytes:
    """PNG. One panel for what is on the wire, one for the adapter; those of which there is something."""
    modes = list(dict.fromkeys(one.mode for one in report.findings))
    panels = [
        ("What the trunk is sent: share found (%)", _shown(report.findings, wire=True)),
        ("The released adapter: AUC (%)", _shown(report.findings, wire=False)),
    ]
    panels = [(title, findings) for title, findings in panels if findings]
    inches = [len(_attacks(found)) * (len(modes) * _BAR_INCHES + _GAP_INCHES) for _, found in panels]
    figure = Figure(figsize=(9.5, sum(inches) + _FRAME_INCHES * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": inches})[:, 0]
    for axis, (title, findings) in zip(axes, panels, strict=True):
        _draw_panel(axis, title, findings, modes)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(f"Attacks on {report.data}, {report.tokens} tokens; 95 % intervals", fontsize=11)
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=_DPI)
    return written.getvalue()


def _shown(findings: Sequence[Finding], *, wire: bool) -> list[Finding]:
    return [one for one in findings if (one.attack in WIRE_ATTACKS) == wire and (wire or one.measure == "AUC")]


def _attacks(findings: Sequence[Finding]) -> list[str]:
    """Attacks with their variants; what an attacker chose for itself in each mode is left out of the name."""
    return list(dict.fromkeys(_label(one) for one in findings))


def _label(finding: Finding) -> str:
    return f"{finding.attack}:\n{finding.variant.partition(':')[0]}"


def _draw_panel(axis: Axes, title: str, findings: Sequence[Finding], modes: Sequence[str]) -> None:
    names = _attacks(findings)
    step = len(modes) + _GAP_INCHES / _BAR_INCHES
    for number, mode in enumerate(modes):
        found = [one for one in findings if one.mode == mode]
        places = [names.index(_label(one)) * step + number for one in found]
        colour = _COLOURS[number % len(_COLOURS)]
        label = "control: where each must succeed" if mode == CONTROL else mode
        values = [100 * one.value.value for one in found]
        axis.barh(places, values, height=0.9, color=colour, label=label)
        below = [100 * (one.value.value - one.value.lower) for one in found]
        over = [100 * (one.value.upper - one.value.value) for one in found]
        axis.errorbar(values, places, xerr=[below, over], fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5)
        guessed = [100 * one.guessed for one in found]
        guesser = "best guesser without it" if number == 0 else None
        axis.scatter(guessed, places, marker="|", s=110, color="black", linewidths=2.2, label=guesser, zorder=3)
        for place, one in zip(places, found, strict=True):
            axis.text(103, place, f"{100 * one.value.value:.1f}", va="center", ha="left", fontsize=7.5)
    axis.set_yticks([index * step + (len(modes) - 1) / 2 for index in range(len(names))], names, fontsize=9)
    axis.set_ylim(len(names) * step - 1, -1)
    axis.set_xlim(0, 110)
    axis.set_xticks(range(0, 101, 20))
    axis.set_title(title, loc="left", fontsize=10)
    axis.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_bounds(0, 100)
    axis.tick_params(axis="y", length=0)
