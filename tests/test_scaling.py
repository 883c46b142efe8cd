"""Exponents from synthetic sweeps whose exponents are known: how often intervals hold them, other people's formulas, tables as they come, and pictures."""
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from flatmin_nb.lab.errors import OneLineError
from flatmin_nb.lab.scaling import (
    Departure, Exponent, ScalingError, all_fitted, boundary, boundary_law, collapse, departure, departure_exponent, plot_boundary, plot_collapse, plot_departure,
    plot_map, plot_power_law, power_law, side_by_side,
)  # fmt: skip

TEMPS, SIZES = 2.0 ** np.arange(-12, -5), 2.0 ** np.arange(9, 14)


def grid(**columns):
    return pd.MultiIndex.from_product(columns.values(), names=columns.keys()).to_frame(index=False)


def sweep(seeds=5, random=0, of_seed=0.02, of_run=0.05, correlation=0.0):
    "y = 3 T^0.95 P^0.4, with deviations of the exponents by seed and lognormal noise by run."
    rng, runs = np.random.default_rng(random), grid(seed=range(seeds), temp=TEMPS, ptr=SIZES)
    own = rng.normal(0, of_seed, (2, seeds))
    own[1] = correlation * own[0] + math.sqrt(1 - correlation**2) * own[1]
    of_seeds = (runs.temp / 2**-9) ** own[0, runs.seed] * (runs.ptr / 2**11) ** own[1, runs.seed]
    return runs.assign(y=3 * runs.temp**0.95 * runs.ptr**0.4 * of_seeds * np.exp(rng.normal(0, of_run, len(runs))))


def plateaus(seeds=5, random=0, a=0.5, noise=0.03, sizes=(1024, 2048, 4096, 8192, 16384)):
    "Curves y = P^-0.2 f(T P^a), f smooth."
    rng, runs = np.random.default_rng(random), grid(seed=range(seeds), temp=2.0 ** np.arange(-14, 0), ptr=sizes)
    scatter = np.exp(rng.normal(0, noise, seeds)[runs.seed] + rng.normal(0, noise, len(runs)))
    return runs.assign(y=runs.ptr**-0.2 / (1 + runs.temp * runs.ptr**a / 8) ** 0.5 * scatter)


def phases(seeds=5, random=0, k=2 / 3, noise=0.2, step=0.5, top=3, undecided=0.5):
    "Runs that fit below alpha^k, on a grid with a random offset."
    rng = np.random.default_rng(random)
    runs = grid(seed=range(seeds), alpha=2.0 ** np.arange(-9, 1), temp=2 ** (np.arange(-11, top, step) + rng.uniform(0, step)))
    above = np.log2(runs.temp) - k * np.log2(runs.alpha) - rng.normal(0, noise, seeds)[runs.seed]
    return runs.assign(status=np.select([above < 0, above < undecided], ["fitted", "unconverged"], "diverged"), y=above)


def holds(exponent, truth):
    return exponent.interval[0] < truth < exponent.interval[1]


# ---- how often intervals hold the truth ----

@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_of_a_power_law_hold_the_truth_as_often_as_they_say(seeds):
    inside = []
    for random in range(400):
        fit = power_law(sweep(seeds, random), "y", ["temp", "ptr"], bootstrap=200)
        inside.append([holds(fit.exponents["temp"], 0.95), holds(fit.exponents["ptr"], 0.4), holds(fit.ratio("ptr", "temp"), 0.4 / 0.95)])
    held = np.mean(inside, axis=0)
    assert (held > 0.915).all() and (held < 0.98).all(), held  # 3.2 standard deviations of 400 trials at 0.95, and the noise of 200 draws


def test_levels_other_than_95():
    inside = [holds(power_law(sweep(6, random), "y", ["temp", "ptr"], bootstrap=200, level=0.5).exponents["temp"], 0.95) for random in range(400)]
    assert 0.42 < np.mean(inside) < 0.58


