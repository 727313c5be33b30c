"""`trunkline doctor`: is this machine ready? Each check comes to PASS, WARN, FAIL or SKIP, the bad ones with a fix."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import psutil
import typer

from contract.addresses import split_address, trunk_addresses
from contract.errors import ConfigError, TrunklineError
from contract.output import OutputFormat, OutputOption, cli_errors, emit
from contract.records import CutLayers
from contract.tls import VARIABLES, TlsFiles
from contract.tls_options import TrunkCaOption, TrunkCertificateOption, TrunkKeyOption, trunk_tls
from storage.home import home_dir, names_database, network_filesystem
from trunkline.database_checks import check_database, check_database_clock, check_database_write
from trunkline.finding import DoubtfulError, Finding, NotReadyError, SkippedError
from trunkline.flower import SuperLinkAddress
from trunkline.model_checks import AskedModel, check_gpu_memory, check_model_memory
from trunkline.port_checks import SUPERLINK_PORT, SUPERNODE_PORT, TRUNK_PORT, check_port
from trunkline.ports import reserve_port
from trunkline.programs import scripts_dir
from trunkline.superlink_checks import check_superlink, check_superlink_clock
from trunkline.tls_checks import check_tls
from trunkline.trunk_checks import check_trunk_clock, check_trunk_version
from trunkline.workplace import cores

if TYPE_CHECKING:
    from packaging.requirements import Requirement

app = typer.Typer()

REINSTALL = "run `make setup` in the checkout, or `pip install` trunkline again"
FLOWER_PROGRAMS = ("flwr", "flower-superlink", "flower-supernode", "flower-superexec", "flwr-serverapp")
NEEDED_MEMORY_BYTES = 3 * 10**9
NEEDED_DISK_BYTES = 10**9
TORCH_LIMIT_S = 120


class ServedDtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@app.command()
@cli_errors
def doctor(
    trunk: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Check that this trunk answers, too; or several, parted by commas."),
    ] = None,
    ca: TrunkCaOption = None,
    certificate: TrunkCertificateOption = None,
    key: TrunkKeyOption = None,
    superlink: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Check that this SuperLink, or the gate before it, answers, too."),
    ] = None,
    root_certificates: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The SuperLink's CA, as for `flower-supernode`; none: no TLS.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Check that the trunk's part of this model, or this trunk part, fits here."),
    ] = None,
    head_layers: Annotated[int, typer.Option(min=0, help="Of a whole --model: as for `trunk serve`.")] = 1,
    tail_layers: Annotated[int, typer.Option(min=0, help="Of a whole --model: as for `trunk serve`.")] = 1,
    dtype: Annotated[ServedDtype, typer.Option(help="Of --model: as for `trunk serve`.")] = ServedDtype.FLOAT32,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Check this machine. Exits 1 if a check fails; one that only warns, or had nothing to look at, fails nothing."""
    addresses = () if trunk is None else trunk_addresses(trunk, "trunk")
    if superlink is not None:
        split_address("superlink", superlink)
    elif root_certificates is not None:
        raise ConfigError("root-certificates is given without superlink, HOST:PORT, which they vouch for")
    asked = None if model is None else AskedModel(model, CutLayers(head_layers, tail_layers), dtype.value)
    known = None if superlink is None else SuperLinkAddress(superlink, root_certificates)
    findings = list(examine(addresses, asked, (ca, certificate, key), known))
    if output is OutputFormat.TABLE:
        for finding in findings:
            typer.echo(f"{finding.result}  {finding.check}: {finding.detail}")
            if finding.fix:
                typer.echo(f"      fix: {finding.fix}")
    else:
        emit(findings, output)
    if any(finding.result == "FAIL" for finding in findings):
        raise typer.Exit(1)


def examine(
    addresses: Sequence[str] = (),
    model: AskedModel | None = None,
    tls_files: Sequence[Path | None] = (None, None, None),
    superlink: SuperLinkAddress | None = None,
) -> Iterator[Finding]:
    """Every check in turn; each trunk's address adds some of its own. None takes longer than minutes.

    `tls_files` are CA, certificate and key for calling a trunk by TLS; without any it is asked in clear.
    """
    whole = all(tls_files)  # where some are missing, the check of the files says so, and no trunk is asked in clear
    tls = trunk_tls(*tls_files) if whole else None
    checks: dict[str, Callable[[], str]] = {
        "python": check_python,
        "packages": check_packages,
        "torch": check_torch,
        "flower": check_flower,
        "cores and memory": check_machine,
        "GPU memory": lambda: check_gpu_memory(model),
        "model memory": lambda: check_model_memory(model),
        "disk": check_disk,
        "home": check_home,
        "database": check_database,
        "database write": check_database_write,
        "database clock": check_database_clock,
        "ports": check_ports,
        f"port {SUPERLINK_PORT} (SuperLink)": lambda: check_port(SUPERLINK_PORT),
        f"port {TRUNK_PORT} (trunk)": lambda: check_port(TRUNK_PORT),
        f"port {SUPERNODE_PORT} (SuperNode)": lambda: check_port(SUPERNODE_PORT, loopback_only=True),
        "TLS files": lambda: check_tls(dict(zip(VARIABLES, tls_files, strict=True))),
        "demo": check_demo,
    }
    if addresses and (whole or not any(tls_files)):
        checks["trunk"] = lambda: check_trunk(",".join(addresses), tls)
        for address in addresses:
            checks[f"trunk version {address}"] = functools.partial(check_trunk_version, address, tls)
            checks[f"trunk clock {address}"] = functools.partial(check_trunk_clock, address, tls)
    if superlink is not None:
        where = (superlink.address, superlink.root_certificates)
        checks["superlink"] = functools.partial(check_superlink, *where)
        checks["superlink clock"] = functools.partial(check_superlink_clock, *where)
    for name, check in checks.items():
        yield _finding(name, check)


