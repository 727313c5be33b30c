"""Where this machine keeps its runs: the home directory, the database in it, and the disk under them."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

from contract.errors import ConfigError
from contract.private_file import read_private_file

HOME_VARIABLE = "TRUNKLINE_HOME"
DATABASE_VARIABLE = "TRUNKLINE_DATABASE_URL"
DATABASE_FILE_VARIABLE = "TRUNKLINE_DATABASE_URL_FILE"

_NETWORK_FILESYSTEMS = frozenset(
    {
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "fuse.sshfs",
        "ceph",
        "glusterfs",
        "fuse.glusterfs",
        "lustre",
        "afs",
        "beegfs",
    }
)


def home_dir() -> Path:
    """TRUNKLINE_HOME, or ~/.trunkline; it need not exist yet."""
    named = os.environ.get(HOME_VARIABLE)
    return Path(named).expanduser().absolute() if named else Path.home() / ".trunkline"


def artifacts_dir() -> Path:
    return home_dir() / "artifacts"


def database_url() -> str:
    """TRUNKLINE_DATABASE_URL, or what the file that TRUNKLINE_DATABASE_URL_FILE names holds, or SQLite in the home.

    Raises ConfigError where both are set, and for a file that others than its owner can read: it holds a password.
    """
    told, file = os.environ.get(DATABASE_VARIABLE), os.environ.get(DATABASE_FILE_VARIABLE)
    if told and file:
        raise ConfigError(f"{DATABASE_VARIABLE} and {DATABASE_FILE_VARIABLE} are both set; each names the database")
    if file:
        told = read_private_file(Path(file)).decode("utf-8", "replace").strip()
        if not told:
            raise ConfigError(f"{DATABASE_FILE_VARIABLE} is {file}, which is empty; it must hold a database URL")
    return told or f"sqlite:///{quote(str(home_database()))}"


def home_database() -> Path:
    """The SQLite file in the home directory, be it used or not."""
    return home_dir() / "trunkline.db"


def simulation_dir(flower_run_id: str) -> Path:
    """Where one simulation's clients keep their throw-away identities and secrets; it goes with the run."""
    return home_dir() / "simulated" / flower_run_id


def names_database() -> bool:
    """Whether the environment names the database, rather than the home directory being left to hold it."""
    return bool(os.environ.get(DATABASE_VARIABLE) or os.environ.get(DATABASE_FILE_VARIABLE))


def network_filesystem(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str | None:
    """The type of the network file system that `path` lies on, or None where it lies on none that we can see."""
    try:
        table = mounts.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    best, found = "", ""
    for line in table.splitlines():
        _, mount_point, kind, *_ = line.split(" ")
        mount_point = mount_point.replace("\\040", " ")
        covers = path.is_relative_to(mount_point)
        if covers and len(mount_point) >= len(best):
            best, found = mount_point, kind
    return found if found in _NETWORK_FILESYSTEMS else None