@pytest.mark.parametrize("definition", [Departure(drop=0.15), Departure(drop=0.3, plateau=5)])
def test_intervals_of_departures(definition):
    "The truth of this definition is what many seeds without noise give, with its bias by the grid."
    truth = departure_exponent(plateaus(1, noise=0), "temp", "y", "ptr", definition).value
    assert abs(truth - 0.5) < 0.02
    inside = [holds(departure_exponent(plateaus(5, random), "temp", "y", "ptr", definition, bootstrap=100), truth) for random in range(60)]
    assert np.mean(inside) > 0.85


def test_intervals_and_quality_of_a_collapse():
    found = [collapse(plateaus(5, random), "temp", "y", "ptr", bootstrap=100) for random in range(40)]
    assert np.mean([holds(one.exponent, 0.5) for one in found]) > 0.85
    assert 0.6 < np.mean([one.quality for one in found]) < 1.5  # in units of the seeds
    assert all(one.quality_at_zero > 5 * one.quality for one in found)


def test_intervals_of_a_collapse_are_not_too_wide():
    values = [collapse(plateaus(5, random), "temp", "y", "ptr", bootstrap=1).exponent.value for random in range(60)]
    errors = [collapse(plateaus(5, random), "temp", "y", "ptr", bootstrap=100).exponent.error for random in range(20)]
    assert 0.6 < np.mean(errors) / np.std(values) < 1.6


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_intervals_of_a_boundary_know_the_steps_of_the_grid(noise):
    for rule in ("between", "largest_fitted"):
        laws = [boundary_law(phases(5, random, k=0.6 + 0.13 * random / 100, noise=noise), "alpha", "temp", rule=rule, bootstrap=100) for random in range(100)]
        assert np.mean([holds(law.exponents["alpha"], 0.6 + 0.13 * random / 100) for random, law in enumerate(laws)]) > 0.92
        if noise == 0:
            assert all(law.exponents["alpha"].error < 1e-9 for law in laws)  # all seeds alike: by themselves they would say that it is exact
    coarse, fine = (boundary_law(phases(5, 0, noise=0, step=step, undecided=0), "alpha", "temp").exponents["alpha"].resolution for step in (0.5, 0.25))
    assert coarse == pytest.approx(2 * fine)
    octaves = np.arange(10) - 4.5
    assert fine == pytest.approx(0.25 / math.sqrt(12 * (octaves**2).sum()))


# ---- other people's formulas ----

def test_errors_are_those_of_the_sandwich():
    "The variance for clusters in closed form (Liang and Zeger 1986), which many seeds approach."
    runs = sweep(60, of_seed=0.03)
    fit = power_law(runs, "y", ["temp", "ptr"], bootstrap=4000)
    x = np.column_stack([np.ones(len(runs)), np.log(runs.temp), np.log(runs.ptr)])
    coefficients = np.linalg.lstsq(x, np.log(runs.y))[0]
    scores = x * (np.log(runs.y) - x @ coefficients).to_numpy()[:, None]
    of_seed = np.stack([scores[runs.seed == seed].sum(0) for seed in range(60)])
    bread = np.linalg.inv(x.T @ x)
    errors = np.sqrt(60 / 59 * np.diag(bread @ (of_seed.T @ of_seed) @ bread))
    assert [fit.exponents[name].error for name in ("temp", "ptr")] == pytest.approx(errors[1:], rel=0.06)
    assert [fit.exponents[name].value for name in ("temp", "ptr")] == pytest.approx(coefficients[1:], rel=1e-9)


def test_a_ratio_is_better_known_than_its_parts_where_they_share_noise():
    fit = power_law(sweep(40, correlation=0.4, of_run=0.001), "y", ["temp", "ptr"])
    delta, gamma, ratio = fit.exponents["temp"], fit.exponents["ptr"], fit.ratio("ptr", "temp")
    covariance = np.cov(gamma.draws, delta.draws)
    slope = np.array([1 / delta.value, -gamma.value / delta.value**2])
    assert ratio.error == pytest.approx(math.sqrt(40 / 39 * slope @ covariance @ slope), rel=0.03)  # the delta method
    independent = math.sqrt((slope**2 * [gamma.error**2, delta.error**2]).sum())
    assert ratio.error < 0.97 * independent


