"""What a trunk's weights take, and what this machine has for them: `python -m server_trunk.footprint`, JSON on stdout.

A process of its own: who only wants to know must neither wait for torch nor fall with a broken build of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from contract.checkpoint import part_bytes
from contract.errors import TrunklineError
from contract.records import CutLayers


def footprint(model: str, cut: CutLayers, dtype: str) -> dict[str, Any]:
    """`weights`: bytes of the trunk part once it is loaded; `gpu`: [free, whole] bytes of the current GPU, or None.

    Raises ModelError, UnsupportedModelError and ConfigError as loading the trunk would.
    """
    gpu = list(torch.cuda.mem_get_info()) if torch.cuda.is_available() else None
    return {"weights": part_bytes(model, cut, "trunk", dtype), "gpu": gpu}


def main(arguments: Sequence[str]) -> None:
    """MODEL HEAD-LAYERS TAIL-LAYERS DTYPE."""
    model, head, tail, dtype = arguments
    try:
        told = footprint(model, CutLayers(int(head), int(tail)), dtype)
    except TrunklineError as error:
        told = {"error": str(error)}
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1:])
