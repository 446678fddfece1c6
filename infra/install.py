"""Install locked packages, and this project, into the environment whose Python runs this file.

    .venv/bin/python infra/install.py requirements.lock tests/requirements.lock

pip is told to require the locks' hashes and to resolve nothing: what is locked is installed, and nothing else. Its
notes (a line for each package and index) are shown only where it fails; progress is shown instead. An interrupted run
leaves whole packages, which the next one keeps, and at most one without a RECORD, which the next one installs again.
It needs nothing but Python and pip, because nothing else is there yet.
"""

import contextlib
import importlib
import re
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from importlib.metadata import requires
from pathlib import Path
from shutil import rmtree

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "infra" / "cuda.lock"
SITE = Path(sysconfig.get_path("purelib"))
# Wheels alone, because building one would fetch what no lock names. They are compiled afterwards, by all cores.
LOCKED = ("install", "--require-hashes", "--no-deps", "--only-binary", ":all:", "--no-compile")
# The project lies here and has no hash; hatchling, which builds it, is locked like everything else.
PROJECT = ("install", "--no-deps", "--no-build-isolation", "--no-compile", "--editable", str(ROOT))
SECONDS_BETWEEN_UPDATES = 0.5
# Of these pip tells once for each package and index, whether anything is wrong or not.
NOISE = re.compile(r"WARNING: Location .* is ignored|\[notice\]|\s*$")


def main(locks: list[str]) -> int:
    began = time.monotonic()
    forget_unfinished(SITE)
    try:
        take_local_torch(Path(locks[0]))
        pip(*LOCKED, *(word for lock in locks for word in ("--requirement", lock)))
        importlib.invalidate_caches()
        if any(re.match("cuda|nvidia|triton", name) for name in requires("torch") or ()):
            pip(*LOCKED, "--requirement", str(CUDA))
        pip(*PROJECT)
        show("compiling")
        subprocess.run([sys.executable, "-m", "compileall", "-q", "-q", "-j", "0", str(SITE)], check=False)
    except subprocess.CalledProcessError as error:
        show("")
        sys.stderr.write(f"{error.stderr}Nothing is lost: `make` goes on from here once that is fixed.\n")
        return 1
    except KeyboardInterrupt:
        show("")
        sys.stderr.write("Interrupted: the next `make` goes on from here.\n")
        return 130
    show("")
    sys.stdout.write(f"Installed into {Path(sys.prefix).name} in {time.monotonic() - began:.0f} s.\n")
    return 0


def take_local_torch(lock: Path) -> None:
    """Install torch's build that lies where pip is configured to look on this machine, if its hash is locked.

    Among a file there, whose hash pip does not know before reading it, and PyPI's it takes PyPI's: for CUDA on Linux.
    """
    torch = re.search(r"^torch==.*?(?=^\S|\Z)", lock.read_text(), re.MULTILINE | re.DOTALL)
    with tempfile.NamedTemporaryFile("w", suffix=".lock") as file:
        file.write(torch[0] if torch else "")
        file.flush()
        with contextlib.suppress(subprocess.CalledProcessError):
            pip(*LOCKED, "--no-index", "--requirement", file.name)


def forget_unfinished(site: Path) -> None:
    """Forget packages whose installation was interrupted: pip takes them for installed, but writes RECORD last."""
    for description in site.glob("*.dist-info"):
        if not (description / "RECORD").exists():
            rmtree(description)


def pip(*arguments: str) -> None:
    """Run pip and show how far it is. Raises CalledProcessError with what pip said is wrong, without its noise."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, "--progress-bar", "off"]
    latest: list[str] = []
    wrong: list[str] = []

    def read_progress() -> None:
        for line in process.stdout or ():
            if file := re.match(r"(?:\s+Using cached|\s+Downloading|Processing|Collecting) (.*)", line):
                latest[:] = [file[1].rsplit("/", 1)[-1]]

    def read_errors() -> None:
        wrong.extend(line for line in process.stderr or () if not NOISE.match(line))

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        readers = [threading.Thread(target=read) for read in (read_progress, read_errors)]
        for reader in readers:
            reader.start()
        while process.poll() is None:
            installed = sum(1 for _ in SITE.glob("*.dist-info/RECORD"))
            show(f"{installed} packages installed" + "".join(f", fetched {file}" for file in latest))
            time.sleep(SECONDS_BETWEEN_UPDATES)
        for reader in readers:
            reader.join()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr="".join(wrong))


def show(text: str) -> None:
    """Write the progress over the line before, on a terminal only."""
    if sys.stdout.isatty():
        sys.stdout.write(f"\r\033[K{text[:79]}")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
