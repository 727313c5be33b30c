"""Make .venv ready: the pinned dependencies and this checkout. Runs on a bare Python 3.11; does nothing when ready."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "trunkline-setup"
LOCK = ROOT / "requirements.lock"
LOG = VENV / "setup.log"
TORCH_INDEX_VARIABLE = "TORCH_CPU_INDEX"
SELDOM_IMPORTED = r"/site-packages/(.*/tests?|transformers/models)/"
HEARTBEAT_S = 30
LOG_TAIL_LINES = 15


def main() -> int:
    stamp = STAMP.read_text(encoding="utf-8") if VENV_PYTHON.exists() and STAMP.is_file() else ""
    if stamp == place() + dependencies():
        say("setup: .venv is up to date")
        return 0
    began = time.monotonic()
    if not stamp.startswith(place()) and not make_venv():
        return 1
    # Half of the stamp while half is done: the next run then installs into this .venv instead of making it again.
    STAMP.write_text(place(), encoding="utf-8")
    if not install_torch() or not install_project():
        return 1
    compile_modules()
    STAMP.write_text(place() + dependencies(), encoding="utf-8")
    say(f"setup: ready after {time.monotonic() - began:.0f} s; try `make demo`")
    return 0


def place() -> str:
    """Where .venv is: it has to be made anew when the checkout moves, for its paths are fixed.

    Not which Python made it: another one that comes first on the PATH today is no reason to install everything again.
    """
    return digest(str(ROOT))


def dependencies() -> str:
    """Changes when what has to be installed does."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    kept = [project["build-system"], project["project"], project["tool"]["setuptools"]]
    return digest(json.dumps(kept, sort_keys=True), LOCK.read_text(encoding="utf-8"))


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest() + "\n"


def make_venv() -> bool:
    missing = missing_venv_package()
    if missing:
        return fail(missing)
    say(f"setup: making .venv with Python {platform.python_version()}")
    # Started from inside an activated .venv, this interpreter would delete itself.
    inside = Path(sys.prefix).resolve() == VENV
    interpreter = getattr(sys, "_base_executable", sys.executable) if inside else sys.executable
    made = subprocess.run([interpreter, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True)
    return made.returncode == 0 or fail(f"could not make .venv: {(made.stderr or made.stdout).strip()}")


def missing_venv_package() -> str | None:
    """Debian parts the standard library's venv from Python itself; say which package brings it back."""
    if importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip"):
        return None
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (
        f"python3-venv is missing: {sys.executable} cannot make virtual environments. "
        f"On Debian and Ubuntu: sudo apt-get install python{version}-venv"
    )


def install_torch() -> bool:
    """The CPU build where no NVIDIA driver is and pip's own sources have it, else the default build with its size."""
    version = locked("torch")
    if has_nvidia_driver():
        say(f"setup: NVIDIA driver found, taking the default build of torch ({default_size()})")
        return install("torch", [f"torch=={version}"])
    index = os.environ.get(TORCH_INDEX_VARIABLE)
    source = ["--extra-index-url", index] if index else []
    if pip(["--no-deps", *source, f"torch=={version}+cpu"]):
        say("setup: no NVIDIA driver, took the CPU build of torch")
        return True
    say(
        f"setup: no NVIDIA driver and no CPU build of torch in pip's sources; taking the default build, "
        f"{default_size()} (set {TORCH_INDEX_VARIABLE} to an index that has torch {version}+cpu to avoid it)"
    )
    return install("torch", [f"torch=={version}"])


def install_project() -> bool:
    say("setup: installing the pinned dependencies")
    return install("dependencies", ["-e", f"{ROOT}[dev]"])


def compile_modules() -> None:
    """On all cores at once, where pip takes one; what is seldom imported, Python compiles when it is."""
    site_packages = sysconfig.get_path("purelib", "venv", {"base": str(VENV)})
    command = [str(VENV_PYTHON), "-m", "compileall", "-q", "-j", "0", "-x", SELDOM_IMPORTED, site_packages]
    with LOG.open("ab") as log:  # some packages hold templates that are no Python: pip passes over these too
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=False)


def has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def default_size() -> str:
    """What pip downloads for the default build of torch and what it needs."""
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        return "a download of about 2.7 GB with its CUDA libraries"
    return "a download of 0.1 to 3 GB, depending on the platform"


def locked(name: str) -> str:
    for line in LOCK.read_text(encoding="utf-8").splitlines():
        if line.lower().startswith(f"{name}=="):
            return line.partition("==")[2].strip()
    raise SystemExit(f"error: {LOCK.name} does not pin {name}")


def install(what: str, arguments: list[str]) -> bool:
    if pip(arguments):
        return True
    lines = LOG.read_text(errors="replace").splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith("WARNING: Location")]
    say("\n".join(lines[-LOG_TAIL_LINES:]))
    return fail(f"could not install the {what}; the whole log is {LOG}")


def pip(arguments: list[str]) -> bool:
    """One `pip install` within the lock; its output goes to a log, a sign of life to the terminal."""
    command = [str(VENV_PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-compile"]
    began = time.monotonic()
    done = threading.Event()

    def heartbeat() -> None:
        while not done.wait(HEARTBEAT_S):
            say(f"setup: still at it after {time.monotonic() - began:.0f} s (log: {LOG})")

    threading.Thread(target=heartbeat, daemon=True).start()
    try:
        with LOG.open("ab") as log:
            result = subprocess.run(
                [*command, "-c", str(LOCK), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )
    finally:
        done.set()
    return result.returncode == 0


def say(message: str) -> None:
    sys.stdout.write(message + "\n")
    sys.stdout.flush()


def fail(message: str) -> bool:
    sys.stderr.write(f"error: {message}\n")
    return False


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
