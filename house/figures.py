"""What `make figures` runs: it makes the committed outputs of the pages anew where something that they come from has changed.

`figures.py` executes the stale pages, `figures.py --all` all of them, `figures.py 02_entropy_sgd lab/curvature` these, stale or not.
Then it makes nbs/images/ and the README's table of claims from what is committed. Each page carries a digest of every part
that its outputs come from, in its metadata under `outputs_of`; a page is stale where one of them is another now. The parts:

- the code of its cells, but for those marked `#| eval: false`, which are not executed here either and have no outputs;
- the modules of the package that it imports, names in a string, or that these import, wherever the import stands;
- the files of results/ that it or its modules name, and the notebooks that its cells name;
- the outputs themselves, so that those of a run by hand, with other data perhaps, do not pass for these.

Of code, comments, docstrings and formatting do not count. The versions of Python and of the libraries are not a part: `--all` after
a change of constraints.txt.
"""
import ast
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
from concurrent.futures import ThreadPoolExecutor, wait
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMP = "outputs_of"  # the key of the metadata; settings.ini allows it, or nbdev_clean would take it away
LIMIT = 600  # seconds that a page may take
HEAVIEST = 1_500_000  # bytes of a page
WIDTH = 480  # pixels of a thumbnail
WIDGET = "application/vnd.jupyter.widget-view+json"
CLAIMS = re.compile(r"(<!-- claims: begin -->\n).*?(<!-- claims: end -->)", re.DOTALL)


def pages(
    root: Path = ROOT,  # the project
) -> list[Path]:  # the notebooks of nbs/
    "Every page there is."
    return sorted(path for path in (root / "nbs").rglob("*.ipynb") if not any(part.startswith(".") for part in path.relative_to(root).parts))


def named(
    page: Path,
    root: Path = ROOT,
) -> str:  # 'lab/curvature'
    "A page by the name that it is asked for with."
    return page.relative_to(root / "nbs").with_suffix("").as_posix()


def read(
    page: Path,
) -> dict:
    "A notebook. One that cannot be read ends everything, in one line."
    try:
        return json.loads(page.read_text(encoding="utf-8"))
    except ValueError as error:
        sys.exit(f"{page.name} is no notebook: {error}; was a merge left half done?")


# ---- what outputs come from ------------------------------------------------------------------------------------------

def shape(
    node: object,  # of a syntax tree: a node, a list of nodes, or a value
) -> str:
    "The code as text without comments and formatting. Unlike ast.dump and ast.unparse, the same in each version of Python."
    if isinstance(node, list):
        return f"[{', '.join(map(shape, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if name not in {"ctx", "kind", "type_comment"}}
    if isinstance(node, ast.JoinedStr):  # 3.12 ends some formats with an empty string
        fields["values"] = [part for part in node.values if not (isinstance(part, ast.Constant) and part.value == "")]
    # what is empty is left out: newer versions have fields that older ones have not
    return f"{type(node).__name__}({', '.join(f'{name}={shape(value)}' for name, value in fields.items() if value not in (None, []))})"


