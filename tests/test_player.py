"""What lab.player puts into a page: positions that can be read back, labels that stay text, and nothing from anywhere else."""
import base64
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from flatmin_nb.lab.player import BUILDING, CHOOSING, CONTROLS, DRAWING, SCRIPT, STYLE, PlayerError, Track, background, embedded, player
from matplotlib.figure import Figure
from PIL import Image

NASTY = "</script><img src=x onerror=alert(1)>&amp;\"'\u2028"


def axes(size=(4, 2), **limits):
    "Axes that fill a figure of 100 dots an inch, so that an independent formula says where a number lies."
    figure = Figure(figsize=size, dpi=100)
    ax = figure.add_axes([0, 0, 1, 1])
    ax.set(**{"xlim": (0, 4), "ylim": (-1, 1)} | limits)
    return ax


class Page(HTMLParser):
    "The elements, and the text of scripts."

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.scripts, self.words, self._in = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._in = tag

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, data):
        (self.scripts if self._in == "script" else self.words).append(data)

    @property
    def told(self) -> dict:
        return json.loads(self.scripts[0])


def page(settings=None, ax=None, **options) -> Page:
    return Page(player(ax or axes(), settings or {"": [Track("ball", [[0, 0]])]}, **{"about": "a ball"} | options).html)


def test_positions_and_widths_are_read_back():
    random = np.random.default_rng(0)
    positions, widths = random.uniform([0, -1], [4, 1], (30, 2)), random.uniform(0.1, 0.5, (30, 2))
    told = page({"": [Track("ball", positions, "C3", widths=widths)]}).told["settings"][0]["tracks"][0]
    points, radii = np.array(told["points"]), np.array(told["radii"])
    np.testing.assert_allclose(points * [4 / 400, -2 / 200] + [0, 1], positions, atol=0.051 * 0.01)
    np.testing.assert_allclose(radii * [4 / 400, 2 / 200], widths, atol=0.11 * 0.01)
    assert told["colour"] == "#d62728"


def test_logarithmic_axes():
    told = page({"": [Track("ball", [[1, 1], [10, 100]])]}, axes(xscale="log", yscale="log", xlim=(1, 100), ylim=(1, 100))).told
    assert told["settings"][0]["tracks"][0]["points"] == [[0, 200], [200, 0]]


def test_labels_stay_text():
    plain = page({("a", "b"): [Track("c", [[0, 0]], notes=["d"])]}, knobs=["e", "f"], unit="g", about="h")
    nasty = page({(NASTY, NASTY): [Track(NASTY, [[0, 0]], notes=[NASTY])]}, knobs=[NASTY, NASTY + "2"], unit=NASTY, about=NASTY)
    kinds = lambda one: [(tag, sorted(attributes)) for tag, attributes in one.elements]
    assert kinds(nasty) == kinds(plain)  # no element and no attribute more
    assert nasty.told["settings"][0] | {"tracks": []} == {"key": [NASTY, NASTY], "tracks": []}
    assert (nasty.told["settings"][0]["tracks"][0]["name"], nasty.told["unit"]) == (NASTY, NASTY)
    assert len(nasty.scripts) == len(plain.scripts) == 2
    assert (nasty.told["about"], nasty.told["knobs"]) == (NASTY, [NASTY, NASTY + "2"])
    assert nasty.elements[0][1]["aria-label"] == NASTY and nasty.elements[1][1]["alt"].startswith(NASTY)


@pytest.mark.parametrize("value", [NASTY, {"<!--": ["<script>", "]]>"]}, [1.5, None, "ü"]])
def test_embedded_json_cannot_end_its_element(value):
    text = embedded(value)
    assert json.loads(text) == value and not re.search(r"[<>&\u2028\u2029]", text)


SVG = "http://www.w3.org/2000/svg"  # the name of a language, which nobody asks for


def test_nothing_comes_from_another_host_and_nothing_clashes():
    text = player(axes(), {"": [Track("ball", [[0, 0], [1, 1]])]}, about="a ball").html
    assert text.count(SVG) == 1
    text = text.replace(SVG, "")
    assert "http" not in text and "//" not in re.sub(r"base64,[^\"]*", "", text)
    assert not re.search(r"\sid=|getElementById|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|import\(", text)
    for tag, attributes in Page(text).elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert attributes.get("src", "data:").startswith("data:image/png;base64,") == (tag == "img") and "href" not in attributes


def picture(shown) -> Image.Image:
    "What a page shows where scripts do not run."
    (address,) = [attributes["src"] for tag, attributes in shown.elements if tag == "img"]
    return Image.open(io.BytesIO(base64.b64decode(address.partition("base64,")[2]))).convert("RGB")


