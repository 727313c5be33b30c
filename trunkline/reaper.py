"""Ends what a supervisor started, where the supervisor was killed and could not.

`python -m trunkline.reaper MARK` waits for the end of its stdin, which the supervisor alone holds open, and then kills
every process that carries MARK. All at once: asked to end, one by one, an orchestrator would take the end of its
clients for theirs, and begin, and charge, another attempt. A supervisor that ended its processes itself leaves it
nothing to do.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trunkline.processes import Supervisor, ignoring_signals


def main(mark: str) -> None:
    with ignoring_signals():
        sys.stdin.buffer.read()
        Supervisor(Path(), mark=mark).kill()


if __name__ == "__main__":
    main(*sys.argv[1:])