def test_a_departure_moves_with_its_curve():
    "T_c in closed form: 1 / sqrt(1 + u / 8) = 1 - drop, on a fine grid."
    fine = grid(seed=[0], temp=2 ** np.arange(-14, 0, 1 / 64), ptr=[1024, 4096]).assign(y=lambda runs: runs.ptr**-0.2 / (1 + runs.temp * runs.ptr**0.5 / 8) ** 0.5)
    for drop in (0.1, 0.15, 0.5):
        found = departure(fine, "temp", "y", "ptr", Departure(drop=drop))
        assert found.temp.to_numpy() == pytest.approx(8 * ((1 - drop) ** -2 - 1) / found.ptr.to_numpy() ** 0.5, rel=2e-2)


# ---- symmetries ----

def test_units_do_not_matter():
    runs = sweep()
    fit, other = power_law(runs, "y", ["temp", "ptr"]), power_law(runs.assign(y=7 * runs.y, temp=1e6 * runs.temp), "y", ["temp", "ptr"])
    for name in ("temp", "ptr"):
        assert other.exponents[name].value == pytest.approx(fit.exponents[name].value) and other.exponents[name].draws == pytest.approx(fit.exponents[name].draws)
    assert other.spread == pytest.approx(fit.spread) and other.constant == pytest.approx(7 * fit.constant * 1e6 ** -fit.exponents["temp"].value)
    curves = plateaus()
    one, two = (collapse(table, "temp", "y", "ptr", bootstrap=20) for table in (curves, curves.assign(y=5 * curves.y, temp=3 * curves.temp, ptr=curves.ptr / 100)))
    assert two.exponent.value == pytest.approx(one.exponent.value, abs=1e-4) and two.quality == pytest.approx(one.quality, rel=1e-3)


def test_the_order_and_the_index_of_rows_and_the_names_of_seeds_do_not_matter():
    runs = phases().assign(y=lambda runs: 1 + runs.temp)
    other = runs.sample(frac=1, random_state=0).assign(seed=lambda runs: "seed " + runs.seed.astype(str))
    other.index = np.zeros(len(other), int)
    assert len(all_fitted(other, ["alpha", "temp"])) == len(all_fitted(runs, ["alpha", "temp"])) > 0
    assert power_law(other, "y", "temp").exponents["temp"].value == pytest.approx(power_law(runs, "y", "temp").exponents["temp"].value)
    assert boundary_law(other, "alpha", "temp").exponents["alpha"].value == pytest.approx(boundary_law(runs, "alpha", "temp").exponents["alpha"].value)
    curves = plateaus()
    shuffled = curves.sample(frac=1, random_state=0).set_index("seed", drop=False).rename_axis(None)
    assert collapse(shuffled, "temp", "y", "ptr", bootstrap=1).exponent.value == pytest.approx(collapse(curves, "temp", "y", "ptr", bootstrap=1).exponent.value)
    pd.testing.assert_frame_equal(*(departure(table, "temp", "y", "ptr", Departure(drop=0.2)) for table in (curves, shuffled)))


def test_one_seed_of_the_draws_gives_one_result_and_tables_stay_as_they_are():
    runs, curves, lanes = sweep(), plateaus(), phases()
    before = [table.copy() for table in (runs, curves, lanes)]
    calls = (
        lambda random: power_law(runs, "y", ["temp", "ptr"], random=random).exponents["ptr"],
        lambda random: departure_exponent(curves, "temp", "y", "ptr", Departure(drop=0.2), random=random, bootstrap=30),
        lambda random: collapse(curves, "temp", "y", "ptr", random=random, bootstrap=30).exponent,
        lambda random: boundary_law(lanes, "alpha", "temp", random=random).exponents["alpha"],
    )
    for call in calls:
        assert (call(1).draws == call(1).draws).all() and (call(1).draws != call(2).draws).any() and call(1).value == call(2).value
    for table, copy in zip((runs, curves, lanes), before):
        pd.testing.assert_frame_equal(table, copy)


