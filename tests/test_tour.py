"""The tour: its formulas against others, the optimizers that it moves with, and what of it is committed."""
import ast
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flatmin_nb.bayesian_compression import BayesianLinear
from flatmin_nb.entropy_sgd import EntropySGD
from flatmin_nb.sharpest_directions import NudgedSGD
from flatmin_nb.smoothout import SAM, SmoothOut

NOTEBOOK = Path(__file__).resolve().parent.parent / "nbs" / "00_tour.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
PAGES = [text for cell in CELLS for output in cell.get("outputs", ()) if "flatmin-player" in (text := "".join(output.get("data", {}).get("text/html", "")))]
PLAYERS = [json.loads(page.partition('application/json">')[2].partition("</script>")[0]) for page in PAGES]  # in the plane, on one axis
WANTED = ("def numbers", "class Model", "def walk(", "LENGTH = 1", "def sgd(", "def smoothout(", "def nudged_sgd(", "def believe", "METHODS =", "def f(", "m, s, c =", "def smoothed", "def local_entropy", "def minima_of", "line =", "def threshold", "def settles", "def signed", "BEGIN =")


@pytest.fixture(scope="module")
def tour() -> SimpleNamespace:
    "The imports of the tour and what it defines: of each cell that is wanted the functions, classes and short assignments."
    space = {"__name__": "tour"}
    for code in CODE:
        if not any(word in code for word in WANTED) and not code.removeprefix("#| hide\n").startswith(("import", "from")):
            continue
        kept = [node for node in ast.parse(code).body if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign))]
        exec(compile(ast.Module(kept, []), NOTEBOOK.name, "exec"), space)
    return SimpleNamespace(**space)


def by_hand(w) -> float:
    "The landscape in plain Python, from the numbers in its text."
    wells = [((-1.2, 0.25), (0.25, 0.25)), ((1.3, -0.2), (1.1, 0.8))]
    bowl = sum(c * x * x / 2 for c, x in zip((0.1, 0.3), w))
    return bowl - sum(math.exp(-sum((x - m) ** 2 / (2 * s * s) for x, m, s in zip(w, centre, width))) for centre, width in wells)


def test_the_landscape(tour):
    places = np.random.default_rng(0).uniform(-3, 3, (20, 2))
    np.testing.assert_allclose(tour.height(tour.numbers(places)), [by_hand(w) for w in places], rtol=1e-13)
    np.testing.assert_allclose(tour.f(places[:, 0]), [by_hand(w[:1]) for w in places], rtol=1e-13)
    assert tour.f(tour.sharp) < tour.f(tour.wide) < tour.f(tour.top)


@pytest.mark.parametrize("a", [0.05, 0.5, 1.5])
def test_smoothing_against_quadrature(tour, a):
    w, nodes = np.linspace(-3, 3, 13), np.linspace(-9, 9, 9001)
    expected = tour.f(w[:, None] + a * nodes) @ np.exp(-(nodes**2) / 2) * 0.002 / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(tour.smoothed(w, a), expected, atol=1e-9)
    for order in (1, 2):
        below, above = (tour.smoothed(w + step, a, order - 1) for step in (-1e-5, 1e-5))
        np.testing.assert_allclose(tour.smoothed(w, a, order), (above - below) / 2e-5, atol=1e-6)


def test_smoothing_in_the_plane_against_quadrature(tour):
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    cloud, mass = np.stack(np.meshgrid(nodes, nodes), -1), weights[:, None] * weights
    for place in np.random.default_rng(0).uniform(-2, 2, (5, 2)):
        for a in (0.2, 0.4):
            expected = (tour.height(tour.numbers(place + a * cloud)).numpy() * mass).sum()
            assert float(tour.smoothed_plane(tour.numbers(place), a)) == pytest.approx(expected, abs=1e-6)
    places = tour.numbers(np.random.default_rng(1).uniform(-3, 3, (20, 2)))
    torch.testing.assert_close(tour.smoothed_plane(places, 0.0), tour.height(places), rtol=1e-13, atol=1e-13)


