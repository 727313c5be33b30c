"""`trunkline runs`: the commands that need SQL alone, and those that start or watch something."""

from orchestrator.cli import runs_app
from trunkline import follow, resume, runs_report

__all__ = ["follow", "resume", "runs_app", "runs_report"]
