"""What lab.player puts into a page: positions that can be read back, labels that stay text, and nothing from anywhere else."""
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from flatmin_nb.lab.player import PlayerError, Track, background, embedded, player
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
    assert any(attributes.get("aria-label") == NASTY for tag, attributes in nasty.elements if tag == "svg")


@pytest.mark.parametrize("value", [NASTY, {"<!--": ["<script>", "]]>"]}, [1.5, None, "ü"]])
def test_embedded_json_cannot_end_its_element(value):
    text = embedded(value)
    assert json.loads(text) == value and not re.search(r"[<>&\u2028\u2029]", text)


def test_nothing_comes_from_another_host_and_nothing_clashes():
    text = player(axes(), {"": [Track("ball", [[0, 0], [1, 1]])]}, about="a ball").html
    assert "http" not in text and "//" not in re.sub(r"base64,[^\"]*", "", text)
    assert not re.search(r"\sid=|getElementById|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|import\(", text)
    for tag, attributes in Page(text).elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert attributes.get("src") is None and attributes.get("href", "data:").startswith("data:")


def test_a_page_without_scripts_shows_the_last_frame():
    shown = page({("x",): [Track("ball", [[0, 0], [1, 0.5]])], ("y",): [Track("other", [[0, 0]])]}, knobs=["kind"])
    circles = [attributes for tag, attributes in shown.elements if tag == "circle"]
    assert [(one["cx"], one["cy"]) for one in circles] == [("100", "50")]
    assert [attributes["points"] for tag, attributes in shown.elements if tag == "polyline"] == ["0,100 100,50"]
    assert all("hidden" in attributes for tag, attributes in shown.elements if "data-live" in attributes)  # controls that would do nothing
    assert "x: the whole way of ball." in " ".join(shown.words)


def test_controls_have_names():
    shown = page({("x",): [Track("ball", [[0, 0]])]}, knobs=["kind"], unit="epoch")
    assert [attributes["aria-label"] for tag, attributes in shown.elements if tag in ("button", "input")] == ["one step back", "play", "one step on", "epoch"]
    assert [attributes for tag, attributes in shown.elements if tag == "select"] == [{}]  # its name is the label that it stands in
    assert "kind " in shown.words


def test_the_background_is_the_figure():
    ax = axes()
    ax.axvspan(2, 4, color="red")
    picture = Image.open(io.BytesIO(background(ax.figure))).convert("RGB")
    assert picture.size == (400, 200) and picture.getpixel((300, 100)) == (255, 0, 0) and picture.getpixel((100, 100)) == (255, 255, 255)


@pytest.mark.parametrize("settings, options, words", [
    ({}, {}, "must hold at least one"),
    ({"a": []}, {}, "'a' has no tracks"),
    ({"a": [Track("b", [[0, 0]])]}, {"knobs": ["c", "d"]}, "1 labels and there are 2 knobs (c, d)"),
    ({1: [Track("b", [[0, 0]])], "1": [Track("b", [[0, 0]])]}, {"knobs": ["c"]}, "labels of its own"),
    ({"a": [Track("b", [[0, 0]]), Track("c", [[0, 0], [1, 1]])]}, {}, "'c': it has 2 frames and the tracks beside it 1"),
    ({"a": [Track("b", [[0, 0], [np.inf, 0]])]}, {}, "frame 1 is not finite"),
    ({"a": [Track("b", [0, 0])]}, {}, "shape [frames, 2]; got [2]"),
    ({"a": [Track("b", [[0, 0]], notes=["x", "y"])]}, {}, "2 notes for 1 frames"),
    ({"a": [Track("b", [[0, 0]])]}, {"limit": 500}, "more than limit = 500"),
])  # fmt: skip
def test_what_cannot_be_shown_is_said_in_one_line(settings, options, words):
    with pytest.raises(PlayerError) as caught:
        player(axes(), settings, **{"about": "x"} | options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_importing_it_loads_neither_matplotlib_nor_torch():
    code = "import sys, flatmin_nb.lab.player; print(sorted({'matplotlib', 'torch', 'IPython', 'PIL'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
