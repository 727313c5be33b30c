"""What a run's privacy modes cover: each channel by itself, what nothing covers, and whom an epsilon may be told of.

An epsilon is always told with its adversary, and withheld where that adversary sees a channel that nothing prices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from contract.config import RunConfig
from contract.privacy_records import ADVERSARIES, Adversary, Channel, PricedRelease

How = Literal["not sent", "unpriced", "priced", "post-processing of the wire"]

IN_WORDS: Mapping[Adversary, str] = {
    "holder": "who holds the released adapter",
    "orchestrator": "the orchestrator and the other clients",
    "trunk": "the trunk",
}
READS_TEXT = "the server can read the text"

ASSUMPTIONS: tuple[str, ...] = (
    "the orchestrator and the trunk do not pool what they see: together they have both epsilons and all that is "
    "unpriced, and the sampling of rows is no secret",
    "every site runs this code: in Flower it comes with the run",
    "noise is drawn in floating point: its distribution is the claimed one to the float's precision, not exactly",
    "settings, clips above all, were chosen without looking at the sites' text",
)
"""What every epsilon rests on, whatever the settings."""

_ALWAYS_SEEN = (
    "timing: when a site answers, and how long it takes",
    "who takes part, in which rounds, and who drops out",
    "the kind of a failure, where a site fails",
)


@dataclass(frozen=True, slots=True)
class Covered:
    """How a channel is covered, who sees it, and why in one line."""

    channel: Channel
    how: How
    seen_by: tuple[Adversary, ...]
    note: str


def coverage(config: RunConfig) -> tuple[Covered, ...]:
    """Every channel of a run with these settings, in the order of `CHANNELS`."""
    return (*_wire(config), _trunk_adapter(config), _adapter_sum(config), _metrics(config))


def withheld(config: RunConfig, adversary: Adversary) -> str | None:
    """Why no epsilon is told against `adversary`; None where one is."""
    if config.dp == "off" and adversary != "trunk":
        return "dp is off: nothing is priced"
    unpriced = [covered for covered in coverage(config) if covered.how == "unpriced" and adversary in covered.seen_by]
    return unpriced[0].note if unpriced else None


def withheld_by_rows(releases: Iterable[PricedRelease], adversary: Adversary) -> str | None:
    """As `withheld`, where a run's charges are known and its settings are not: what they leave open is withheld."""
    priced_for_trunk = {release.channel for release in releases if "trunk" in release.views}
    if {"wire_forward", "wire_backward"} <= priced_for_trunk or adversary == "holder":
        return None  # a run whose wire is priced tells no losses
    if adversary == "trunk":
        return "what it is sent over the wire was not charged for"
    return "whether losses and counts were told is not in these rows"


def uncovered(config: RunConfig) -> tuple[str, ...]:
    """What no mechanism of a run with these settings covers, then what its epsilons assume: plain lines."""
    padded = config.wire == "dp" and config.wire_length_bucket == config.max_length
    lines = [] if padded else [_lengths(config)]
    lines += [_batches(config), *_ALWAYS_SEEN]
    return (*lines, *(f"assumed: {line}" for line in _assumed(config)))


def _assumed(config: RunConfig) -> list[str]:
    if config.dp == "off":
        return []
    lines = list(ASSUMPTIONS)
    if config.metrics == "sum":
        lines.append("which round's adapter is released was not chosen by the losses, which nothing prices")
    if config.dp == "client":
        lines.append(
            f"at most {config.dp_colluders} of a sum's clients tell the orchestrator their noise (dp-colluders)"
        )
        lines.append(
            "the trunk answers each client from that client alone: one that mixes clients, or remembers, lets one's "
            "text reach the others' updates"
        )
    elif _trunk_is_trusted(config):
        lines.append(
            "the trunk computes rows apart and keeps no memory between batches: one that mixes them lets a row reach "
            "another's gradient"
        )
    if config.dp == "example" and config.dp_gradients == "ghost":
        lines.append("no row's tokens all but cancel in its gradient: ghost norms are float32 sums of products")
    return lines