def test_without_scripts_there_are_an_image_and_a_sentence():
    "Whatever else HTML can do, Jupyter takes out of a notebook that it does not trust: a control that is left would be dead."
    settings = {("x",): [Track("ball", [[0, 0], [1, 0.5]], "red"), Track("cloud", [[4, 0], [3, 0]], "blue", widths=[[1, 1], [0.5, 0.5]])], ("y",): [Track("other", [[0, 0]])]}
    shown = page(settings, knobs=["kind"])
    assert [tag for tag, _ in shown.elements] == ["div", "img", "p", "script", "script"]
    assert " ".join(shown.words).split() == "Where scripts run, this can be stepped through; in Jupyter: Run → Run All Cells.".split()
    assert shown.elements[1][1]["alt"] == "a ball: x, the whole way of ball, cloud"


def test_the_still_is_the_last_frame_and_the_figure_is_left_alone():
    ax = axes()
    ax.set_axis_off()
    before = ax.figure.get_children(), background(ax.figure)
    still = picture(page({"": [Track("ball", [[0, -1], [2, 0]], "#ff0000", widths=[[1, 1], [1, 0.5]])]}, ax))
    assert still.size == (400, 200)
    assert still.getpixel((200, 100)) == (255, 0, 0) and still.getpixel((100, 150))[1] < 200 < still.getpixel((100, 140))[1]  # the dot; the way, and beside it
    assert min(still.getpixel((300, 60))) > 245 and np.abs(np.subtract(still.getpixel((270, 100)), (255, 191, 191))).max() < 10  # the cloud, a quarter as strong
    assert (ax.figure.get_children(), background(ax.figure)) == before
    widest = lambda size: (np.array(picture(page({"": [Track("ball", [[2, 0]], "#ff0000", size=size)]}, ax)))[100] == (255, 0, 0)).all(-1).sum()
    assert widest(3) > 2.5 * widest(1) > 0


def test_the_names_stand_in_the_still_where_there_are_several():
    ax = axes()
    ax.set_axis_off()
    lines = lambda *names: np.array(picture(page({"": [Track(name, [[0, 0]], "red") for name in names]}, ax)).crop((250, 0, 400, 60)))
    assert (lines("a") == 255).all() and (lines("a", "b $x^2$") < 255).any()


def test_rare_colours_survive_in_the_still():
    ax = axes()
    ax.imshow(np.random.default_rng(0).uniform(size=(50, 100, 3)), extent=(0, 4, -1, 1))  # more colours than a palette holds
    still = picture(page({"": [Track(name, [[x, -0.5], [x, 0.5]], name) for x, name in ((1, "#ff00ff"), (3, "#00ff00"))]}, ax))
    assert np.abs(np.subtract([still.getpixel((x, 50)) for x in (100, 300)], [(255, 0, 255), (0, 255, 0)])).max() < 40


def test_positions_that_nothing_joins_are_marks():
    ax = axes()
    ax.set_axis_off()
    still = picture(page({"": [Track("ball", [[0.5, 0], [1.5, 0], [3, 0]], "#ff0000", joined=False)]}, ax))
    assert [still.getpixel((x, 100))[1] < 200 for x in (50, 100, 150, 225, 300)] == [True, False, True, False, True]


def test_the_background_is_the_figure():
    ax = axes()
    ax.axvspan(2, 4, color="red")
    picture = Image.open(io.BytesIO(background(ax.figure))).convert("RGB")
    assert picture.size == (400, 200) and picture.getpixel((300, 100)) == (255, 0, 0) and picture.getpixel((100, 100)) == (255, 255, 255)


def test_the_background_keeps_its_margins_whatever_matplotlib_was_told():
    figure = axes().figure
    with matplotlib.rc_context({"savefig.bbox": "tight", "savefig.pad_inches": 0.5}):
        assert Image.open(io.BytesIO(background(figure))).size == (400, 200)