def test_where_thresholds_lie(tour):
    "x^4 - (k - 0.3) x^2 has two minima for k > 0.3 alone."
    x = np.linspace(-2, 2, 4001)
    curve = lambda k: x**4 - (k - 0.3) * x**2
    assert tour.threshold(1.0, 0.1, curve) == pytest.approx(0.3, rel=2e-3)
    assert tour.threshold(1 / 1.0, 1 / 0.1, lambda k: curve(1 / k)) == pytest.approx(1 / 0.3, rel=2e-3)  # the other way about
    cold = lambda epsilon: tour.local_entropy(tour.fine[::100], 1.0, epsilon**2 / 2)
    assert (tour.minima_of(cold(0.5)), tour.minima_of(cold(1.0))) == (2, 1)


def test_entropy_sgd_needs_a_hot_walk(tour):
    "From the sharp pit: with the epsilon of the tour it gets out, with the paper's and with the default it does not."
    settled = {}
    for epsilon in (1.0, 1e-3, 1e-4):
        model = tour.Model(tour.numbers([[-1.18, 0.245]] * 10))
        settled[epsilon] = tour.settles(tour.walk(model, tour.entropy_sgd(model, epsilon=epsilon), 80, batch=64)[-1]).mean()
    assert settled[1.0] > 0.7 and settled[1e-3] == settled[1e-4] == 0


def test_local_entropy_against_a_sum_over_places(tour):
    w, gamma, theta = np.linspace(-3, 3, 7), 2.0, 0.3
    other = np.linspace(-12, 12, 48_001)
    weight = np.exp(-(tour.f(other) + gamma / 2 * (w[:, None] - other) ** 2) / theta).sum(1) * (other[1] - other[0])
    expected = -theta * np.log(weight / math.sqrt(2 * math.pi * theta / gamma))
    np.testing.assert_allclose(tour.local_entropy(w, gamma, theta), expected, atol=1e-8)


def test_the_optimizers_are_the_exported_ones(tour):
    model = tour.Model(tour.numbers([0.5, 0.5]))
    kinds = {"SGD": torch.optim.SGD, "Nudged-SGD": NudgedSGD, "SAM": SAM, "SmoothOut": SmoothOut, "Entropy-SGD": EntropySGD}
    assert {name: type(make(model)) for name, make in tour.METHODS.items()} == kinds
    assert isinstance(tour.bayesian(torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False)))[0], BayesianLinear)
    defined = {node.name: [ast.unparse(base) for base in node.bases] for code in CODE for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ClassDef)}
    assert defined == {"Model": ["nn.Module"], "Valley": ["Model"]}


@pytest.mark.parametrize("name, knob", [("SAM", 0.0), ("SmoothOut", 0.0), ("Nudged-SGD", 1.0)])
def test_at_its_limit_each_is_sgd_to_the_bit(tour, name, knob):
    paths = []
    for make in (lambda model: tour.METHODS[name](model, knob), tour.sgd):
        model = tour.Model(tour.numbers([-2.0, 0.5]))
        paths.append(tour.walk(model, make(model), 20, batch=8))
    assert np.array_equal(*paths)


def test_walkers_know_nothing_of_each_other(tour):
    starts, tilts = tour.numbers([[-2.0, 0.5], [1.0, 1.0]]), torch.randn(8, 2, 2, dtype=torch.float64)
    together = tour.Model(starts)
    tour.mean_loss(together(tilts)).backward()
    for place in range(2):
        alone = tour.Model(starts[place])
        tour.mean_loss(alone(tilts[:, place])).backward()
        torch.testing.assert_close(together.w.grad[place], alone.w.grad, rtol=1e-12, atol=1e-12)


def test_the_noise_of_a_batch(tour):
    "On flat ground SGD is a random walk of steps lr NOISE / sqrt(B)."
    model = tour.Model(torch.full((2000, 1), 1e6, dtype=torch.float64))
    flat = torch.optim.SGD(model.parameters(), lr=1e-6)
    steps = np.diff(tour.walk(model, flat, 2, batch=16)[..., 0], axis=0) + 1e-6 * 0.1 * 1e6  # less the slope of the bowl
    assert steps.std() == pytest.approx(1e-6 * tour.NOISE / 4, rel=0.05)


