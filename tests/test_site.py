"""The site as far as it can be tested without Quarto: what nbdev makes of the notebooks, its links and pictures, and that no page asks another host for anything."""
import html
import importlib
import inspect
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(str(path.relative_to(ROOT / "nbs")) for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
MODULES = sorted(path for path in (ROOT / "flatmin_nb").rglob("*.py") if not path.name.startswith("_"))
BUILD = "from nbdev.quarto import refresh_quarto_yml as settings; from nbdev.serve import proc_nbs; settings(); proc_nbs(n_workers={})"
SETTINGS = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
PICTURES = ("image/png", "image/jpeg", "image/svg+xml")


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    "The pages as `nbdev_docs` hands them to Quarto, made of a copy."
    project = tmp_path_factory.mktemp("site")
    for name in ("settings.ini", "_quarto.yml"):
        shutil.copy(ROOT / name, project)
    for name in ("nbs", "flatmin_nb", "results"):
        shutil.copytree(ROOT / name, project / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "nbdev.yml"))
    environment = os.environ | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1", "FLATMIN_DATA": str(project / "data")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    made = subprocess.run([sys.executable, "-c", BUILD.format(min(cores, 8))], cwd=project, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    return project / "_proc"


def cells_of(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def joined(text: str | list[str]) -> str:
    return "".join(text)


def data_of(cell: dict) -> list[dict]:
    return [output.get("data", {}) for output in cell.get("outputs", [])]


def captioned(cell: dict) -> list[tuple[dict, str]]:
    "The outputs of a cell with the captions that Quarto gives them: each that is not a stream takes the next one, whatever it is."
    lines = [line.removeprefix("#|") for line in joined(cell["source"]).splitlines() if re.match(r"#\| *fig-cap *:", line)]
    captions = yaml.safe_load("\n".join(lines))["fig-cap"] if lines else []
    return list(itertools.zip_longest(filter(None, data_of(cell)), [captions] if isinstance(captions, str) else captions, fillvalue=""))


def without_blocks(text: str) -> str:
    "Markdown without its blocks of code; HTML that is meant as HTML stays."
    return re.sub(r"^(`{3,}|~{3,})([^\n]*)\n(.*?)^\1`*\s*$", lambda found: found[3] if "{=html}" in found[2] else "", text, flags=re.M | re.S)


def without_code(text: str) -> str:
    "Markdown without what stands in it as code, in blocks or in lines."
    return re.sub(r"(?<!`)(`+)(?!`)[^\n]*?(?<!`)\1(?!`)", "", without_blocks(text))


def text_of(notebook: Path) -> str:
    "What a reader of the page sees, code aside: its Markdown, the captions, and the outputs in Markdown or HTML."
    parts = []
    for cell in cells_of(notebook):
        if cell["cell_type"] == "markdown":
            parts.append(joined(cell["source"]))
        parts += [caption for _, caption in captioned(cell)]
        parts += [joined(data[kind]) for data in data_of(cell) for kind in ("text/markdown", "text/html", "image/svg+xml") if kind in data]
    return "\n\n".join(parts)


# ---- every page ----

def test_every_page_is_made_and_so_is_what_the_settings_name(site):
    assert sorted(str(path.relative_to(site)) for path in site.rglob("*.ipynb")) == PAGES
    themes = SETTINGS["format"]["html"]["theme"]
    own = [name for theme in themes.values() for name in theme if name != "default"]  # every other theme fetches fonts
    assert own and all((site / name).suffix == ".scss" and (site / name).is_file() for name in own)
    assert (site / SETTINGS["website"]["favicon"]).is_file()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_a_title_and_a_description(site, page):
    facts = yaml.safe_load(joined(cells_of(site / page)[0]["source"]).strip().strip("-"))
    assert facts["title"] and facts["description"]


# ---- links ----

def anchors(text: str) -> set[str]:
    "The identifiers that Pandoc gives the headings of a page, and those that are written down."
    found, times = set(re.findall(r"""\bid=["']([^"']+)""", text)), {}
    for heading in re.findall(r"^#{1,6} +(.+?)\s*#*$", without_blocks(text), re.M):
        if explicit := re.search(r"\{[^}]*#([\w-]+)[^}]*\}$", heading):
            found.add(explicit[1])
            continue
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading.replace("&#95;", "_"))
        name = re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", words.lower()).strip())) or "section"
        times[name] = times.get(name, -1) + 1
        found.add(f"{name}-{times[name]}" if times[name] else name)
    return found