def test_the_pieces_of_the_script_fit_together():
    "None is missing, and its brackets close."
    assert all(piece in SCRIPT for piece in (BUILDING, DRAWING, CHOOSING, CONTROLS)) and f'"{STYLE}"' in SCRIPT
    bare = re.sub(r'"[^"\n]*"', "", SCRIPT)
    assert [bare.count(one) for one in "({["] == [bare.count(one) for one in ")}]"]
    for called in ("filled", "make", "put", "button", "show", "choose", "fill", "stop", "move", "tick", "place", "called"):
        assert len(re.findall(rf"const {called} = ", SCRIPT)) == 1 and len(re.findall(rf"\b{called}\b", bare)) > 1


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
READER = """<script>
const seen = {}, root = document.querySelector(".flatmin-player"), part = name => root.querySelector(`[data-part=${name}]`);
const texts = kind => [...root.querySelectorAll(kind)].map(element => element.textContent);
const note = name => { seen[name] = {
  said: part("said").textContent, live: part("said").getAttribute("aria-live"),
  valuetext: part("step").getAttribute("aria-valuetext"), play: part("play").getAttribute("aria-label"),
  dots: [...root.querySelectorAll("circle")].map(dot => ["cx", "cy"].map(side => +dot.getAttribute(side))),
  ways: [...root.querySelectorAll("path")].map(way => way.getAttribute("d")),
  sizes: [...root.querySelectorAll("circle")].map(dot => +dot.getAttribute("r")),
  names: [...root.querySelectorAll("button, input, select, svg")].map(part => part.getAttribute("aria-label") ?? part.parentElement.firstChild.textContent),
  own: [...root.querySelectorAll("button, input, select")].filter(part => part.dataset.lmSuppressShortcuts !== "true").length,
  stills: root.querySelectorAll("img, p").length, keys: keys.length,
  clouds: root.querySelectorAll("ellipse").length, legend: texts("li"), focus: document.activeElement.dataset.part,
  ends: ["back", "on"].map(name => part(name).getAttribute("aria-disabled")),
  boxes: [...root.querySelectorAll("select")].map(box => [...box.options].map(option => option.text)),
}; };
const svg = root.querySelector("svg"), captured = [], keys = [];
document.addEventListener("keydown", event => keys.push(event.key));
svg.setPointerCapture = id => captured.push(id);
const pointer = (kind, x, more) => svg.dispatchEvent(new PointerEvent(kind, {clientX: x, isPrimary: true, pointerId: 1, ...more}));
STEPS
document.body.innerHTML = ""; document.body.textContent = JSON.stringify({...seen, captured});
</script>"""


