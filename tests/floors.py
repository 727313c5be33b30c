"""Reads the packages' source, never runs it, and says where the house rules are broken, a line each."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

MAX_FUNCTION_LINES = 70
MAX_FILE_LINES = 450

# A package imports only from lower floors; two on one floor never import each other.
FLOORS = {
    "contract": 0,
    "aggregation": 1,
    "privacy": 1,
    "storage": 1,
    "server_trunk": 2,
    "clients": 2,
    "orchestrator": 2,
    "demo": 3,
    "trunkline": 4,
    "benchmarks": 5,
}
NO_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}

HEAVY = ("torch", "transformers", "peft", "accelerate", "opacus", "datasets", "safetensors.torch")
# adapter_proof and architecture are adapter's and partition's other halves, quantize and delta are codec's arithmetic.
HEAVY_IN_CONTRACT = {
    f"contract.{name}"
    for name in (
        *("adapter", "adapter_mean", "adapter_proof", "architecture", "checkpoint"),
        *("codec", "delta", "partition", "quantize"),
    )
}
# Importing these must not import torch, however many modules lie between.
LIGHT = ("orchestrator", "trunkline", "clients", "clients.app", "clients.cli", "server_trunk.cli")

# What a module, or all of a package, must not import: "the trunk's engine knows no gRPC".
NOT_IN = {
    "aggregation": (
        *HEAVY,
        "grpc",
        "flwr",
        "sqlalchemy",
        "os",
        "pathlib",
        "io",
        "time",
        "datetime",
        "asyncio",
        "random",
    ),
    "privacy": (*HEAVY, "grpc", "flwr", "sqlalchemy", "os", "pathlib", "time", "random"),
    "storage": (*HEAVY, "grpc", "flwr"),
    "server_trunk": ("flwr", "sqlalchemy", "alembic"),
    "server_trunk.engine": ("grpc",),
    "clients": ("sqlalchemy", "alembic"),
    "orchestrator": ("sqlalchemy", "alembic"),
    "contract": ("flwr", "sqlalchemy", "alembic"),
}
NOT_ANYWHERE = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")


@dataclass(frozen=True)
class Import:
    """One imported name. `when` is "import" (of the module), "call" (of a function in it) or "typing" (never)."""

    target: str
    when: str
    line: int


@dataclass
class Module:
    name: str
    path: Path
    tree: ast.Module
    lines: int
    is_package: bool
    imports: list[Import] = field(default_factory=list)

    @property
    def package(self) -> str:
        return self.name.split(".")[0]


def read_modules(root: Path, packages: Iterable[str]) -> dict[str, Module]:
    """Every module of `packages` under `root` by its dotted name; generated gRPC stubs are left out."""
    modules = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            if "_pb2" in path.name:
                continue
            parts = path.relative_to(root).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            source = path.read_text(encoding="utf-8")
            module = Module(name, path, ast.parse(source), source.count("\n"), is_package)
            module.imports = list(_imports(module, module.tree, "import"))
            modules[name] = module
    return modules


def _imports(module: Module, node: ast.AST, when: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, when, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = _absolute(module, child)
            yield from (Import(f"{base}.{alias.name}", when, child.lineno) for alias in child.names)
        elif isinstance(child, ast.Call) and (named := _named_import(child)):
            yield Import(named, when, child.lineno)
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.body:
                yield from _imports(module, ast.Module([statement], []), "typing")
            for statement in child.orelse:
                yield from _imports(module, ast.Module([statement], []), when)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _imports(module, child, "typing" if when == "typing" else "call")
        else:
            yield from _imports(module, child, when)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.name.split(".")
    kept = parts[: len(parts) - node.level + (1 if module.is_package else 0)]
    return ".".join([*kept, node.module] if node.module else kept)


def _named_import(call: ast.Call) -> str | None:
    """The module in `importlib.import_module("...")` or `__import__("...")`."""
    function = ast.unparse(call.func)
    if function.split(".")[-1] not in ("import_module", "__import__") or not call.args:
        return None
    first = call.args[0]
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None


def _is_of(target: str, names: Iterable[str]) -> bool:
    return any(target == name or target.startswith(f"{name}.") for name in names)


def wrong_directions(modules: Mapping[str, Module]) -> list[str]:
    """Imports that point up or sideways, in functions and under TYPE_CHECKING too."""
    found = []
    for module in modules.values():
        for imported in module.imports:
            other = imported.target.split(".")[0]
            if other == module.package or other not in FLOORS:
                continue
            if FLOORS[other] >= FLOORS[module.package]:
                found.append(
                    f"{module.name}:{imported.line} imports {imported.target}: {module.package} is on floor "
                    f"{FLOORS[module.package]}, {other} on floor {FLOORS[other]}"
                )
    return found


def forbidden_imports(modules: Mapping[str, Module]) -> list[str]:
    """Imports of what a package must do without, and of what nobody may use."""
    found = []
    for module in modules.values():
        rules = [(names, place) for place, names in NOT_IN.items() if _is_of(module.name, [place])]
        rules.append((NOT_ANYWHERE, "this house"))
        for imported in module.imports:
            for names, place in rules:
                if _is_of(imported.target, names):
                    found.append(f"{module.name}:{imported.line} imports {imported.target}, which {place} must not")
            light_contract = module.package == "contract" and module.name not in HEAVY_IN_CONTRACT
            if light_contract and imported.when == "import" and _is_of(imported.target, HEAVY):
                found.append(f"{module.name}:{imported.line} imports {imported.target} at module level")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                found.append(f"{module.name}:{node.lineno} uses torch.load, which unpickles: weights are safetensors")
    return found


def heavy_import_paths(modules: Mapping[str, Module]) -> list[str]:
    """Ways by which importing a LIGHT module imports torch or its like at once."""
    found = []
    for start in sorted(modules):
        whole_packages = ("orchestrator", "trunkline")
        if start not in LIGHT and not _is_of(start, whole_packages):
            continue
        seen = {start}
        waiting: list[tuple[str, tuple[str, ...]]] = [(start, (start,))]
        while waiting:
            name, way = waiting.pop()
            now = [imported for imported in modules[name].imports if imported.when == "import"]
            heavy = next((imported.target for imported in now if _is_of(imported.target, HEAVY)), None)
            if heavy is not None:
                found.append(" -> ".join((*way, heavy)))
                break
            for imported in now:
                for reached in _loaded_by(imported.target, modules):
                    if reached not in seen:
                        seen.add(reached)
                        waiting.append((reached, (*way, reached)))
    return found


def _loaded_by(target: str, modules: Mapping[str, Module]) -> list[str]:
    """The modules that importing `target` runs: itself and the packages it lies in."""
    parts = target.split(".")
    return [name for end in range(1, len(parts) + 1) if (name := ".".join(parts[:end])) in modules]


def cycles(modules: Mapping[str, Module]) -> list[str]:
    """Modules that import each other round in a circle, imports in functions included."""
    edges = {
        name: sorted({to for imported in module.imports if (to := _runs(imported, name, modules))})
        for name, module in modules.items()
    }
    found: set[tuple[str, ...]] = set()
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> None:
        if name in way:
            circle = way[way.index(name) :]
            first = circle.index(min(circle))
            found.add((*circle[first:], *circle[:first]))
        elif name not in done:
            for other in edges[name]:
                visit(other, [*way, name])
            done.add(name)

    for name in sorted(edges):
        visit(name, [])
    return [" -> ".join((*circle, circle[0])) for circle in sorted(found)]


def _runs(imported: Import, importer: str, modules: Mapping[str, Module]) -> str | None:
    """The module that an import names, at run time; a package that only leads to it does not count."""
    if imported.when == "typing":
        return None
    loaded = _loaded_by(imported.target, modules)
    return loaded[-1] if loaded and loaded[-1] != importer else None


def too_long(modules: Mapping[str, Module]) -> list[str]:
    """Functions over MAX_FUNCTION_LINES and files over MAX_FILE_LINES."""
    found = []
    for module in modules.values():
        if module.lines > MAX_FILE_LINES:
            found.append(f"{module.name} has {module.lines} lines, at most {MAX_FILE_LINES} are allowed")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    found.append(f"{module.name}:{node.lineno} {node.name} has {lines} lines, not {MAX_FUNCTION_LINES}")
    return found


def bad_names(modules: Mapping[str, Module]) -> list[str]:
    """Modules named after no noun at all."""
    return [f"{name} is named after nothing" for name in modules if NO_NAMES & set(name.split("."))]
