"""What `make figures` runs: it makes the committed outputs of the pages anew where something that they come from has changed.

`figures.py` executes the stale pages, `figures.py --all` all of them, `figures.py 02_entropy_sgd lab/curvature` these, stale or not.
Then it makes nbs/images/ and the README's table of claims from what is committed. A page's metadata has two digests under `outputs_of`:
of the outputs, so that those of a run by hand, with other data perhaps, do not pass for these; and of what they come from, which is

- its code cells, but for those marked `#| eval: false`, which are not executed here either and have no outputs;
- the notebooks that its cells name, to read or to run, prose and all;
- the modules of the package that any of these imports or names, wherever that stands, and those that they import;
- the files of results/ that any of these names.

All are taken as they are written: an output can be made of comments and docstrings, as in nbs/lab/site.ipynb. The versions of Python
and of libraries do not count: `--all` after a change of constraints.txt.
"""
import base64
import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

import nbformat
import psutil
from execnb.nbio import nb2str
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError
from nbdev.clean import clean_nb
from nbdev.config import get_config
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
STAMP = "outputs_of"  # the key of the metadata; settings.ini allows it, or nbdev_clean would take it away
LIMIT = 600  # seconds that a page may take
HEAVIEST = 1_500_000  # bytes of a page
WIDTH = 480  # pixels of a thumbnail
WIDGET = "application/vnd.jupyter.widget-view+json"
HOST = socket.gethostname().partition(".")[0]  # one that is a plain word would be found everywhere
HERE = tuple(name for name in (HOST, str(ROOT), str(Path.home()), sys.prefix) if len(name) > 5 and not name.isalpha())
CELL = re.compile(r"^# %%.*\n", re.MULTILINE)  # what nbdev writes above each cell of a module: an id, new where no code is
IMPORT = re.compile(r"\bfrom +(\.*)([\w.]*) *import +(\((?:#.*\n|[^#)])*|.*)")  # its dots, start and names
CLAIMS = re.compile(r"(<!-- claims: begin -->\n).*?(<!-- claims: end -->)", re.DOTALL)


def pages() -> list[Path]:
    "The notebooks of nbs/."
    return sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts))


def named(page: Path) -> str:  # 'lab/curvature'
    "A page by the name that it is asked for with."
    return page.relative_to(ROOT / "nbs").with_suffix("").as_posix()


def read(page: Path) -> dict:
    "A notebook. One that cannot be read ends everything, in one line."
    try:
        return json.loads(page.read_text(encoding="utf-8"))
    except ValueError as error:
        sys.exit(f"{page.name} is no notebook: {error}; was a merge left half done?")


def source_of(cell: dict) -> str:
    return "".join(cell["source"])


def executed(cell: dict) -> bool:
    "Whether a cell is executed when outputs are made."
    return cell["cell_type"] == "code" and not re.search(r"^#\|\s*eval:\s*false\s*$", source_of(cell), re.MULTILINE)


# ---- what outputs come from ------------------------------------------------------------------------------------------
def digest(what: object) -> str:  # of what JSON can hold, and the same everywhere, as repr is not
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def modules(text: str, package: tuple[str, ...]) -> set[Path]:
    "The modules that a text imports or names; the package is where its relative imports start."
    names = re.findall(r"\bflatmin_nb(?:\.\w+)+", text)
    for dots, start, what in IMPORT.findall(text):
        start = ".".join([*(package[: len(package) + 1 - len(dots)] if dots else ()), start]).strip(".")
        names += [start, *(f"{start}.{name}" for name in re.findall(r"\w+", what))]
    steps = [name.split(".") for name in names if name.startswith("flatmin_nb.")]
    # a.b.c runs a and a.b first; flatmin_nb itself holds the version, of no importance here
    starts = {ROOT.joinpath(*step[:end]) for step in steps for end in range(2, len(step) + 1)}
    return {file for path in starts for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()}


def notebooks(text: str) -> set[Path]:
    "The pages that a text names, by a pattern perhaps."
    names = re.findall(r"([^\"'/\n]+\.ipynb)[\"']", text)
    return {page for page in pages() if any(fnmatchcase(page.name, name) for name in names)}


