"""The house stands: imports point down, torch stays where it may, nothing grows too long. And the checker can fail."""

import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests import floors
from tests.floors import FLOORS, MAX_FILE_LINES, MAX_FUNCTION_LINES, Module, read_modules

ROOT = Path(__file__).parents[1]
Check = Callable[[Mapping[str, Module]], list[str]]


@pytest.fixture(scope="module")
def house() -> dict[str, Module]:
    return read_modules(ROOT, FLOORS)


def test_every_package_has_a_floor() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages == set(FLOORS)


@pytest.mark.parametrize(
    "check",
    [floors.wrong_directions, floors.forbidden_imports, floors.heavy_import_paths, floors.cycles, floors.bad_names],
)
def test_the_house_keeps(check: Check, house: dict[str, Module]) -> None:
    assert check(house) == []


def test_nothing_in_the_house_nor_in_its_tests_is_too_long(house: dict[str, Module]) -> None:
    assert floors.too_long(house | read_modules(ROOT, ["tests", "scripts"])) == []


def test_the_light_entry_points_really_leave_torch_unloaded() -> None:
    code = (
        "import sys, orchestrator.app, clients, clients.app, server_trunk.cli, orchestrator.cli, trunkline.cli\n"
        "heavy = sorted({'torch', 'transformers', 'peft', 'opacus', 'datasets'} & set(sys.modules))\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def build(root: Path, files: Mapping[str, str]) -> dict[str, Module]:
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(textwrap.dedent(source), encoding="utf-8")
    return read_modules(root, FLOORS)


@pytest.mark.parametrize(
    ("place", "source", "named"),
    [
        ("contract/x.py", "from storage import records", "contract.x:1 imports storage.records"),
        ("storage/x.py", "import aggregation.ring", "storage is on floor 1, aggregation on floor 1"),
        ("clients/x.py", "def f():\n    from orchestrator.run import go", "clients.x:2 imports orchestrator.run.go"),
        ("clients/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import server_trunk", "clients.x:3"),
        ("demo/x.py", "import importlib\nimportlib.import_module('trunkline.cli')", "demo.x:2 imports trunkline.cli"),
        ("orchestrator/x.py", "class C:\n    from clients import data", "orchestrator.x:2 imports clients.data"),
    ],
)
def test_an_import_that_points_up_or_sideways_is_found(tmp_path: Path, place: str, source: str, named: str) -> None:
    (found,) = floors.wrong_directions(build(tmp_path, {place: source}))
    assert named in found


def test_imports_that_point_down_are_let_pass(tmp_path: Path) -> None:
    files = {
        "contract/x.py": "from . import errors\nfrom .errors import E",
        "contract/errors.py": "class E(Exception): pass",
        "storage/x.py": "from contract.errors import E",
        "clients/x.py": "import storage.x, aggregation.ring, torch",
    }
    modules = build(tmp_path, files)
    assert floors.wrong_directions(modules) == []
    assert floors.cycles(modules) == []
    assert floors.forbidden_imports(modules) == []


@pytest.mark.parametrize(
    ("place", "source", "named"),
    [
        ("aggregation/x.py", "import torch", "imports torch, which aggregation must not"),
        ("aggregation/x.py", "def f():\n    import time", "imports time, which aggregation must not"),
        ("aggregation/x.py", "from pathlib import Path", "imports pathlib.Path"),
        ("server_trunk/engine.py", "from grpc import aio", "which server_trunk.engine must not"),
        ("orchestrator/x.py", "from sqlalchemy import select", "which orchestrator must not"),
        ("contract/records.py", "import torch.nn", "contract.records:1 imports torch.nn at module level"),
        ("clients/x.py", "import pickle", "imports pickle, which this house must not"),
        ("clients/x.py", "import torch\ntorch.load('x')", "clients.x:2 uses torch.load"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, place: str, source: str, named: str) -> None:
    (found,) = floors.forbidden_imports(build(tmp_path, {place: source}))
    assert named in found


def test_contract_may_import_torch_where_it_says_and_lazily(tmp_path: Path) -> None:
    files = {"contract/codec.py": "import torch", "contract/config.py": "def f():\n    import torch"}
    assert floors.forbidden_imports(build(tmp_path, files)) == []


def test_torch_behind_other_modules_and_package_inits_is_found_with_its_way(tmp_path: Path) -> None:
    files = {
        "contract/codec.py": "import torch",
        "storage/x.py": "from contract import codec",
        "orchestrator/app.py": "try:\n    import storage.x\nexcept ImportError:\n    raise",
    }
    assert floors.heavy_import_paths(build(tmp_path, files)) == [
        "orchestrator.app -> storage.x -> contract.codec -> torch"
    ]


def test_torch_in_a_function_or_for_typing_is_no_import_at_start(tmp_path: Path) -> None:
    source = """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            import torch
        def f():
            import torch
            return lambda: __import__("torch")
    """
    assert floors.heavy_import_paths(build(tmp_path, {"clients/app.py": source, "trunkline/cli.py": source})) == []


def test_a_cycle_through_a_lazy_import_is_found_once(tmp_path: Path) -> None:
    files = {
        "clients/a.py": "from clients.b import x",
        "clients/b.py": "from clients import c",
        "clients/c.py": "def f():\n    from .a import y",
        "clients/d.py": "from clients.a import y",
    }
    assert floors.cycles(build(tmp_path, files)) == ["clients.a -> clients.b -> clients.c -> clients.a"]


def test_long_functions_and_files_are_found(tmp_path: Path) -> None:
    body = "    x = 1\n" * MAX_FUNCTION_LINES
    files = {
        "clients/a.py": f"async def just_over():\n{body}",
        "clients/b.py": "def fits():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1),
        "clients/c.py": "x = 1\n" * (MAX_FILE_LINES + 1),
    }
    function, file = floors.too_long(build(tmp_path, files))
    assert "clients.a:1 just_over has 71 lines" in function
    assert "clients.c has 451 lines" in file


@pytest.mark.parametrize("place", ["clients/utils.py", "storage/common/x.py", "contract/helpers.py"])
def test_a_name_after_nothing_is_found(tmp_path: Path, place: str) -> None:
    assert floors.bad_names(build(tmp_path, {place: "x = 1"}))
