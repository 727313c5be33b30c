"""Where Flower's programs are, under a path that Ray can take.

Ray starts its workers by a shell command into which it puts the interpreter's path as it is: a space in the path of a
checkout, and no worker ever starts. There a link without spaces to the environment, and programs that start through
it, stand in.
"""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
import sysconfig
from pathlib import Path


def scripts_dir() -> Path:
    """Where this installation's `flwr` and its like are, whether or not it was activated."""
    return Path(sysconfig.get_path("scripts"))


def runnable_scripts(directory: Path) -> Path:
    """A directory with Flower's programs whose interpreter's path a shell reads as one word.

    That is where they were installed, or else a new one below `directory`, whose own path must be such a word.
    """
    if shlex.quote(sys.executable) == sys.executable:
        return scripts_dir()
    link, scripts = directory / "env", directory / "bin"
    link.symlink_to(Path(sys.executable).parent.parent, target_is_directory=True)
    interpreter = link / "bin" / Path(sys.executable).name
    scripts.mkdir()
    for entry in importlib.metadata.distribution("flwr").entry_points:
        if entry.group == "console_scripts":
            script = scripts / entry.name
            script.write_text(
                f"#!{interpreter}\nimport sys\nfrom {entry.module} import {entry.attr}\nsys.exit({entry.attr}())\n",
                encoding="utf-8",
            )
            script.chmod(0o755)
    return scripts