def tables(text: str) -> set[Path]:
    "The files of results/ that a text names, or begins to name in an f-string; all of them where it speaks of results/ and names none."
    if not re.search(r"[\"'/]results[\"'/]", text):
        return set()
    there = {path for path in (ROOT / "results").rglob("*") if path.is_file() and path.name[0] != "." and path.suffix not in {".md", ".py", ".pyc"}}
    patterns = [name + "*" * (end == "{") for name, end in re.findall(r"[\"'][./]*(?:results/)?(\w{3}[\w./-]*)([\"'{])", text)]
    names = [(path, name) for path in there for name in (path.relative_to(ROOT / "results").as_posix(), path.name, path.stem)]
    return {path for path, name in names if any(fnmatchcase(name, pattern) for pattern in patterns)} or there


def parts(page: Path) -> dict[str, str]:  # path -> digest
    "Everything that the outputs of a page come from."
    found, code, waiting = {}, "", {page}
    while waiting:
        path = waiting.pop()
        if path.suffix == ".py":
            text = whole = CELL.sub("", path.read_text(encoding="utf-8"))
        else:
            cells = read(path)["cells"]
            text = "\n# %%\n".join(source_of(cell) for cell in cells if executed(cell))
            whole = text if path == page else [*map(source_of, cells)]
            waiting |= notebooks(text)
        found[path] = digest(whole)
        code += f"{text}\n"
        waiting = (waiting | modules(text, path.relative_to(ROOT).parts[:-1])) - found.keys()
    found |= {table: digest(table.read_bytes().hex()) for table in tables(code)}
    return {path.relative_to(ROOT).as_posix(): found[path] for path in sorted(found)}


def sources_of(page: Path) -> str:  # a digest
    return digest(parts(page))


def outputs_of(notebook: dict) -> str:  # a digest
    return digest([cell["outputs"] for cell in notebook["cells"] if cell.get("outputs")])


def stale(page: Path) -> str:  # empty: it is fresh
    "Why a page has to be executed anew."
    notebook = read(page)
    made = notebook["metadata"].get(STAMP, {})
    if made.keys() != {"sources", "outputs"}:
        return "its outputs were not made by make figures"
    if made["sources"] != sources_of(page):
        return "its code, or a module, a notebook or a table that it reads, changed"
    return "" if made["outputs"] == outputs_of(notebook) else "its outputs were changed by other means"


# ---- what outputs may be ---------------------------------------------------------------------------------------------
UNPRESENTABLE = {
    "the path of a machine": r"(?<![\w.~$}<])/(?:tmp|home|root|Users|work|workspace|mnt|private|var/folders)\b[^\s'\"<]*|\b[A-Za-z]:\\+Users\b[^\s'\"<]*",
    "an escape sequence": r"\x1b\[?[\d;]*\w?",
    "the address of an object": r"\bat 0x[0-9a-fA-F]{6,}",
    "a traceback": r"Traceback \(most recent call last\)",
    "a warning": r"\b[A-Z]\w*Warning: .{,60}|^WARNING\b.{,60}",
    "something of another host": r"<(?:script|img|iframe|link|source|video)\b[^>]*\b(?:src|href)\s*=\s*[\"']?(?:https?:)?//[^>]{,60}|@import\b.{,60}|url\([\"']?https?:.{,60}",
}


def unpresentable(notebook: dict, here: tuple[str, ...] = ()) -> list[str]:  # empty: it can be shown
    "What is in the outputs that nobody should see, the names of this machine too."
    found = ["state of widgets"] if "widgets" in notebook["metadata"] else []
    patterns = UNPRESENTABLE | ({"the name of this machine": rf"(?<!\w)(?:{'|'.join(map(re.escape, here))})(?!\w)"} if here else {})
    for output in (output for cell in notebook["cells"] for output in cell.get("outputs", [])):
        if output["output_type"] == "error":
            found.append(f"an error, {output['ename']}")
        if output.get("name") == "stderr":
            found.append(f"stderr, '{''.join(output['text']).strip()[:60]}'")
        data = {"text/plain": output.get("text", "")} | output.get("data", {})
        if WIDGET in data:
            found.append("a widget, which the site would ask another host to draw")
        for value in (value for kind, value in data.items() if not re.match(r"image/(?!svg)", kind)):
            text = re.sub(r"base64,[A-Za-z0-9+/=\s]+", "base64,", "".join(value) if isinstance(value, (str, list)) else json.dumps(value))
            found += [f"{what}, {match[0]!r}" for what, pattern in patterns.items() for match in re.finditer(pattern, text, re.MULTILINE)]
    if (size := len(nb2str(notebook).encode())) >= HEAVIEST:
        found.append(f"{size:,} bytes, where {HEAVIEST:,} are the most")
    return list(dict.fromkeys(" ".join(line.split()) for line in found))