# ---- tables as they come ----

def test_seeds_that_not_all_settings_have():
    "Large sizes with fewer seeds, a run that is missing: the same exponents, and draws without the large sizes use what they have."
    runs = plateaus(6).query("not (ptr > 4096 and seed > 2) and not (temp == 2**-9 and ptr == 2048 and seed == 1)")
    assert holds(departure_exponent(runs, "temp", "y", "ptr", Departure(drop=0.2), bootstrap=200), 0.5)
    found = collapse(runs, "temp", "y", "ptr", bootstrap=200)
    assert holds(found.exponent, 0.5) and found.quality < 3 and np.isfinite(found.exponent.draws).mean() > 0.95
    assert holds(power_law(sweep(6).query("not (ptr > 2048 and seed > 2)"), "y", ["temp", "ptr"]).exponents["ptr"], 0.4)
    holes = plateaus(4).query("not (temp == 2**-9 and ptr == 2048) and not (temp > 2**-3 and ptr == 8192)")
    assert holds(collapse(holes, "temp", "y", "ptr", bootstrap=200).exponent, 0.5)


def test_what_hangs_on_one_seed_has_no_interval():
    "A second size that one seed alone has: a third of the draws of three seeds are without it."
    fit = power_law(sweep(3).query("ptr == 512 or (ptr == 1024 and seed == 0)"), "y", ["temp", "ptr"])
    one = fit.exponents["ptr"]
    assert np.isfinite(one.value) and 0.2 < np.isnan(one.draws).mean() < 0.4
    assert np.isnan([one.error, *one.interval, *one.percentiles, fit.ratio("ptr", "temp").error]).all()


def test_a_single_seed_has_a_value_and_no_interval():
    exponents = {
        "law": power_law(sweep(1), "y", ["temp", "ptr"]).exponents["ptr"],
        "departure": departure_exponent(plateaus(1), "temp", "y", "ptr", Departure(drop=0.2)),
        "collapse": collapse(plateaus(1), "temp", "y", "ptr").exponent,
        "boundary": boundary_law(phases(1), "alpha", "temp").exponents["alpha"],
    }
    table = side_by_side(exponents)
    assert np.isfinite(table.exponent).all() and table[["low", "high"]].isna().all(axis=None) and (table.seeds == 1).all()
    assert all(one.draws.shape == (0,) for one in exponents.values())


@pytest.mark.parametrize("kind", ["Float64", "float32", "int64", "Int64"])
def test_other_kinds_of_numbers(kind):
    runs = sweep().assign(ptr=lambda runs: runs.ptr.astype(kind))
    assert power_law(runs, "y", ("temp", "ptr")).exponents["ptr"].value == pytest.approx(power_law(sweep(), "y", ["temp", "ptr"]).exponents["ptr"].value, rel=1e-5)
    curves = plateaus().assign(ptr=lambda runs: runs.ptr.astype(kind))
    assert collapse(curves, "temp", "y", "ptr", bootstrap=2).exponent.value == pytest.approx(collapse(plateaus(), "temp", "y", "ptr", bootstrap=2).exponent.value, abs=1e-4)


def test_heights_as_they_are():
    "A law y = g(T P^a) without a plateau of its own, such as the weights' change."
    runs = plateaus().assign(y=lambda runs: runs.y * runs.ptr**0.2)
    assert holds(collapse(runs, "temp", "y", "ptr", plateau=None, bootstrap=100).exponent, 0.5)
    points = collapse(runs, "temp", "y", "ptr", plateau=None, bootstrap=2).points
    assert points.relative.to_numpy() == pytest.approx(runs.groupby(["ptr", "temp"]).y.mean().to_numpy())
    by_number, by_place = collapse(runs, "temp", "y", "ptr", plateau=4, bootstrap=2), collapse(runs, "temp", "y", "ptr", up_to=2**-11, bootstrap=2)
    assert by_number.exponent.value == by_place.exponent.value and by_number.exponent.value != collapse(runs, "temp", "y", "ptr", bootstrap=2).exponent.value


