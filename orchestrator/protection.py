"""What a run's settings protect, in the words that every listing shows: its secure sums and its privacy modes."""

from __future__ import annotations

from aggregation.graph import plan_graph
from aggregation.terms import DEFAULT_MIN_MEMBERS, Policy
from contract.config import RunConfig
from privacy.coverage import IN_WORDS, coverage, uncovered
from storage.reader import Reader
from storage.records import RunRow


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


def _default_threshold(members: int) -> int:
    policy = Policy()
    return plan_graph(members, policy.corrupt, policy.dropout).threshold