# ---- making them -----------------------------------------------------------------------------------------------------
class Refused(Exception):
    "Why a page keeps its old outputs."


def cleaned(notebook: dict) -> None:
    "Keep what nbdev_clean keeps, and of widgets what can be seen without a kernel: a picture or HTML beside them."
    notebook["metadata"].pop("widgets", None)
    for cell in (cell for cell in notebook["cells"] if cell["cell_type"] == "code"):  # 'VBox(children=(...' says nothing
        cell["outputs"] = [output for output in cell["outputs"] if not {WIDGET} <= output.get("data", {}).keys() <= {WIDGET, "text/plain"}]
        for output in cell["outputs"]:
            output.get("data", {}).pop(WIDGET, None)
    config = get_config(path=ROOT)
    clean_nb(notebook, False, config.allowed_metadata_keys.split(), config.allowed_cell_metadata_keys.split(), config.clean_ids)


def execute(page: Path, notebook: dict, environment: dict[str, str]) -> None:
    "Give a notebook its new outputs, made in the folder of its page. Raises Refused if a cell does or it takes too long."
    # lab.notebooks.execute makes a run of a notebook with parameters: no cell can be left out, and nothing limits the time
    began, cells = time.monotonic(), [cell for cell in notebook["cells"] if executed(cell)]
    for cell in notebook["cells"]:
        cell.update({"outputs": []} if cell["cell_type"] == "code" else {})
    copy = nbformat.reads(json.dumps(notebook | {"cells": cells}), as_version=4)
    client = NotebookClient(copy, timeout_func=lambda cell: max(1, LIMIT - (time.monotonic() - began)), coalesce_streams=True,
                            store_widget_state=False, record_timing=False, resources={"metadata": {"path": str(page.parent)}},
                            extra_arguments=["--IPKernelApp.log_level=CRITICAL"])
    client.log.disabled = True  # says what is said here
    try:
        client.execute(env=environment, stderr=subprocess.DEVNULL)  # what the kernel itself says, not its cells
    except CellTimeoutError:
        raise Refused(f"not done after {LIMIT} s") from None
    except Exception as error:  # of a cell, or a kernel that died or would not start
        lines = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip().splitlines() or [type(error).__name__]
        raise Refused(lines[-1]) from None
    for cell, new in zip(cells, json.loads(nbformat.writes(copy))["cells"], strict=True):
        cell["outputs"] = new["outputs"]


def make(page: Path, environment: dict[str, str]) -> float:  # seconds
    "Give a page its new outputs, whole or not at all. Raises Refused, and the page is as it was."
    began, text, sources = time.monotonic(), page.read_text(encoding="utf-8"), sources_of(page)  # first: all may be edited while it runs
    notebook = json.loads(text)
    execute(page, notebook, environment)
    cleaned(notebook)
    notebook["metadata"][STAMP] = {"sources": sources, "outputs": outputs_of(notebook)}
    if found := unpresentable(notebook, HERE):
        raise Refused(f"its outputs hold {'; '.join(found[:3])}")
    if page.read_text(encoding="utf-8") != text:
        raise Refused("edited while it ran; once more, please")
    whole = page.with_name(f".{page.name}.part")
    try:
        whole.write_text(nb2str(notebook), encoding="utf-8")
        os.replace(whole, page)
    finally:
        whole.unlink(missing_ok=True)
    return time.monotonic() - began


# ---- what is made of them --------------------------------------------------------------------------------------------
def pictures(notebook: dict, label: str = "") -> list[bytes]:  # PNGs
    "The pictures of a notebook, or of its cell with this label."
    cells = [cell for cell in notebook["cells"] if not label or re.search(rf"^#\|\s*label:\s*{label}\s*$", source_of(cell), re.MULTILINE)]
    data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    return [base64.b64decode("".join(kinds["image/png"])) for kinds in data if "image/png" in kinds]