def test_departures_upward_and_exponents_of_either_sign():
    risen = plateaus().assign(y=lambda runs: 1 / runs.y)
    assert departure_exponent(risen, "temp", "y", "ptr", Departure(drop=-0.25)).value == pytest.approx(0.5, abs=0.1)
    backwards = plateaus(a=-0.3, sizes=4.0 ** -np.arange(1, 5))
    assert holds(collapse(backwards, "temp", "y", "ptr", bootstrap=100).exponent, -0.3)


def test_an_end_that_was_not_reached_is_no_end():
    runs = phases(top=-2)  # from alpha = 2^-3 on nothing can diverge
    ends = boundary(runs, "alpha", "temp")
    assert ends[ends.alpha == 1].smallest_diverged.isna().all() and ends[ends.alpha == 2**-9].between.notna().all()
    flat = power_law(ends, "largest_fitted", "alpha").exponents["alpha"].value
    guarded = boundary_law(runs, "alpha", "temp", rule="largest_fitted")
    assert holds(guarded.exponents["alpha"], 2 / 3) and flat < 0.6 and guarded.rows < len(ends)
    some = runs[~((runs.seed == 0) & (runs.alpha == 2**-9) & (runs.status == "diverged"))]  # a seed whose end is open, at one alpha
    assert boundary_law(some, "alpha", "temp").rows == guarded.rows - 5


def test_boundaries_of_disordered_lanes():
    "One that fits above one that diverges: both ends are told, and nothing lies between."
    lanes = pd.DataFrame({"alpha": 1.0, "temp": [1, 2, 4, 8], "seed": 0, "status": ["fitted", "diverged", "fitted", "unconverged"]})
    row = boundary(lanes, "alpha", "temp").iloc[0]
    assert (row.largest_fitted, row.smallest_diverged, row.undecided) == (4, 2, 0)
    nothing = boundary(pd.concat([lanes, lanes.assign(alpha=2.0, status="diverged")]), "alpha", "temp").iloc[1]
    assert math.isnan(nothing["largest_fitted"]) and nothing["smallest_diverged"] == 1 and math.isnan(nothing["between"])


def test_whole_settings_are_kept():
    runs = phases(noise=0.5)
    kept = all_fitted(runs, ["alpha", "temp"])
    counts = kept.groupby(["alpha", "temp"]).seed.nunique()
    assert (counts == 5).all() and 0 < len(kept) < (runs.status == "fitted").sum()
    assert all_fitted(runs.assign(state=runs.status.str.upper()), ["alpha", "temp"], status="state", fitted="FITTED").equals(kept.assign(state="FITTED"))


# ---- one line for each mistake ----