@lru_cache(maxsize=None)
def code(
    source: str,  # of a module or of a cell
    cell: bool,
) -> ast.Module:  # without docstrings and the number of the package's version
    "The syntax tree of some code. What is no Python, a cell of bash say, is one string in it."
    def magic(match):
        return f"{match[1]}magic({match[2]!r})"
    for text in (source, re.sub(r"^([ \t]*)([%!].*)", magic, source, flags=re.MULTILINE), f"magic({source!r})"):
        try:
            tree = ast.parse(text)
            break
        except SyntaxError:
            continue
    if cell and source.rstrip().endswith(";"):  # IPython shows nothing then, and the tree does not know it
        tree.body.append(ast.Expr(ast.Constant(";")))
    for node in ast.walk(tree):
        # a string that stands alone at the end of a cell is an output
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef) if cell else (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
            if ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
    tree.body = [node for node in tree.body if not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__")]
    return tree


def executed(
    cell: dict,
) -> bool:
    "Whether a cell is executed when outputs are made."
    return cell["cell_type"] == "code" and not re.search(r"^#\|\s*eval:\s*false\s*$", "".join(cell["source"]), re.MULTILINE)


@lru_cache(maxsize=None)
def words(
    tree: ast.Module,
) -> frozenset[str]:  # each f-string with a * for each of its values
    "The strings in some code."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and node.values and isinstance(node.values[0], ast.Constant):  # else it would match everything
            found.add("".join(part.value if isinstance(part, ast.Constant) else "*" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return frozenset(found)


@lru_cache(maxsize=None)
def imported(
    tree: ast.Module,
    package: tuple[str, ...],  # that the code stands in, for relative imports; empty for a page
    root: Path,
) -> frozenset[Path]:
    "The modules of the package that some code imports, in functions too, or names in a string."
    names = {name for text in words(tree) for name in re.findall(r"\bflatmin_nb(?:\.\w+)*", text)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) + 1 - node.level] if node.level else ()
            start = ".".join([*above, *filter(None, [node.module])])
            names |= {start} | {f"{start}.{alias.name}" for alias in node.names}
    found = set()
    for steps in (name.split(".") for name in names if name.split(".")[0] == "flatmin_nb"):
        for end in range(1, len(steps) + 1):  # a.b.c runs a and a.b first
            path = root.joinpath(*steps[:end])
            found |= {file for file in (path / "__init__.py", path.with_name(f"{path.name}.py")) if file.is_file()}
    return frozenset(found)


def tables(
    strings: frozenset[str],  # of some code
    root: Path,
) -> set[Path]:
    "The files of results/ that some code names; all of them where it speaks of results/ and names none."
    strings = {text for text in strings if "\n" not in text}
    if not any(re.search(r"(^|/)results(/|$)", text) for text in strings):
        return set()
    there = {path for path in (root / "results").rglob("*") if path.suffix in {".csv", ".json"}}
    patterns = {re.sub(r"^.*\bresults/|^\W*/", "", text) for text in strings}
    patterns = {pattern for pattern in patterns if re.search(r"\w\w\w", pattern)}  # no '**' of Markdown
    names = {path: (path.relative_to(root / "results").as_posix(), path.name, path.stem) for path in there}
    return {path for path in there if any(fnmatchcase(name, pattern) for name in names[path] for pattern in patterns)} or there


def digest(
    *texts: str,
) -> str:
    "Eight hexadecimal digits."
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:8]


@lru_cache(maxsize=None)
def fingerprint(
    tree: ast.Module,
) -> str:
    "The digest of some code."
    return digest(shape(tree))


def outputs_of(
    notebook: dict,
) -> str:
    "The outputs as text, however their lines are kept."
    whole = [{key: "".join(value) if isinstance(value, list) else value for key, value in (output | output.get("data", {})).items()
              if key not in {"data", "metadata", "execution_count"}} for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return json.dumps(whole, sort_keys=True)


def parts(
    page: Path,
    notebook: dict,  # what stands in it
    root: Path = ROOT,
) -> dict[str, str]:  # what a part is called -> its digest
    "Everything that the outputs of a page come from, and the outputs."
    cells = [code("".join(cell["source"]), True) for cell in notebook["cells"] if executed(cell)]
    strings = frozenset().union(*(words(tree) for tree in cells))
    modules, files = {}, tables(strings, root)
    waiting = set().union(*(imported(tree, (), root) for tree in cells))
    while waiting:
        path = waiting.pop()
        modules[path] = code(path.read_text(encoding="utf-8"), False)
        waiting |= imported(modules[path], path.relative_to(root).parts[:-1], root) - modules.keys()
        files |= tables(words(modules[path]), root)
    found = {"its code": digest(*(fingerprint(tree) for tree in cells if tree.body))}
    found |= {path.relative_to(root).as_posix(): fingerprint(tree) for path, tree in modules.items() if tree.body}
    found |= {path.relative_to(root).as_posix(): digest(path.read_text(encoding="utf-8")) for path in files}
    names = {text.rpartition("/")[2] for text in strings if text.endswith(".ipynb")}
    for other in pages(root):  # read as a table is, text and all
        if other != page and any(fnmatchcase(other.name, name) for name in names):
            content = read(other)["cells"]
            found[other.relative_to(root).as_posix()] = digest(*("".join(cell["source"]) for cell in content))
    return dict(sorted(found.items())) | {"its outputs": digest(outputs_of(notebook))}


def stale(
    page: Path,
    root: Path = ROOT,
) -> list[str]:  # what has changed since the outputs were made; empty: they are fresh
    "Why a page has to be executed anew."
    notebook = read(page)
    made, now = notebook["metadata"].get(STAMP), parts(page, notebook, root)
    if not isinstance(made, dict):
        return ["its outputs were not made by make figures"]
    return [f"{part} changed" for part in sorted(made.keys() | now.keys()) if made.get(part) != now.get(part)]


# ---- what outputs may be ---------------------------------------------------------------------------------------------

UNPRESENTABLE = {
    "the path of a machine": r"(?<![\w.~$}<])/(?:tmp|home|root|Users|work|workspace|mnt|private|var/folders)\b[^\s'\"<]*|\b[A-Za-z]:\\+Users\b[^\s'\"<]*",
    "an escape sequence": r"\x1b\[?[\d;]*\w?",
    "the address of an object": r"\bat 0x[0-9a-fA-F]{6,}",
    "a traceback": r"Traceback \(most recent call last\)",
    "a warning": r"\b[A-Z]\w*Warning: .{,60}|^WARNING\b.{,60}",
    "something of another host": r"<(?:script|img|iframe|link|source|video)\b[^>]*\b(?:src|href)\s*=\s*[\"']?(?:https?:)?//[^>]{,60}|@import\b.{,60}|url\([\"']?https?:.{,60}",
}


def unpresentable(
    notebook: dict,
    here: tuple[str, ...] = (),  # what names this machine
) -> list[str]:  # empty: it can be shown
    "What is in the outputs that nobody should see."
    found = [f"state of widgets, {len(json.dumps(notebook['metadata']['widgets']))} bytes of it"] if "widgets" in notebook["metadata"] else []
    patterns = UNPRESENTABLE | ({"the name of this machine": rf"(?<!\w)(?:{'|'.join(map(re.escape, here))})(?!\w)"} if here else {})
    for output in (output for cell in notebook["cells"] for output in cell.get("outputs", [])):
        if output["output_type"] == "error":
            found.append(f"an error, {output['ename']}")
        if output.get("name") == "stderr":
            found.append(f"stderr, '{''.join(output['text']).strip()[:60]}'")
        data = {"text/plain": output.get("text", "")} | output.get("data", {})
        if WIDGET in data:
            found.append("a widget, which the site would ask another host to draw")
        for text in (value if isinstance(value, str) else "".join(value) if isinstance(value, list) else json.dumps(value)
                     for kind, value in data.items() if not re.match(r"image/(?!svg)", kind)):
            text = re.sub(r"base64,[A-Za-z0-9+/=\s]+", "base64,", text)
            for what, pattern in patterns.items():
                found += [f"{what}, {match[0]!r}" for match in re.finditer(pattern, text, re.MULTILINE)]
    size = len(written(notebook).encode())
    found = list(dict.fromkeys(" ".join(line.split()) for line in found))
    return found + [f"{size:,} bytes, where {HEAVIEST:,} are the most"] * (size >= HEAVIEST)


def this_machine() -> tuple[str, ...]:
    "What would give this machine away; a host's name that is a plain word would be found everywhere."
    host = socket.gethostname().partition(".")[0]
    return tuple(name for name in (host, str(ROOT), str(Path.home()), sys.prefix) if len(name) > 5 and not name.isalpha())


# ---- making them -----------------------------------------------------------------------------------------------------

def written(
    notebook: dict,
) -> str:
    "A notebook as nbdev_clean writes it."
    return json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def cleaned(
    notebook: dict,
) -> dict:
    "What nbdev_clean keeps, and of widgets what can be seen without a kernel: a picture or HTML beside them."
    from configparser import ConfigParser

    from nbdev.clean import clean_nb

    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    allowed = settings["DEFAULT"]
    notebook["metadata"].pop("widgets", None)
    for cell in (cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        for output in cell["outputs"]:
            if output.get("data", {}).pop(WIDGET, None):
                output["data"] = output["data"] if output["data"].keys() - {"text/plain"} else {}  # 'VBox(children=(...' says nothing
        cell["outputs"] = [output for output in cell["outputs"] if output.get("data", True)]
    clean_nb(notebook, False, allowed["allowed_metadata_keys"].split(), allowed["allowed_cell_metadata_keys"].split())
    return notebook


class Refused(Exception):
    "Why a page keeps its old outputs."


class Maker:
    "Executes pages, several at a time, and can be stopped."

    def __init__(self, scratch: Path):
        self.clients, self.stopped = [], False
        (scratch / "data").mkdir()
        # the default scale: no real data, whatever this machine has; and nothing of the user's that a figure could depend on
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLATMIN_DATA": str(scratch / "data"), "WANDB_MODE": "disabled",
                            "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0", "TZ": "UTC", "IPYTHONDIR": str(scratch / "ipython"),
                            "PYDEVD_DISABLE_FILE_VALIDATION": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}

    def outputs(
        self,
        page: Path,
        text: str,  # the notebook
    ) -> list[list[dict]]:  # of each cell
        "Execute a page in its folder. Raises Refused if a cell does or it takes too long."
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellTimeoutError

        notebook, began = nbformat.reads(text, as_version=4), time.monotonic()
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = []
                if not executed(cell):
                    cell.metadata.tags = ["skip-execution"]
        client = NotebookClient(notebook, timeout_func=lambda cell: max(1, LIMIT - (time.monotonic() - began)), coalesce_streams=True,
                                store_widget_state=False, record_timing=False, resources={"metadata": {"path": str(page.parent)}},
                                extra_arguments=["--IPKernelApp.log_level=CRITICAL"])
        client.log.disabled = True  # says what is said here
        self.clients.append(client)
        if self.stopped:
            raise Refused("stopped")
        try:
            client.execute(env=self.environment, stderr=subprocess.DEVNULL)  # what the kernel itself says, not its cells
        except CellTimeoutError:
            raise Refused(f"not done after {LIMIT} s") from None
        except Exception as error:  # of a cell, or a kernel that died or would not start
            lines = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip().splitlines() or [type(error).__name__]
            raise Refused(lines[-1]) from None
        return [cell.get("outputs", []) for cell in json.loads(nbformat.writes(notebook))["cells"]]

    def make(
        self,
        page: Path,
    ) -> str:  # what came of it
        "Give a page its new outputs, whole or not at all. Raises Refused, and the page is as it was."
        text, began = page.read_text(encoding="utf-8"), time.monotonic()
        notebook = json.loads(text)
        stamp = parts(page, notebook)  # of what is about to be executed, not of what may be edited meanwhile
        for cell, outputs in zip(notebook["cells"], self.outputs(page, text), strict=True):
            if cell["cell_type"] == "code":
                cell["outputs"] = outputs
        cleaned(notebook)
        notebook["metadata"][STAMP] = stamp | {"its outputs": digest(outputs_of(notebook))}
        if found := unpresentable(notebook, this_machine()):
            raise Refused(f"its outputs hold {'; '.join(found[:3])}")
        if page.read_text(encoding="utf-8") != text:
            raise Refused("edited while it ran; once more, please")
        whole = page.with_name(f".{page.name}.part")
        try:
            whole.write_text(written(notebook), encoding="utf-8")
            os.replace(whole, page)
        finally:
            whole.unlink(missing_ok=True)
        return f"{time.monotonic() - began:.1f} s"

    def stop(self) -> None:
        "End the kernels; their pages keep what they had."
        self.stopped = True
        for client in self.clients:
            if client.km and client.km.provisioner and client.km.provisioner.process:
                client.km.provisioner.process.kill()


# ---- what is made of them --------------------------------------------------------------------------------------------

def picture(
    notebook: dict,
    label: str = "",  # of the cell, `#| label: fig-front`; empty: the first that has one
) -> bytes | None:  # PNG; None if there is none
    "A picture out of a notebook's outputs."
    for cell in notebook["cells"]:
        if not label or re.search(rf"^#\|\s*label:\s*{label}\s*$", "".join(cell["source"]), re.MULTILINE):
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    return base64.b64decode("".join(output["data"]["image/png"]))


def reduced(
    png: bytes,
    width: int | None,  # pixels; None: as it is
) -> bytes:  # PNG
    "A picture on white, made small: in pixels, and in 256 colours where nobody sees it."
    from PIL import Image, ImageChops, ImageStat

    image = Image.open(io.BytesIO(png)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if width and image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    few = image.quantize(256, dither=Image.Dither.NONE)
    unseen = max(ImageStat.Stat(ImageChops.difference(image, few.convert("RGB"))).rms) < 2  # of 255
    kept = io.BytesIO()
    (few if unseen else image).save(kept, "PNG", optimize=True)
    return kept.getvalue()


def images(
    root: Path = ROOT,
) -> dict[str, bytes]:  # file name -> PNG
    "What nbs/images/ holds: a thumbnail of each paper's page and of the tour, and the picture of the front."
    found = {}
    for page in sorted((root / "nbs").glob("0*_*.ipynb")):
        notebook = read(page)
        front = picture(notebook, "fig-front")
        if first := front or picture(notebook):
            found[f"{page.stem}.png"] = reduced(first, WIDTH)
        if front:
            found["front.png"] = reduced(front, None)
    return found


def far(
    one: bytes,  # PNG
    other: bytes,  # PNG
) -> float:  # root mean square of the difference, of 255; infinite if they are of different sizes
    "How unlike two pictures are. Their bytes may differ though no pixel does, between versions of zlib."
    from PIL import Image, ImageChops, ImageStat

    first, second = (Image.open(io.BytesIO(png)).convert("RGB") for png in (one, other))
    return max(ImageStat.Stat(ImageChops.difference(first, second)).rms) if first.size == second.size else float("inf")


def derived() -> list[str]:  # what was written
    "Write nbs/images/ and the README's table of claims where they are not as the pages and the tables have it."
    folder, done = ROOT / "nbs/images", []
    new = images()
    if "front.png" not in new:
        print("nbs/images/front.png: no page has a picture in a cell labelled fig-front")
    for name, png in new.items():
        path = folder / name
        if not path.exists() or far(path.read_bytes(), png) > 0:
            folder.mkdir(exist_ok=True)
            path.write_bytes(png)
            done.append(f"nbs/images/{name}")
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if CLAIMS.search(before):
        try:
            after = claimed(before)
        except Exception as error:  # a table that is not there, say
            raise Refused(f"README.md keeps its table of claims: {error}") from None
        if after != before:
            readme.write_text(after, encoding="utf-8")
            done.append("README.md")
    return done


def claimed(
    readme: str,
) -> str:
    "The README with the table of claims as results/ has it now."
    sys.path.insert(0, str(ROOT))
    from flatmin_nb.claims import markdown

    return CLAIMS.sub(lambda match: f"{match[1]}\n{markdown('nbs/').strip()}\n\n{match[2]}", readme)


def main(
    wanted: list[str],  # names of pages, or --all; empty: those that are stale
) -> int:  # the exit status
    "Make what is stale, and say so in a line each."
    there = {named(page): page for page in pages()}
    asked = [re.sub(r"^(\./)?nbs/|\.ipynb$", "", name) for name in wanted if name != "--all"]
    if unknown := [name for name in asked if name not in there]:
        print(f"no page '{unknown[0]}'; the pages are {', '.join(there)}", file=sys.stderr)
        return 2
    reasons = {name: stale(page) for name, page in there.items() if "--all" in wanted or not asked or name in asked}
    to_do = [name for name in reasons if reasons[name] or wanted]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    failed = []

    with tempfile.TemporaryDirectory(prefix="flatmin_nb_") as scratch:
        maker = Maker(Path(scratch))

        def made(name):
            try:
                print(f"{name}: {maker.make(there[name])} ({', '.join(reasons[name]) or 'asked for'})", flush=True)
            except Refused as error:
                if not maker.stopped:
                    failed.append(name)
                    print(f"{name} keeps its old outputs: {error}", file=sys.stderr, flush=True)

        with ThreadPoolExecutor(min(cores, 8)) as pool:
            running = [pool.submit(made, name) for name in to_do]
            try:
                for future in running:
                    future.result()
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                while wait(running, timeout=0.2).not_done:  # a kernel may only just be starting
                    maker.stop()
                print("stopped: pages that were not done keep their old outputs", file=sys.stderr)
                return 130
    try:
        done, kept = derived(), False
    except Refused as error:
        done, kept = [], True
        print(error, file=sys.stderr)
    print(f"{len(to_do) - len(failed)} of {len(there)} pages made, {len(failed)} refused, {len(there) - len(to_do)} left as they were"
          + (f"; written: {', '.join(done)}" if done else ""))
    return bool(failed or kept)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