def reduced(png: bytes, width: int | None) -> bytes:  # PNG; None: as wide as it is
    "A picture on white, made small."
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image.thumbnail((width or image.width, image.height), Image.Resampling.LANCZOS)
    kept = io.BytesIO()
    image.save(kept, "PNG", optimize=True)
    return kept.getvalue()


def images() -> dict[str, bytes]:  # file name -> PNG
    "What nbs/images/ holds: a thumbnail of each paper's page and of the tour, and the picture of the front."
    found = {}
    for page in sorted((ROOT / "nbs").glob("0*_*.ipynb")):
        front = pictures(read(page), "front")[:1]
        found |= {"front.png": reduced(png, None) for png in front}
        found |= {f"{page.stem}.png": reduced(png, WIDTH) for png in (pictures(read(page), "card") or front or pictures(read(page)))[:1]}
    return found


def claimed(readme: str) -> str:
    "The README with the table of claims as results/ has it now."
    sys.path.insert(0, str(ROOT))
    from flatmin_nb.claims import markdown

    return CLAIMS.sub(lambda match: f"{match[1]}\n{markdown('nbs/').strip()}\n\n{match[2]}", readme)


def derived() -> bool:  # whether all could be made
    "Write nbs/images/ and the README's table of claims where they are not as the pages and the tables have it."
    readme, files, trouble = ROOT / "README.md", {ROOT / "nbs/images" / name: png for name, png in images().items()}, None
    if CLAIMS.search(text := readme.read_text(encoding="utf-8")):
        try:
            files[readme] = claimed(text).encode()
        except Exception as error:  # a table that is not there, say
            trouble = error
            print(f"README.md keeps its table of claims: {error}", file=sys.stderr)
    for path, content in files.items():
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            print(f"written: {path.relative_to(ROOT)}")
    return trouble is None


def make_all(wanted: dict[Path, str]) -> int:  # how many were refused
    "Make pages, several at a time. The texts say why, and are printed. After Ctrl-C nothing runs any more."
    refused, cores = 0, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with tempfile.TemporaryDirectory(prefix="flatmin_nb_") as scratch, ThreadPoolExecutor(min(cores, 8)) as pool:
        # the default scale: an empty folder of data, whatever this machine has; and nothing of the user's that a figure could depend on
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLATMIN_DATA": f"{scratch}/data", "WANDB_MODE": "disabled", "TZ": "UTC",
                       "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0", "IPYTHONDIR": f"{scratch}/ipython", "PYDEVD_DISABLE_FILE_VALIDATION": "1",
                       "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
        Path(scratch, "data").mkdir()
        running = {pool.submit(make, page, environment): page for page in wanted}
        try:
            for future in as_completed(running):
                name, reason = named(running[future]), wanted[running[future]]
                try:
                    print(f"{name}: {future.result():.1f} s ({reason})", flush=True)
                except Refused as error:
                    print(f"{name} keeps its old outputs: {error}", file=sys.stderr, flush=True)
                    refused += 1
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            while wait(running, timeout=0.2).not_done:  # again and again: a kernel may only just be starting
                for child in psutil.Process().children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
            raise
    return refused


def main(wanted: list[str]) -> int:  # names of pages, or --all; empty: those that are stale -> the exit status
    "Make what is stale, and say so in a line each."
    there = {named(page): page for page in pages()}
    asked = [re.sub(r"^(\./)?nbs/|\.ipynb$", "", name) for name in wanted if name != "--all"]
    if unknown := [name for name in asked if name not in there]:
        print(f"no page '{unknown[0]}'; the pages are {', '.join(there)}", file=sys.stderr)
        return 2
    reasons = {page: stale(page) for name, page in there.items() if "--all" in wanted or not asked or name in asked}
    to_do = {page: reason or "asked for" for page, reason in reasons.items() if reason or wanted}
    try:
        refused = make_all(to_do)
    except KeyboardInterrupt:
        print("stopped: pages that were not done keep their old outputs", file=sys.stderr)
        return 130
    print(f"{len(to_do) - refused} of {len(there)} pages made, {refused} refused, {len(there) - len(to_do)} left as they were")
    return int(not derived() or refused > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
