"""What `make install` runs: pip, into this Python's environment. What goes wrong ends in one line that says what to do.

Nothing is imported but what comes with Python, as nothing else is there yet.
"""
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--constraint", "constraints.txt"]
STEPS = [["--quiet", "pip", "setuptools"], ["--no-build-isolation", "--editable", ".[dev]"]]  # the second is built with the first's
INSTALLED, DOWNLOADED = 7, 3.5  # GB: what lies in .venv afterwards, and what pip keeps in its temporary folder until then, and in its cache
NETWORK = (r"NameResolution|Failed to establish a new connection|NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|"
           r"Max retries exceeded|Connection (?:refused|reset|aborted)|Network is unreachable")


def gigabytes(
    folder: Path,
) -> float:  # 1e9 bytes
    "What is free for this user in a folder's file system."
    return shutil.disk_usage(folder).free / 1e9


def cache() -> Path:
    "Where pip keeps what it has downloaded."
    return Path(os.environ.get("PIP_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()


def shortage(
    folders: list[tuple[Path, float]],  # a folder, and the GB that go into it
) -> str:  # empty if there is enough
    "Say where there is too little space; folders of one file system share it."
    wanted, where = {}, {}
    for folder, size in folders:
        folder = next(there for there in (folder, *folder.parents) if there.exists())
        device = folder.stat().st_dev
        wanted[device] = wanted.get(device, 0) + size
        where.setdefault(device, folder)
    for device, size in wanted.items():
        free = gigabytes(where[device])
        if free < size:
            return (f"needs {size:g} GB in {where[device]} and {free:.1f} GB are free: free some, or clone to a larger disk, or name a "
                    "larger folder for temporary files, TMPDIR=/path; INSTALL_GB=3 says that you know it takes less (a CPU build of torch)")
    return ""


def explained(
    errors: str,  # what pip wrote to stderr
) -> str:
    "The line for it."
    if re.search(r"No space left on device|Disk quota exceeded", errors):
        return (f"the disk is full ({ROOT}: {gigabytes(ROOT):.1f} GB are free, {tempfile.gettempdir()}: {gigabytes(tempfile.gettempdir()):.1f}): "
                "free some, or name a larger folder for temporary files, TMPDIR=/path, and give the command again")
    if re.search(r"Permission denied|Read-only file system", errors):
        return f"a folder cannot be written ({re.findall('.*(?:Permission denied|Read-only file system).*', errors)[-1].strip()}): use a clone of your own"
    if re.search(NETWORK, errors):
        return ("the package index could not be reached: connect to the network and give the command again, or name a proxy, "
                "HTTPS_PROXY=http://HOST:PORT, or a mirror, PIP_INDEX_URL=https://HOST/simple")
    last = [line for line in errors.splitlines() if line.strip()]
    return f"pip stopped: {last[-1].strip() if last else 'it said nothing'}"


def piped(
    arguments: list[str],
) -> tuple[int, str]:  # the exit status, and what was written to stderr
    "Run pip and print what it does, but for what was there already."
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        with subprocess.Popen([*PIP, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace") as process:
            for line in process.stdout:
                if not line.startswith("Requirement already satisfied"):
                    print(line, end="", flush=True)
        errors.seek(0)
        return process.returncode, errors.read()


def main() -> str | None:  # what is wrong, if anything
    "Look whether there is room, then install."
    options = []
    if importlib.util.find_spec("torch") is None:  # the first time; afterwards little is added
        size = os.environ.get("INSTALL_GB")
        try:
            parts = [(ROOT, float(size))] if size else [(ROOT, INSTALLED), (Path(tempfile.gettempdir()), DOWNLOADED)]
            missing = shortage(parts)
        except ValueError:
            return f"INSTALL_GB is a number of gigabytes, not {size!r}"
        except FileNotFoundError as error:  # no folder at all can be written for temporary files
            return f"there is no folder for temporary files ({error.strerror}): make room on the disk, or name one, TMPDIR=/path"
        if missing:
            return missing
        print("installing what settings.ini asks for at the versions of constraints.txt (7 GB and a few minutes)", flush=True)
        if shortage([*parts, (cache(), 0 if size else DOWNLOADED)]):
            options = ["--no-cache-dir"]  # there is room for the packages, but not for copies of them
    for step in STEPS:
        status, errors = piped([*options, *step])
        if status:
            log = ROOT / ".venv" / "pip.log"
            try:
                log.write_text(errors, encoding="utf-8")
                return f"{explained(errors)} (all that pip said: {log.relative_to(ROOT)})"
            except OSError:  # the disk is full to the last byte
                return explained(errors)
        print(errors, end="", file=sys.stderr)  # its warnings
    return None


if __name__ == "__main__":
    try:
        reason = main()
    except KeyboardInterrupt:
        reason = "broken off; give the command again"
    except OSError as error:
        reason = str(error)
    sys.exit(f"make install: {reason}" if reason else 0)