@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: power_law(sweep(), "z", "temp"), "no column 'z'"),
        (lambda: power_law(sweep(), "y", "temp", seed="sed"), "no column 'sed'; did you mean 'seed'"),
        (lambda: power_law(sweep().assign(y=-1.0), "y", "temp"), "'y' holds 175 of 175 values that are not finite and positive, the first -1"),
        (lambda: power_law(sweep().assign(temp=np.inf), "y", "temp"), "'temp' holds 175 of 175 values that are not finite and positive, the first inf"),
        (lambda: power_law(sweep().assign(y="a"), "y", "temp"), "'y' holds str, not numbers"),
        (lambda: power_law(sweep()[:0], "y", "temp"), "the table has no rows"),
        (lambda: power_law(sweep()[:2], "y", "ptr"), "2 rows cannot show 2 coefficients"),
        (lambda: power_law(sweep(), "y", ["temp", "temp"]), "the columns temp, temp vary together"),
        (lambda: power_law(sweep(), "y", "temp", level=95), r"level must be a number in \(0, 1\)"),
        (lambda: power_law(sweep(), "y", "temp", random=-1), "random must be an integer from 0"),
        (lambda: departure(plateaus(), "temp", "y", "ptr", Departure(drop=0.1, up_to=2**-20)), "has 14 points, 0 of them plateau"),
        (lambda: departure(plateaus(), "temp", "y", "ptr", Departure(drop=0.1, plateau=14)), "has 14 points, 14 of them plateau"),
        (lambda: Departure(drop=0.0), "drop is 0, so that every curve leaves at once"),
        (lambda: Departure(drop=0.1, plateau=0), "plateau must be an integer from 1"),
        (lambda: departure_exponent(plateaus(), "temp", "y", "ptr", Departure(threshold=9)), "0 of 5 curves leave their plateau"),
        (lambda: departure(pd.concat([plateaus(), plateaus(1)]), "temp", "y", "ptr", Departure(drop=0.1)), "70 rows repeat a setting and its seed"),
        (lambda: collapse(plateaus(), "temp", "y", "ptr", bounds=(1, 0)), "bounds must be the lowest and the highest"),
        (lambda: collapse(plateaus(), "temp", "y", "ptr", bounds=(0.8, 1.2)), "no minimum between 0.8 and 1.2"),
        (lambda: collapse(plateaus(), "temp", "y", "ptr", bounds=(8, 9)), "no minimum between 8 and 9"),
        (lambda: collapse(plateaus(), "temp", "y", "ptr", overlap=0), r"overlap must be a number in \(0, 1\]"),
        (lambda: collapse(plateaus(), "temp", "y", "ptr", plateau=0), "plateau must be an integer from 1"),
        (lambda: collapse(plateaus().assign(y=0.0), "temp", "y", "ptr"), "has 0 points relative to a plateau"),
        (lambda: collapse(plateaus().query("temp == 2**-9"), "temp", "y", "ptr"), "has 1 points relative to a plateau"),
        (lambda: boundary(phases(), "alpha", "temp", fitted="finished"), "no run has the status 'finished'"),
        (lambda: boundary(phases(), "alpha", "temp", status="state"), "no column 'state'"),
        (lambda: boundary_law(phases(), "alpha", "temp", rule="middle"), "no rule 'middle'"),
        (lambda: boundary_law(phases(), "alpha", "temp", within=(1, 2)), "at 1 of 1 values of alpha"),
        (lambda: plot_power_law(None, power_law(sweep(), "y", "temp"), sweep(), "ptr"), "no exponent 'ptr'"),
        (lambda: plot_map(None, phases().assign(y=np.nan), "alpha", "temp", "y"), "values that are not finite"),
    ],
)  # fmt: skip
def test_one_line_for_each_mistake(call, said):
    with pytest.raises(ScalingError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value) and isinstance(caught.value, OneLineError) and isinstance(caught.value, ValueError)


# ---- pictures ----

@pytest.fixture
def ax():
    return Figure().add_subplot()


SYMBOLS = {"temp": "$T$", "ptr": "$P$", "y": "$y$", "alpha": r"$\alpha$"}


def drawn(ax, x, y):
    "The axes are labelled and can be drawn."
    assert (ax.get_xlabel(), ax.get_ylabel()) == (x, y)
    ax.figure.draw_without_rendering()


def test_picture_of_a_power_law(ax):
    runs = sweep()
    fit = power_law(runs, "y", ["temp", "ptr"])
    assert plot_power_law(ax, fit, runs, "temp", symbols=SYMBOLS) is ax
    drawn(ax, "$T$", "$y$")
    points, lines = [line for line in ax.lines if len(line.get_xdata()) == 7], [line for line in ax.lines if len(line.get_xdata()) == 50]
    assert len(lines) == 5 and len({line.get_marker() for line in points}) >= 5  # readable without colour
    for size, line in zip(SIZES, lines):
        assert line.get_ydata() == pytest.approx(fit.predict(temp=line.get_xdata(), ptr=size))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [f"$P$ = {size:g}" for size in SIZES]


def test_picture_of_a_law_with_one_x(ax):
    drawn(plot_power_law(ax, power_law(sweep(), "y", "temp"), sweep(), "temp"), "temp", "y")
    assert ax.get_legend() is None