def links(text: str) -> list[str]:
    "What a page links to or shows, on its own host."
    text = without_code(text)
    found = re.findall(r"\]\(<?([^)>\s]+)", text) + re.findall(r"""\b(?:href|src)=["']([^"']+)""", text)
    return [link for link in found if not re.match(r"(https?:|mailto:|data:|attachment:)", link)]


def broken(page: Path, site: Path) -> list[str]:
    "The links of a page that lead nowhere."
    lost = []
    for link in links(text_of(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_relative_to(site.resolve()) or not target.is_file():
            lost.append(link)
        elif anchor and target.suffix == ".ipynb" and anchor not in anchors(text_of(target)):
            lost.append(link)
    return lost


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_resolve(site, page):
    assert broken(site / page, site) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    text = "# A page\n\n## What $x$ is\n\n[a](b.ipynb) [b](#what-x-is) [c](#nothing) ![d](d.png) [e](https://e.org) [f](page.ipynb#a-page) `[g](g.ipynb)`\n\n```\n[h](h)\n```\n"
    (tmp_path / "page.ipynb").write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": text}]}))
    assert broken(tmp_path / "page.ipynb", tmp_path) == ["b.ipynb", "#nothing", "d.png"]


# ---- what can be seen has words ----

def alternative_texts(source: str) -> list[str]:
    "Those of a code cell's pictures."
    directives = [line.removeprefix("#|") for line in source.splitlines() if re.match(r"#\| *fig-alt *:", line)]
    found = yaml.safe_load("\n".join(directives)) if directives else {}
    return [text for texts in found.values() for text in (texts if isinstance(texts, list) else [texts])]


def wordless(cells: list[dict]) -> list[str]:
    "The pictures without alternative text: how the cells begin."
    found = []
    for cell in cells:
        source = joined(cell["source"])
        pictures = sum(any(kind in data for kind in PICTURES) for data in data_of(cell))
        texts = alternative_texts(source) if pictures else []
        directives_first = not re.search(r"^(?!#\||\s*$).*\n(.*\n)*?#\| *fig-alt", source, re.M)
        if pictures != len(texts) or any(len(text) < 20 for text in texts) or not directives_first:
            found.append(source[:80])
        seen = "\n".join([source if cell["cell_type"] == "markdown" else "", *(joined(data[kind]) for data in data_of(cell) for kind in ("text/html", "text/markdown") if kind in data)])
        seen = without_code(seen)
        found += [tag for tag in re.findall(r"<img\b[^>]*>", seen) if not re.search(r"""\balt=["'][^"']""", tag)]
        found += [tag for tag in re.findall(r"<svg\b[^>]*>", seen) if not re.search(r"""aria-label(ledby)?=["'][^"']|aria-hidden=["']true""", tag)]
        found += re.findall(r"!\[\s*\]\([^)]*\)", seen)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_picture_has_alternative_text(page):
    assert wordless(cells_of(ROOT / "nbs" / page)) == []


def test_a_picture_without_words_is_found():
    picture = {"data": {"image/png": "", "text/plain": "<Figure>"}}
    text = '#| fig-alt: "What is drawn: this against that."\n'
    cell = lambda source, *outputs: {"cell_type": "code", "source": source, "outputs": list(outputs)}
    assert wordless([cell(text + "draw()", picture), cell("#| fig-alt: [One picture of the two, The other one of the two]\n", picture, picture), cell("draw()")]) == []
    assert len(wordless([cell("draw()", picture), cell(text, picture, picture), cell("draw()\n" + text, picture), cell('#| fig-alt: "figure"\n', picture)])) == 4
    assert len(wordless([{"cell_type": "markdown", "source": "![](a.png) <img src='a.png'> <svg width='3'> ![a](a.png) <img src='a.png' alt='A'>"}])) == 3


# ---- captions ----

def is_picture(data: dict) -> bool:
    return any(kind in data for kind in PICTURES)


def balanced(text: str) -> bool:
    "Whether each bracket is closed, and none that was not opened."
    depths = list(itertools.accumulate({"[": 1, "]": -1}.get(one, 0) for one in text))
    return not depths or min(depths) >= 0 and depths[-1] == 0


def ill_captioned(cells: list[dict]) -> list[str]:
    "Captions that are missing, with an output that is no picture, said once more in the text, or not to be read: how the cells begin, or the captions."
    found, prose = [], " ".join(" ".join(joined(cell["source"]) for cell in cells if cell["cell_type"] == "markdown").split())
    for cell in cells:
        pairs = captioned(cell)
        for data, caption in pairs if any(is_picture(data) for data, _ in pairs) else []:
            if len(caption.split()) < 3 if is_picture(data) else caption:
                found.append(joined(cell["source"])[:80])
            if set(data) == {"text/plain"}:  # Quarto drops some of these, and with them goes the order of the captions
                found.append(joined(cell["source"])[:80])
            if caption and (caption in prose or not balanced(caption)):
                found.append(caption)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_picture_has_a_caption(site, page):
    assert ill_captioned(cells_of(site / page)) == []


def test_an_ill_caption_is_found():
    picture, table = {"data": {"image/png": "", "text/plain": "<Figure>"}}, {"data": {"text/markdown": "| a |"}}
    cell = lambda caption, *outputs: {"cell_type": "code", "source": f"#| fig-cap: {json.dumps(caption)}\nplot()", "outputs": list(outputs)}
    text = lambda source: {"cell_type": "markdown", "source": source}
    stream = {"output_type": "stream", "text": "1"}
    assert ill_captioned([cell("It rises to [1](a.ipynb).", stream, picture), text("It falls."), cell(["", "It falls and rises."], table, picture), cell([], table), text("*It*")]) == []
    assert len(ill_captioned([cell([], picture), text("*It rises to one.*"), cell("It.", picture)])) == 2
    assert len(ill_captioned([cell("It rises to one.", table, picture)])) == 2  # the table has it, the picture has none
    assert len(ill_captioned([cell("It rises to one.", picture), text("*It rises\nto one.*")])) == 1
    assert len(ill_captioned([cell("It rises to ]1[.", picture), cell("It rises to [0, 1).", picture)])) == 2
    assert len(ill_captioned([cell(["", "It rises to one."], {"data": {"text/plain": "[<Line2D>]"}}, picture)])) == 1


def in_html(markdown: str, what: str) -> str:  # what: named where Pandoc complains
    "Markdown as Pandoc reads it, for Quarto too."
    done = subprocess.run(["pandoc", "--from=markdown", "--to=html", "--mathml"], input=markdown, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, f"{what}: {done.stderr[:500]}"
    return done.stdout


@pytest.mark.skipif(not shutil.which("pandoc"), reason="needs Pandoc, which comes with Quarto")
def test_every_caption_is_read_as_the_italic_words_of_the_notebook(site):
    words = lambda read: " ".join(re.sub(r"<[^>]*>", "", read).split())
    for page in PAGES:
        pictures = [(caption, joined(cell["source"])) for cell in cells_of(site / page) for data, caption in captioned(cell) if is_picture(data)]
        written = ["![{}](a.png){{fig-alt='{}'}}".format(caption, alternative_texts(source)[0].replace("'", r"\'")) for caption, source in pictures]  # as by Quarto
        made = in_html("\n\n".join(written), page)
        figures = re.findall(r"<figure>(.*?)</figure>", made, flags=re.S)
        assert len(figures) == len(pictures) and not re.sub(r"<figure>.*?</figure>", "", made, flags=re.S).strip(), page
        captions = [re.findall(r"<figcaption\b[^>]*>(.*?)</figcaption>", figure, flags=re.S) for figure in figures]
        assert all(len(each) == 1 for each in captions), page
        for [caption], (source, _) in zip(captions, pictures):
            seen = words(re.sub(r"<(code|math)\b.*?</\1>", "", caption, flags=re.S))
            assert "\\" not in seen and seen.count("*") == without_code(source).count(r"\*"), f"{page}: {seen}"
        below = [joined(after["source"]).partition("\n\n")[0] for cell, after in itertools.pairwise(cells_of(ROOT / "nbs" / page)) if any(map(is_picture, data_of(cell)))]
        italic = re.findall(r"<p><em>(.*?)</em>", in_html("\n\n".join(below), page), flags=re.S)
        assert [words(caption) for [caption] in captions] == [words(one) for one in italic], page


# ---- nothing is asked of another host ----

def requests(text: str) -> list[str]:
    "What a page or a style sheet would load from elsewhere; links that a reader has to follow are none."
    kinds = (
        r"""<(?!a\b)[a-z]+\b[^>]*\b(?:src|srcset|href|data|poster|action)\s*=\s*["']?\s*(?:https?:)?//[^"'\s>]*""",
        r"""!\[[^]]*\]\(<?(?:https?:)?//[^)]*""", r"""@import\s+(?:url\()?["']?(?:https?:)?//[^;]*""", r"""url\(\s*["']?(?:https?:)?//[^)]*""",
        r"""\b(?:fetch|importScripts|import|require|open|WebSocket|EventSource)\(\s*["'`](?:https?:|wss?:)?//[^)]*""",
    )  # fmt: skip
    return [found for kind in kinds for found in re.findall(kind, text, flags=re.I)]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_loads_nothing_from_another_host(site, page):
    "Quarto adds scripts of other hosts to a page with an output of one of these kinds; `lab.site` rewrites the first."
    kinds = {kind for cell in cells_of(site / page) for data in data_of(cell) for kind in data}
    assert not kinds & {"text/html", "application/javascript", "application/vnd.jupyter.widget-view+json"}
    assert requests(without_code(text_of(site / page))) == []


def test_the_settings_and_style_sheets_load_nothing_from_another_host():
    settings = SETTINGS["format"]["html"]
    assert settings["html-math-method"] == "mathml" and set(settings["theme"]) == {"light", "dark"}
    policy = re.fullmatch(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', settings["include-in-header"][0]["text"].strip())[1]
    directives = {name: set(sources) for name, *sources in (directive.split() for directive in policy.split(";"))}
    beside_or_in_it = {"'self'", "file:", "data:", "blob:", "'unsafe-inline'"}  # file: for who opens the pages from a disk
    assert directives == {"default-src": beside_or_in_it} | dict.fromkeys(["base-uri", "form-action", "object-src"], {"'none'"})
    for path in (ROOT / "_quarto.yml", *(ROOT / "nbs").glob("*.scss"), *(ROOT / "nbs").rglob("*.svg")):
        assert requests(path.read_text(encoding="utf-8")) == [], path


def test_a_request_is_found():
    asked = ['<script src="https://a.org/a.js">', "<link rel=stylesheet href='//a.org/a.css'>", "![a](https://a.org/a.png)", "@import 'https://a.org/a.css';", "url(http://a.org/a.woff)", "fetch('https://a.org')"]
    assert all(requests(one) for one in asked)
    assert not requests("[a](https://a.org) <a href='https://a.org'> <img src='a.png'> url(a.woff) https://a.org <svg xmlns='http://www.w3.org/2000/svg'>")


# ---- the diary, the equations, the reference ----

def test_the_diary_is_a_listing_and_its_entries_have_what_it_shows(site):
    front_matter = lambda path: yaml.safe_load(joined(cells_of(path)[0]["source"]).strip().strip("-"))
    listing = front_matter(site / "diary/index.ipynb")["listing"]
    entries = sorted((site / "diary").glob(listing["contents"]))
    assert entries and {"date", "title", "description", "categories"} <= set(listing["fields"]) and listing["sort"] == "date desc"
    for entry in entries:
        facts = front_matter(entry)
        assert all(facts[field] for field in listing["fields"]), entry.name


@pytest.mark.skipif(not shutil.which("pandoc"), reason="needs Pandoc, which comes with Quarto")
def test_every_equation_becomes_mathml(site):
    for page in PAGES:
        # TeX that Pandoc did not understand stands on the page as it was written, between dollars; the annotations of MathML keep it too
        read = re.sub(r"<(code|pre|annotation|style|script)\b.*?</\1>|<[^>]*>", "", in_html(text_of(site / page), page), flags=re.S)
        assert "\\" not in read, f"{page}: {read[max(0, read.find(chr(92)) - 40):][:80]}"


def arguments(thing: type | Callable) -> list[str]:  # with the stars of *args and **options
    "What can be given to a function or a class, by Python itself."
    made_by = (thing.__new__ if issubclass(thing, tuple) else thing.__init__) if isinstance(thing, type) else thing
    names = [str(one.replace(annotation=one.empty, default=one.empty)) for one in inspect.signature(made_by).parameters.values()]
    names = names[isinstance(thing, type):]
    return [] if isinstance(thing, type) and names == ["*args", "**kwargs"] else names  # of Python's and PyTorch's own: they say nothing


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT / "flatmin_nb")))
def test_every_function_and_class_has_its_table_of_arguments(site, module):
    page = site / re.search(r"File to edit: (?:\.\./)*nbs/(.+\.ipynb)", module.read_text(encoding="utf-8"))[1]
    texts = [joined(data["text/markdown"]) for cell in cells_of(page) for data in data_of(cell) if "text/markdown" in data]
    shown = {found[1]: found[2] for text in texts if (found := re.match(r"---\n\n### (\w+)\n(.*)", text, re.S))}
    code = importlib.import_module(".".join(module.relative_to(ROOT).with_suffix("").parts))
    for name, thing in ((name, getattr(code, name)) for name in code.__all__):
        if (inspect.isclass(thing) or inspect.isfunction(inspect.unwrap(thing))) and thing.__module__ == code.__name__ and thing.__name__ == name:
            table = re.search(r'<div class="parameters">(.*?)</div>|$', shown[name], re.S)[1] or ""
            assert [html.unescape(row) for row in re.findall(r"^\| <code>(.+?)</code> \| ", table, re.M)] == arguments(thing), name