def in_a_browser(tmp_path, shown, steps: str) -> dict:
    "What a reader finds in the page after each step that he notes."
    (tmp_path / "page.html").write_text(f'<meta charset="utf-8">{shown.html}{READER.replace("STEPS", steps)}')
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *options, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=90)
    body = re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)
    return json.loads(body[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser(tmp_path):
    way = [[0, -1], [1, 0], [2, 0], [4, 1]]
    ball = lambda name, size=1.0: Track(name, way, notes=["one", "two", "three", "four"], size=size)
    settings = {("x", "1"): [ball("a <b>", 2.0), ball("b")], ("x", "2"): [ball("c")], ("y", "3"): [Track("d", way[:2], widths=way[2:], joined=False)]}
    seen = in_a_browser(tmp_path, player(axes(), settings, knobs=["letter", "number"], about="balls"), """
    note("at first");
    part("back").focus(); for (let click = 0; click < 5; click++) part("back").click(); note("back");
    part("on").click(); note("on");
    for (const one of root.querySelectorAll("button, input, select")) one.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown", bubbles: true}));
    note("keys"); document.body.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown", bubbles: true})); note("elsewhere");
    part("step").focus(); part("step").value = 2; part("step").dispatchEvent(new Event("input")); note("slider");
    pointer("pointerdown", 0, {button: 2}); pointer("pointermove", 4000, {buttons: 2}); pointer("pointerup", 0); note("second button");
    pointer("pointerdown", 100, {button: 0}); pointer("pointermove", -9000, {buttons: 1}); pointer("pointerup", 0);
    pointer("pointermove", 9000); note("drawn");
    part("play").focus(); part("play").click(); note("playing"); part("play").click(); note("paused");
    const [letter, number] = root.querySelectorAll("select");
    number.value = "2"; number.dispatchEvent(new Event("change")); note("second");
    letter.value = "y"; letter.dispatchEvent(new Event("change")); note("other letter");
    """)
    whole = [[0, 200], [100, 100], [200, 100], [400, 0]]
    spots = {name: one["dots"] for name, one in seen.items() if name != "captured"}
    assert spots["at first"] == [whole[3]] * 2 and seen["at first"]["legend"] == ["a <b>: four", "b: four"]
    assert seen["at first"]["boxes"] == [["x", "y"], ["1", "2"]] and seen["at first"]["ends"] == ["false", "true"]
    assert seen["at first"]["names"] == ["letter ", "number ", "balls", "one step back", "play", "one step on", "step"]
    assert seen["at first"]["stills"] == 0 and np.divide(*seen["at first"]["sizes"]) == pytest.approx(2)
    assert [seen[name]["keys"] for name in ("keys", "elsewhere")] == [0, 1] and seen["keys"]["own"] == 0  # Jupyter would go to the next cell
    assert seen["on"]["ways"] == ["M0,200L100,100"] * 2 and seen["back"]["ways"] == ["M0,200"] * 2 and seen["other letter"]["ways"] == ["M0,200h0"]
    assert spots["back"] == [whole[0]] * 2 and seen["back"]["ends"] == ["true", "false"] and seen["back"]["focus"] == "back"  # not lost
    assert spots["on"] == [whole[1]] * 2 and (seen["on"]["said"], seen["on"]["live"]) == ("step 1 of 3", "polite")
    assert spots["slider"] == [whole[2]] * 2
    assert (seen["slider"]["valuetext"], seen["slider"]["live"]) == ("step 2 of 3", "off")  # said once
    assert spots["second button"] == spots["slider"] and spots["drawn"] == [whole[0]] * 2 and seen["captured"] == [1]
    assert [(seen[name]["play"], seen[name]["live"]) for name in ("playing", "paused")] == [("pause", "off"), ("play", "polite")]
    assert seen["second"]["legend"] == ["c: one"] and seen["other letter"]["boxes"] == [["x", "y"], ["3"]]
    assert seen["other letter"]["legend"] == ["d"] and seen["other letter"]["clouds"] == 1 and spots["other letter"] == [whole[0]]


@pytest.mark.parametrize("settings, options, words", [
    ({}, {}, "must hold at least one"),
    ({"a": []}, {}, "'a' has no tracks"),
    ({"a": [Track("b", [[0, 0]])]}, {"knobs": ["c", "d"]}, "1 labels and there are 2 knobs (c, d)"),
    ({1: [Track("b", [[0, 0]])], "1": [Track("b", [[0, 0]])]}, {"knobs": ["c"]}, "labels of its own"),
    ({"a": [Track("b", [[0, 0]]), Track("c", [[0, 0], [1, 1]])]}, {}, "'c': it has 2 frames and the tracks beside it 1"),
    ({"a": [Track("b", [[0, 0], [np.inf, 0]])]}, {}, "positions of frame 1 are not finite"),
    ({"a": [Track("b", [0, 0])]}, {}, "shape [frames, 2]; got [2]"),
    ({"a": [Track("b", 3.0)]}, {}, "shape [frames, 2]; got []"),
    ({"a": [Track("b", None)]}, {}, "track 'b': positions must"),
    ({"a": [Track("b", [[0, 0], [1]])]}, {}, "track 'b': positions must be numbers"),
    ({"a": [Track("b", [[0, 0]], widths=[[np.nan, 1]])]}, {}, "widths of frame 0 are not finite"),
    ({"a": [Track("b", [[0, 0]], widths=[[-1, 1]])]}, {}, "none negative"),
    ({"a": [Track("b", [[0, 0]], widths=[1])]}, {}, "widths must have the shape"),
    ({"a": [Track("b", [[0, 0]], widths=[[1, 1], [1, 1]])]}, {}, "widths must be 1 pairs"),
    ({"a": [Track("b", [[0, 0]], colour="mauvish")]}, {}, "'mauvish' is no colour of matplotlib"),
    ({"a": [Track("b", [[0, 0]])]}, {"knobs": "kind"}, "the text 'kind'; write ['kind']"),
    ({"a": [Track("b", [[0, 0]], notes=["x", "y"])]}, {}, "2 notes for 1 frames"),
    ({"a": [Track("b", [[0, 0]], notes="x")]}, {}, "notes must be a list of texts, one for each frame, or empty; got 'x'"),
    ({"a": [Track("b", [[0, 0]], notes=None)]}, {}, "got None"),
    ([Track("b", [[0, 0]])], {}, "settings must be a dictionary of lists of tracks by setting; got a list"),
    ({"a": [Track("b", [[0, 0]], size=-1)]}, {}, "size must be a number above 0"),
    ({"a": [Track("b", [[0, 0]], size=np.nan)]}, {}, "got nan"),
    ({"a": [Track("b", [[0, 0]])]}, {"limit": 500}, "more than limit = 500"),
])  # fmt: skip
def test_what_cannot_be_shown_is_said_in_one_line(settings, options, words):
    with pytest.raises(PlayerError) as caught:
        player(axes(), settings, **{"about": "x"} | options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [[0, 1], [1, -3], [0.0, 0.0]])
def test_a_logarithmic_axis_has_no_zero(place):
    with pytest.raises(PlayerError, match="track 'b': .* axis, whose scale is log; leave those frames out") as caught:
        player(axes(xscale="log", yscale="log", xlim=(1, 100), ylim=(1, 100)), {"a": [Track("b", [[1, 1], place])]}, about="x")
    assert "\n" not in str(caught.value)


def test_importing_it_loads_neither_matplotlib_nor_torch():
    code = "import sys, flatmin_nb.lab.player; print(sorted({'matplotlib', 'torch', 'IPython', 'PIL'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