def test_picture_of_departures(ax):
    found = departure(plateaus(), "temp", "y", "ptr", Departure(drop=0.2))
    assert plot_departure(ax, plateaus(), "temp", "y", "ptr", Departure(drop=0.2), symbols=SYMBOLS) is ax
    rings = [line for line in ax.lines if line.get_markersize() == 12]
    assert [line.get_xdata()[0] for line in rings] == pytest.approx(found.temp.tolist())
    assert [line.get_ydata()[0] for line in rings] == pytest.approx((0.8 * found.plateau).tolist())
    drawn(ax, "$T$", "$y$")
    drawn(plot_departure(Figure().add_subplot(), plateaus(), "temp", "y", "ptr", Departure(drop=0.9)), "temp", "y")  # none leaves


@pytest.mark.parametrize("seeds", [1, 4])
def test_picture_of_a_collapse(ax, seeds):
    found = collapse(plateaus(seeds), "temp", "y", "ptr", bootstrap=10)
    assert plot_collapse(ax, found, symbols=SYMBOLS) is ax
    a = found.exponent.value
    assert ax.lines[0].get_xdata() == pytest.approx(2.0 ** np.arange(-14, 0) * 1024**a)
    drawn(ax, f"$T$ $P$$^{{{a:.2f}}}$", "$y$ / plateau")
    drawn(plot_collapse(Figure().add_subplot(), found, exponent=0), "temp", "y / plateau")


def test_picture_of_a_boundary(ax):
    ends = boundary(phases(top=-2), "alpha", "temp")
    law = boundary_law(phases(top=-2), "alpha", "temp")
    assert plot_boundary(ax, ends, "alpha", "temp", law=law, within=(0, 1 / 8), symbols=SYMBOLS) is ax
    drawn(ax, r"$\alpha$", "$T$")
    line = next(line for line in ax.lines if line.get_color() == "black")
    assert line.get_ydata() == pytest.approx(law.constant * line.get_xdata() ** law.exponents["alpha"].value) and line.get_xdata().max() == 1 / 8


def test_picture_of_a_plane(ax):
    runs = pd.DataFrame([
        (1, 1, "fitted", 0.2), (1, 1, "fitted", 0.4), (1, 2, "fitted", 0.1), (1, 2, "diverged", np.nan), (1, 4, "diverged", np.nan), (1, 4, "diverged", 7.0),
        (2, 1, "unconverged", 0.3), (2, 1, "diverged", np.nan), (2, 2, "unconverged", np.nan),
    ], columns=["alpha", "temp", "status", "y"])  # fmt: skip
    assert plot_map(ax, runs, "alpha", "temp", "y", symbols=SYMBOLS, vmin=0, vmax=1) is ax
    drawn(ax, r"$\alpha$", "$T$")
    (mesh,) = ax.collections
    assert np.ma.filled(mesh.get_array(), np.nan).tolist() == pytest.approx(np.array([[0.3, np.nan], [0.1, np.nan], [np.nan, np.nan]]), nan_ok=True)
    assert mesh.get_clim() == (0, 1) and ax.figure.axes[1].get_ylabel() == "$y$"
    assert sorted(patch.get_xy()[1] for patch in ax.patches) == pytest.approx([2**-0.5, 2**0.5]) and all(patch.get_hatch() for patch in ax.patches)
    diverged, survivors = ax.lines
    assert (diverged.get_marker(), *diverged.get_xydata().tolist()) == ("x", [1, 4]) and survivors.get_xydata().tolist() == [[1, 2]]  # (2, 4) was not run


def test_importing_loads_no_matplotlib():
    code = "import sys, flatmin_nb.lab.scaling; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_exponents_are_written_short():
    one = Exponent(0.5, np.array([0.4, 0.6] * 50), 5)
    assert str(one) == "0.500 [0.190, 0.810]" and "draws" not in repr(one)
    assert one.percentiles == pytest.approx((0.4, 0.6))