def _finding(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, "PASS", check())
    except SkippedError as nothing:
        return Finding(name, "SKIP", str(nothing))
    except NotReadyError as problem:
        return Finding(name, problem.result, str(problem), problem.fix)


def check_python() -> str:
    if sys.version_info[:2] != (3, 11):
        raise NotReadyError(f"Python {platform.python_version()}", "install Python 3.11 and run `make setup` again")
    return f"{platform.python_version()} at {sys.executable}"


def check_packages() -> str:
    """Every pinned dependency is there in a version that trunkline was made for."""
    # pip's own library for versions; it comes with several of the dependencies.
    from packaging.requirements import Requirement

    try:
        wanted = importlib.metadata.requires("trunkline") or []
    except importlib.metadata.PackageNotFoundError:
        raise NotReadyError("trunkline itself is not installed", REINSTALL) from None
    needed = [requirement for line in wanted if _applies(requirement := Requirement(line))]
    for requirement in needed:
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            raise NotReadyError(f"{requirement.name} is missing", REINSTALL) from None
        if not requirement.specifier.contains(found, prereleases=True):
            raise NotReadyError(f"{requirement.name} is {found}; it must be {requirement.specifier}", REINSTALL)
    return f"{len(needed)} as pinned; flwr {importlib.metadata.version('flwr')}"


def _applies(requirement: Requirement) -> bool:
    marker = requirement.marker
    return marker is None or bool(marker.evaluate({"extra": ""}))


def check_torch() -> str:
    """In a process of its own: a broken build ends its process, and this one has no use for torch."""
    code = (
        "import torch; x = torch.ones(8, 8); assert float((x @ x).sum()) == 512.0; "
        "print(torch.__version__, 'with', torch.cuda.get_device_name(0) if torch.cuda.is_available() else 'CPU only')"
    )
    try:
        tried = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=TORCH_LIMIT_S,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise NotReadyError(f"did not import within {TORCH_LIMIT_S} s", REINSTALL) from None
    if tried.returncode:
        last = (tried.stderr.strip().splitlines() or ["no output"])[-1]
        raise NotReadyError(f"does not work: {last}", REINSTALL)
    return tried.stdout.strip()


def check_flower() -> str:
    missing = [name for name in FLOWER_PROGRAMS if shutil.which(name, path=str(scripts_dir())) is None]
    if missing:
        raise NotReadyError(f"{', '.join(missing)} not in {scripts_dir()}", REINSTALL)
    return f"its programs are in {scripts_dir()}"


def check_machine() -> str:
    free = psutil.virtual_memory().available
    detail = f"{cores()} cores, {free / 1e9:.1f} GB of memory available"
    if free < NEEDED_MEMORY_BYTES:
        raise NotReadyError(detail, f"free some memory: the demo needs about {NEEDED_MEMORY_BYTES / 1e9:.0f} GB")
    return detail


def check_disk() -> str:
    places = {"the home": _existing(home_dir()), "the temporary directory": Path(tempfile.gettempdir())}
    free = {name: shutil.disk_usage(path).free for name, path in places.items()}
    detail = ", ".join(f"{size / 1e9:.1f} GB free in {name}" for name, size in free.items())
    if min(free.values()) < NEEDED_DISK_BYTES:
        raise NotReadyError(detail, "free some space, or point TRUNKLINE_HOME or TMPDIR at a larger disk")
    return detail


def check_home() -> str:
    home = home_dir()
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise NotReadyError(f"{home}: {error.strerror}", "set TRUNKLINE_HOME to a directory you may write to") from None
    network = network_filesystem(home)
    if network is not None and not names_database():
        raise DoubtfulError(
            f"{home}, on a network disk ({network}): SQLite is not safe there",
            "point TRUNKLINE_HOME at a local disk, or TRUNKLINE_DATABASE_URL at PostgreSQL",
        )
    return str(home)


def check_ports() -> str:
    try:
        return f"free ones on 127.0.0.1, such as {reserve_port()}"
    except TrunklineError as error:
        raise NotReadyError(str(error), "end programs that hold ports, or restart the machine") from None


def check_demo() -> str:
    """The demo's model and text are there."""
    from clients.stdlib_text import stdlib_root
    from demo.settings import MODEL_DIR

    weights = MODEL_DIR / "model.safetensors"
    if not weights.is_file():
        raise NotReadyError(f"no {weights}", "get a whole checkout of trunkline")
    if not (stdlib_root() / "asyncio" / "events.py").is_file():
        raise NotReadyError(
            f"no sources of the standard library in {stdlib_root()}", "install Python with its library as .py files"
        )
    return f"model of {weights.stat().st_size / 1e6:.1f} MB, text in {stdlib_root()}"


def check_trunk(address: str, tls: TlsFiles | None = None) -> str:
    from orchestrator.replicas import connect

    try:
        with closing(connect(address, tls=tls)) as trunk:
            served = trunk.describe()
    except TrunklineError as error:
        raise NotReadyError(str(error), "start a trunk there, or name another one") from None
    return f"{address} serves model {served.fingerprint[:12]}, cut ({served.cut.head}, {served.cut.tail})"


def _existing(path: Path) -> Path:
    """The nearest directory above that is there: a home need not be made yet."""
    return next(place for place in (path, *path.parents) if place.exists())
