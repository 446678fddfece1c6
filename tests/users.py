"""Another user of this machine: one without a name or a home folder, who may read everything and write only what is
everyone's or their own."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

OTHER_USER = 54_321  # no system has an entry for it
SETPRIV = shutil.which("setpriv") or "setpriv"


def other_user_cannot_be() -> str:
    """Why a test cannot act as another user; empty where it can."""
    if os.geteuid() != 0:
        return "only root can act as another user"
    return "" if shutil.which("setpriv") else "setpriv is not installed (Debian: util-linux)"


def as_other_user(*command: str, environment: Mapping[str, str]) -> list[str]:
    """The command as that user runs it, with this environment alone. Reading everything stands for a machine where
    Python and the project do not lie in root's home."""
    return [
        SETPRIV, f"--reuid={OTHER_USER}", f"--regid={OTHER_USER}", "--clear-groups",
        "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search", "--bounding-set=-all,+dac_read_search",
        "env", "-i", *(f"{name}={value}" for name, value in environment.items()), *command,
    ]  # fmt: skip


def give_to_other_user(folder: Path) -> None:
    os.chown(folder, OTHER_USER, OTHER_USER)
