"""Whoever imports transformers or PEFT has imported `contract` before, which keeps that import quiet."""

from __future__ import annotations

import subprocess
import sys

import pytest

WATCHED = """
import builtins, importlib, sys
plain = builtins.__import__
def noted(name, *given):
    if name.partition(".")[0] in ("transformers", "peft"):
        print("after" if "contract" in sys.modules else "before", flush=True)
        sys.exit()
    return plain(name, *given)
builtins.__import__ = noted
importlib.import_module(sys.argv[1])
"""


@pytest.mark.parametrize("module", ["clients.split_model", "demo.solo", "benchmarks.codecs", "server_trunk.server"])
def test_transformers_comes_after_contract(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, module], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("after\n", "")