def test_the_cloud_and_the_tilts_are_drawn_apart(tour):
    "Were they the same numbers, the widths would shrink where there is nothing but noise."
    _, widths = tour.believe(torch.zeros(400, 1, dtype=torch.float64), 1, 0.5, examples=10**6, lr=0.01, loss=lambda w: 0 * w[..., 0])
    drift, alike = np.log(widths[1] / widths[0]).mean(), -0.01 * tour.NOISE * 0.5 / 4
    assert abs(drift) < abs(alike) / 10


def test_what_the_page_says_of_epsilon():
    "Beside the picture, in the snippet, in the table and in the player: nowhere is the walk's noise left out."
    words = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    for said in ("noise=1.0)`, where `noise` is", "hot, ε = 1", "(02_entropy_sgd.ipynb) found"):
        assert said in words
    outputs = [output.get("data", {}) for cell in CELLS if cell["cell_type"] == "code" for output in cell["outputs"]]
    lines = [line for data in outputs for line in "".join(data.get("text/plain", "")).splitlines()]
    rows = [line.split() for line in lines if line.startswith("Entropy-SGD, ε = 0.001")]
    assert float(rows[0][4]) < 0.1 and [len(row) for row in rows] == [7, 6]  # the share and its interval, then the rest of a wide table
    for told, pit, basin in zip(PLAYERS, (300, 350), (400, 450), strict=True):  # pixels
        ways = {tuple(one["key"]): one["tracks"][0]["points"] for one in told["settings"]}
        assert ways["Entropy-SGD", "γ = 1, ε = 0.001"][-1][0] < pit < basin < ways["Entropy-SGD", "γ = 1"][-1][0]


def test_on_one_axis_points_move_on_the_profile(tour):
    path, widths = np.linspace(-2.5, 1.2, 100)[:, None], np.geomspace(1, 0.1, 100)[:, None]
    moved = tour.track("posterior", path, widths)
    np.testing.assert_allclose(moved.positions, [[w, by_hand([w])] for w in path[np.linspace(0, 99, 61).round().astype(int), 0]], rtol=1e-13)
    assert not moved.joined and moved.widths[:, 0].tolist()[::60] == [1, widths[-1, 0]] and len(set(moved.widths[:, 1])) == 1
    assert moved.notes[-1] == f"loss −{-by_hand([1.2]):.2f} after 300 gradients"
    plane = tour.track("SAM", np.zeros((5, 2)))
    assert plane.joined and plane.widths is None and plane.positions.shape == (61, 2)


def test_what_can_be_stepped_through():
    assert len(PLAYERS) == 2
    for told in PLAYERS:
        methods = [one["key"][0] for one in told["settings"]]
        assert list(dict.fromkeys(methods)) == ["all six", "SGD", "Nudged-SGD", "SAM", "SmoothOut", "Entropy-SGD", "posterior"]
        assert {len(track["points"]) for one in told["settings"] for track in one["tracks"]} == {61}
        assert "-0" not in "".join(note for one in told["settings"] for track in one["tracks"] for note in track["notes"])
    sizes = {track["name"]: track["size"] for track in PLAYERS[0]["settings"][0]["tracks"]}
    assert sizes.pop("SGD") > 1.3 * max(sizes.values())  # Nudged-SGD ends on top of it


def test_what_is_committed():
    outputs = [(cell, output) for cell in CELLS if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert not [output for _, output in outputs if any("widget" in kind for kind in output.get("data", {}))]
    assert len(PAGES) == 2 and len(PAGES[1].encode()) < 120_000
    assert all(page.count("<img alt=") == 1 and "<svg" not in page for page in PAGES)  # what a notebook that is not trusted yet can show
    assert sum("#| label: front" in code for code in CODE) == 1
    assert NOTEBOOK.stat().st_size < 1_400_000
    for cell, output in outputs:
        if "image/png" in output.get("data", {}):
            assert "#| fig-alt: " in "".join(cell["source"])