def _trunk_is_trusted(config: RunConfig) -> bool:
    """Whether an epsilon at example level rests on a trunk that answers each row from that row alone.

    Noise on the wire does not make it needless: the price of a row in the adapters' sum is that of its own gradient,
    drawn in secret, and a trunk that mixes carries it, noised, into the others'. Only where everybody is charged for
    the noised rows as the trunk sees them (a trained trunk behind a noised wire) is all that such a trunk can do
    post-processing of what was paid for.
    """
    return config.wire != "dp" or config.trunk_adapter == "frozen"


def adjacency_in_words(config: RunConfig, adversary: Adversary) -> str:
    """Between what an epsilon against `adversary` hides the difference."""
    if config.dp == "client":
        return "all of a client's text, absent or present"
    if adversary == "trunk":
        return "one row of a client's text, or another in its place"
    return "one row of a client's text, absent or present"


def told_privacy(config: RunConfig, epsilon: Mapping[Adversary, float]) -> list[str]:
    """A line for each adversary: the epsilon that was spent against it, or why none is told."""
    lines = []
    for adversary in ADVERSARIES:
        why = withheld(config, adversary)
        if why is not None:
            lines.append(f"{IN_WORDS[adversary]}: no epsilon: {why}")
        else:
            lines.append(
                f"epsilon {epsilon.get(adversary, 0.0):.3g} at delta {config.dp_delta:g} for {IN_WORDS[adversary]} "
                f"({adjacency_in_words(config, adversary)})"
            )
    return lines


def _wire(config: RunConfig) -> tuple[Covered, Covered]:
    values: dict[Channel, str] = {"wire_forward": "hidden states", "wire_backward": "gradients at the tail cut"}
    rows = []
    for channel, what in values.items():
        if config.wire == "dp":
            seers: tuple[Adversary, ...] = ("trunk",)
            if config.trunk_adapter == "trained":
                seers = ("holder", "orchestrator", "trunk")
            note = f"{what}: each row clipped and noised, at most {config.wire_releases} times a round"
            rows.append(Covered(channel, "priced", seers, note))
        elif config.wire == "empirical":
            note = "noise or masking on the wire is measured by `trunkline audit run`, and has no price"
            rows.append(Covered(channel, "unpriced", ("trunk",), note))
        else:
            rows.append(Covered(channel, "unpriced", ("trunk",), READS_TEXT))
    return rows[0], rows[1]


def _trunk_adapter(config: RunConfig) -> Covered:
    seers: tuple[Adversary, ...] = ("holder", "orchestrator", "trunk")
    if config.trunk_adapter == "frozen":
        return Covered("trunk_adapter", "not sent", (), "the trunk's half stays as it began")
    if config.wire == "dp":
        note = "learned from noised rows alone"
        return Covered("trunk_adapter", "post-processing of the wire", seers, note)
    return Covered("trunk_adapter", "unpriced", seers, "the trunk's half is learned from rows in clear")


def _adapter_sum(config: RunConfig) -> Covered:
    seers: tuple[Adversary, ...] = ("holder", "orchestrator")
    if config.dp == "off":
        return Covered("adapter_sum", "unpriced", seers, "the average of head and tail has no noise")
    if config.dp == "client":
        note = "clients' updates clipped, summed with Skellam noise shares"
        return Covered("adapter_sum", "priced", seers, note)
    if config.wire == "dp":
        note = "DP-SGD at the client; what it learns from a row shows in the rows that are sent later"
        return Covered("adapter_sum", "priced", (*seers, "trunk"), note)
    return Covered("adapter_sum", "priced", seers, "DP-SGD at the client: rows' gradients clipped and noised")


def _metrics(config: RunConfig) -> Covered:
    if config.metrics == "off":
        return Covered("metrics", "not sent", (), "no losses and no counts are told")
    return Covered("metrics", "unpriced", ("orchestrator",), "totals of losses and counts have no noise")


def _lengths(config: RunConfig) -> str:
    if config.wire_length_bucket and config.wire != "dp":
        return "how long each row is: in hidden states that are not noised, padding can be told from text"
    if config.wire_length_bucket:
        return f"how long each row is, in steps of {config.wire_length_bucket} tokens: the trunk sees it"
    return "how long each row is: the trunk sees it"


def _batches(config: RunConfig) -> str:
    if config.dp == "example":
        return "batch sizes, Poisson draws independent of what rows say, and so about how many rows a client has"
    return "batch sizes and how many tokens each client trains on: the trunk sees them"
