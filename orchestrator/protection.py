"""What a run's settings protect, in the words that every listing shows: its secure sums and its privacy modes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from aggregation.graph import plan_graph
from aggregation.terms import DEFAULT_MIN_MEMBERS, Policy
from contract.config import RunConfig
from contract.privacy_records import ADVERSARIES, Adversary, Unit
from privacy.accountant import epsilon, spent
from privacy.coverage import IN_WORDS, READS_TEXT, coverage, told_privacy, uncovered
from privacy.plan import register_budget
from storage.ledger import Ledger
from storage.reader import Reader
from storage.records import Account, RunRow

SPENT_BY_ONE_RUN = "that is by this run alone: `trunkline budget show` has what each client spent in all"


def told_protection(reader: Reader, run: RunRow) -> str:
    """`OFF`, or the smallest secure sum of the run, with a warning where it is below a site's own default floors."""
    if run.config.get("secagg", "off") != "on":  # runs of before there were secure sums say nothing
        return "OFF: each client's update was seen"
    sums = reader.secure_sums(run.run_id)
    if not sums:
        return "on"
    members, threshold = min(sums)
    told = [f"on: {members} clients, {threshold} needed"]
    if members < DEFAULT_MIN_MEMBERS:
        told.append(f"SMALL: below the default floor of {DEFAULT_MIN_MEMBERS} clients")
    low = [(over, needed) for over, needed in sums if needed < _default_threshold(over)]
    if low:
        over, needed = min(low)
        told.append(f"LOW: {needed} of {over}, below the default threshold of {_default_threshold(over)}")
    return "; ".join(told)


def told_coverage(config: RunConfig) -> list[str]:
    """What the trunk can read, each channel that a priced run has, and what nothing covers: a line each."""
    covered = {one.channel: one for one in coverage(config)}
    lines = [f"wire privacy is {config.wire}: {covered['wire_forward'].note}"]
    if config.dp == "off":
        return lines
    for channel, one in covered.items():
        seen = f", seen by {', '.join(IN_WORDS[name] for name in one.seen_by)}" if one.seen_by else ""
        lines.append(f"{channel}: {one.how}{seen}: {one.note}")
    return lines + [f"not covered: {line}" for line in uncovered(config)]


def told_spent(config: RunConfig, accounts: Iterable[Account]) -> list[str]:
    """The most that a unit spent in the run that `accounts` are of, by adversary, or why none is told: a line each."""
    lines = told_privacy(config, most_spent(config, accounts))
    return lines if config.dp == "off" else [*lines, SPENT_BY_ONE_RUN]


def most_spent(config: RunConfig, accounts: Iterable[Account]) -> dict[Adversary, float]:
    """The epsilon of the unit that spent the most in the run that `accounts` are of, by adversary.

    May it be told? `privacy.coverage.withheld` says so. Empty without differential privacy.
    """
    counted: defaultdict[Unit, dict[str, int]] = defaultdict(dict)
    for one in accounts:
        counted[one.unit][one.release] = one.count
    most: dict[Adversary, float] = {}
    if config.dp != "off":
        budget = register_budget(config)
        for releases in counted.values():
            for adversary in ADVERSARIES:
                found = epsilon(spent(releases, adversary, budget.order), budget, adversary)
                most[adversary] = max(most.get(adversary, 0.0), found)
    return most


def told_run_privacy(run: RunRow, ledger: Ledger) -> list[str]:
    """As told_spent, of a run in SQL; of one without differential privacy, what the trunk can read."""
    if run.config.get("dp", "off") == "off":  # runs of before there were such settings say nothing
        wire = run.config.get("wire", "off")
        said = READS_TEXT if wire == "off" else "no epsilon; `trunkline audit run` measures what the server can read"
        return [f"wire privacy is {wire}: {said}", "dp is off: nothing of the run has an epsilon"]
    config = RunConfig.from_flower(run.config)
    return told_spent(config, ledger.accounts(run.run_id))


def _default_threshold(members: int) -> int:
    policy = Policy()
    return plan_graph(members, policy.corrupt, policy.dropout).threshold
