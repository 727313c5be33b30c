"""The processes of one simulation as the system has them: which of them is what, and how much each holds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

MIB = 1 << 20


@dataclass(frozen=True)
class Reading:
    """What a process holds at one moment of the soak."""

    at_s: float
    rss_mib: float
    files: int


def of_home(home: Path) -> list[psutil.Process]:
    """Every process that runs for this home, but for those that this one started itself."""
    return [one for one in carrying(home) if not _is_child(one)]


def carrying(home: Path) -> list[psutil.Process]:
    """Every process whose TRUNKLINE_HOME it is, and that is no zombie."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TRUNKLINE_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def role(process: psutil.Process) -> str:
    """What a process is: orchestrator, client, superlink, or anything else that Ray and Flower start."""
    try:
        said = " ".join(process.cmdline())
    except psutil.Error:
        return "gone"
    if said.startswith("ray::"):
        return "client"
    if "flower-superlink" in said:
        return "superlink"
    if "flwr-simulation" in said or "flower-simulation" in said:
        return "orchestrator"
    if "raylet/raylet" in said:
        return "ray"
    return "other"


def those(home: Path, what: str) -> list[psutil.Process]:
    return [process for process in carrying(home) if role(process) == what]


def reading(process: psutil.Process, at_s: float) -> Reading | None:
    """None where it is gone."""
    try:
        return Reading(at_s, process.memory_info().rss / MIB, process.num_fds())
    except psutil.Error:
        return None


def kill(process: psutil.Process) -> bool:
    """Without a goodbye; whether it was there."""
    try:
        process.kill()
    except psutil.Error:
        return False
    return True


def _is_child(process: psutil.Process) -> bool:
    try:
        return process.ppid() == os.getpid()
    except psutil.Error:
        return False
