"""The table of claims: rules on made numbers, records behind every number, and that README and index show what the tables say."""
import ast
import json
import math
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from flatmin_nb import claims
from flatmin_nb.claims import CLAIMS, Claim, ClaimError, Comparison, Law, Number, Paper, Records
from flatmin_nb.lab.errors import OneLineError
from flatmin_nb.lab.scaling import Exponent

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
README = (ROOT / "README.md").read_text()
ALL = [(page, claim) for page in CLAIMS for claim in CLAIMS[page]]
ASKED = [(page, claim) for page, claim in ALL if not isinstance(claim.question, str)]


def named(entry: object) -> str:
    return f"{entry.words}, {entry.setting}" if isinstance(entry, Claim) else str(entry)


@pytest.fixture(scope="module")
def table():
    return claims.table()


shown_at = cache(claims.markdown)  # of results/ as it is


@pytest.fixture
def tables(tmp_path):
    "A copy of results/, to be spoilt."
    for file in RESULTS.glob("*.csv"):
        shutil.copy(file, tmp_path)
    return tmp_path


def spoil(folder: Path, name: str, change) -> None:
    "Replace a table by what `change` makes of it."
    file = folder / f"{name}.csv"
    change(pd.read_csv(file)).to_csv(file, index=False)


# ---- the rules ----

@pytest.mark.parametrize(
    ("differences", "sign", "status"),
    [
        ([1, 2, 3], 1, "parity"),  # mean 2, standard error 1/sqrt(3) = 0.577, times 4.303: 2.48
        ([2, 3, 4], 1, "reproduced"),
        ([2, 3, 4], -1, "not reproduced"),
        ([-2, -3, -4], -1, "reproduced"),
        ([-0.01, 3, 3, 3, 3, 3, 3, 3], 1, "reproduced"),  # one seed of eight may disagree
        ([0.5, 0.5, 0.5], -1, "not reproduced"),  # no spread at all
        ([0, 0, 0], 1, "parity"),
        ([5, 6], 1, "blank"),
        ([5], 1, "blank"),
        ([], 1, "blank"),
    ],
)
def test_the_rule_of_a_comparison(differences, sign, status):
    assert claims.status_of_differences(pd.Series(differences, dtype=float), sign) == status


@pytest.mark.parametrize("seeds", [3, 5, 20])
def test_the_rule_of_a_comparison_is_students_test(seeds):
    "Against scipy's test, which knows nothing of intervals."
    draws = np.random.default_rng(seeds).normal(0.5, size=(200, seeds))
    for row, level in zip(draws, stats.ttest_1samp(draws, 0, axis=1).pvalue):
        for looks in (1, 15):
            assert (claims.status_of_differences(pd.Series(row), 1, looks) == "parity") == (level >= 0.05 / looks)
        assert np.allclose(claims.interval_of(pd.Series(row)), stats.ttest_1samp(row, 0).confidence_interval(0.95))


@pytest.mark.parametrize(
    ("values", "number", "better", "status"),
    [
        ([8, 9, 10], "9", 1, "reproduced"),
        ([8, 9, 10], "9.5", 1, "parity"),  # 9.45 would do, and the interval ends at 9 + 4.303 / sqrt(3) = 11.484
        ([8, 9, 10], "9.05", 1, "parity"),  # 9.045 would
        ([8, 9, 10], "9.4 ± 0.4", 1, "reproduced"),  # 8.95 does
        ([8, 9, 10], "11.48", 1, "parity"),
        ([8, 9, 10], "12", 1, "not reproduced"),  # 11.5
        ([8, 9, 10], "12 ± 1", 1, "parity"),
        ([8, 9, 10], "1", 1, "reproduced"),  # on the better side
        ([8, 9, 10], "6.4", -1, "not reproduced"),  # 6.45, and the interval begins at 6.516
        ([8, 9, 10], "6.5", -1, "parity"),
        ([9, 9, 9], "9.0", -1, "reproduced"),
        ([9, 10], "9", 1, "blank"),
    ],
)
def test_the_rule_of_a_number(values, number, better, status):
    assert claims.status_of_number(pd.Series(values, dtype=float), Paper("made up", number), better) == status


def test_a_number_cut_off_is_that_or_more():
    values = pd.Series([8.5, 8.6, 8.7])
    assert claims.status_of_number(values, Paper("made up", "9"), 1) == "reproduced"  # 8.5 to 9.5
    assert claims.status_of_number(values, Paper("made up", "9", truncated=True), 1) == "not reproduced"  # 9 to 10, and the interval ends at 8.85
    assert claims.status_of_number(values, Paper("made up", "8", truncated=True), -1) == "reproduced"  # 8 to 9
    assert claims.status_of_number(values, Paper("made up", "8"), -1) == "parity"  # to 8.5, and the interval begins at 8.35


def test_more_scatter_passes_no_more_easily():
    "At one mean, worse than the number, no spread makes it reproduced."
    for spread in (0.01, 0.1, 1, 10):
        assert claims.status_of_number(5 + spread * pd.Series([-1.0, 0.0, 1.0]), Paper("made up", "9"), 1) in ("not reproduced", "parity")


def exponent(value: float, reach: float, seeds: int = 3) -> Exponent:
    "An exponent whose interval reaches so far: Student's t of two degrees of freedom is 4.30265."
    deviation = reach / 4.30265 * math.sqrt((seeds - 1) / seeds)
    return Exponent(value, np.array([value - deviation, value + deviation]), seeds)


@pytest.mark.parametrize(
    ("value", "reach", "theory", "options", "status"),
    [
        (0.6, 0.1, 0.75, {"margin": 0.1}, "not reproduced"),
        (0.6, 0.1, 0.65, {"margin": 0.1}, "reproduced"),
        (0.6, 0.3, 0.8, {"margin": 0.1}, "parity"),  # inside, but not near
        (0.6, 0.01, 0.65, {"margin": 0.1}, "parity"),  # near, but outside
        (0.6, 0.01, 0.8, {"margin": 0.1}, "not reproduced"),
        (0.6, 0.1, 0.65, {"margin": 0.1, "chance": (0.2, 0.1)}, "reproduced"),  # chance ends at 0.4, the interval begins at 0.5
        (0.6, 0.1, 0.65, {"margin": 0.1, "chance": (0.35, 0.1)}, "parity"),  # at 0.55
        (0.6, 0.1, 0.65, {"margin": 0.1, "chance": (0.8, 0.06)}, "parity"),  # from above
    ],
)
def test_the_rule_of_an_exponent(value, reach, theory, options, status):
    assert np.allclose(exponent(value, reach).interval, (value - reach, value + reach), atol=1e-4)
    assert claims.status_of_exponent(exponent(value, reach), theory, **options) == status


def test_an_exponent_of_two_seeds_is_blank():
    assert claims.status_of_exponent(Exponent(0.6, np.array([0.5, 0.7]), seeds=2), 0.6, margin=0.1) == "blank"


def made(**columns) -> pd.DataFrame:
    "Runs of two methods, three seeds, with their records."
    rows = pd.DataFrame({"method": ["a"] * 3 + ["b"] * 3, "seed": [0, 1, 2] * 2, "gradient_evaluations": [10] * 3 + [20] * 3, "device_name": "a machine", "commit": "c0ffee"})
    return rows.assign(**columns)


def test_a_comparison_pairs_the_seeds():
    runs = made(error=[1.0, 5.0, 9.0, 2.0, 6.1, 10.2])  # far apart between seeds; differences -1, -1.1, -1.2
    answer = Comparison(lambda records: runs, "method == 'a'", "method == 'b'", "error", sign=-1, unit=" %").answer(None, Paper(""))
    assert answer.status == "reproduced" and answer.ours == "5.00 against 6.10 %: -1.10 [-1.35, -0.85] (3 seeds)"
    assert (answer.gradient_evaluations, answer.baseline_evaluations, answer.device, answer.commit) == (10, 20, "a machine", "c0ffee")
    shuffled = runs.sample(frac=1, random_state=0)
    assert Comparison(lambda records: shuffled, "method == 'a'", "method == 'b'", "error", sign=-1, unit=" %").answer(None, Paper("")) == answer


def four(**columns) -> pd.DataFrame:
    "Runs of two methods, four seeds."
    return pd.concat([made(), made().query("seed == 2").assign(seed=3)], ignore_index=True).sort_values(["method", "seed"], ignore_index=True).assign(**columns)


@pytest.mark.parametrize("lost", [["a"], ["b"], ["a", "b"]])
@pytest.mark.parametrize("how", ["no value", "no run"])
def test_a_seed_that_is_lost_blanks_a_comparison(lost, how):
    "A run that diverged, or is not there, is counted: three seeds that are left of four say nothing of the fourth."
    runs = four(error=[1.0, 1.0, 1.1, 1.2, 9.0, 9.0, 9.1, 9.0])
    ask = lambda rows: Comparison(lambda records: rows, "method == 'a'", "method == 'b'", "error", sign=-1).answer(None, Paper(""))
    assert (ask(runs).status, ask(runs).ours[-9:]) == ("reproduced", "(4 seeds)")
    gone = runs["method"].isin(lost) & (runs["seed"] == 1)
    answer = ask(runs.assign(error=runs["error"].mask(gone)) if how == "no value" else runs[~gone])
    if how == "no run" and len(lost) == 2:
        assert (answer.status, answer.ours[-9:]) == ("reproduced", "(3 seeds)")  # a seed that nobody has is none
    else:
        assert (answer.status, answer.seeds, answer.reason) == ("blank", 3, "3 of 4 seeds") and answer.ours.endswith("(3 of 4 seeds)")


@pytest.mark.parametrize("lost", [dict(error=[1.0, math.nan, 1.1, 1.2, 2.0, 2.0, 2.0, 2.0]), dict(error=[1.0, 1.0, 1.1, 1.2, 2.0, 2.0, 2.0, 2.0], status=["finished", "diverged", *["fitted"] * 6])])
def test_a_run_without_a_value_or_that_did_not_end_well_blanks_a_number(lost):
    runs = four(**lost)
    answer = Number(lambda records: runs, "method == 'a'", "error", better=-1).answer(None, Paper("made up", "9"))
    assert (answer.status, answer.seeds, answer.reason) == ("blank", 3, "3 of 4 seeds") and answer.ours.endswith("(3 of 4 seeds)")
    nothing = Number(lambda records: runs.assign(error=math.nan), "method == 'a'", "error", better=-1).answer(None, Paper("made up", "9"))
    assert (nothing.status, nothing.ours, nothing.reason) == ("blank", "", "0 of 4 seeds")


def test_the_error_of_a_number_stands_beside_it():
    runs = made(factor=[2.0, 3.0, 4.0, 9.0, 9.0, 9.0], error=[1.0, 1.5, 3.5, 0.0, 0.0, 0.0])
    answer = Number(lambda records: runs, "method == 'a'", "factor", better=1, digits=1, error="error").answer(None, Paper("made up", "3"))
    assert answer.status == "reproduced" and answer.ours == "3.0 [0.5, 5.5] at 2.00 % of error (3 seeds)"


def test_the_cost_names_the_batch_where_it_differs():
    shown = lambda **columns: claims.cost_of(pd.Series(vars(Comparison(lambda records: made(error=[1.0] * 6, **columns), "method == 'a'", "method == 'b'", "error", sign=-1).answer(None, Paper("")))))
    assert shown() == shown(batch_size=16) == "10 against 20"
    assert shown(gradient_evaluations=10, batch_size=16) == "10"
    assert shown(batch_size=[4096] * 3 + [128] * 3) == "10 of 4,096 against 20 of 128"
    assert shown(gradient_evaluations=10, train_batch_size=[4096] * 3 + [128] * 3, batch_size=128) == "10 of 4,096 against 10 of 128"


def test_a_factor_is_that_of_the_geometric_means():
    runs = made(curvature=[2.0, 4.0, 8.0, 1.0, 1.0, 1.0])  # 2, 4 and 8: the middle of the logarithms is 4
    answer = Comparison(lambda records: runs, "method == 'a'", "method == 'b'", "curvature", sign=1, factor=True, digits=1).answer(None, Paper(""))
    reach = 4.30265 * math.log(2) / math.sqrt(3)  # 1.72 on the logarithm, whose mean is 1.39
    assert answer.status == "parity" and answer.ours == f"4.7 against 1.0: × 4 [{4 * math.exp(-reach):.3g}, {4 * math.exp(reach):.3g}] (3 seeds)"


@pytest.mark.parametrize("column", ["gradient_evaluations", "device_name", "commit"])
def test_a_number_without_a_record_is_refused(column):
    runs = made(error=[1.0] * 6).astype({column: object})
    runs.loc[4, column] = None
    ask = lambda rows: claims.chosen(runs, "made.csv", rows, "error")
    assert len(ask("method == 'a'")) == 3
    with pytest.raises(ClaimError, match=f"made.csv.*without {column}"):
        ask("method == 'b'")


def test_a_seed_counts_once():
    with pytest.raises(ClaimError, match="a seed twice"):
        claims.chosen(made(error=[1.0] * 6), "made.csv", "method == 'a' or method == 'b'", "error")


# ---- papers' numbers ----

@pytest.mark.parametrize(("page", "claim"), ALL, ids=named)
def test_a_claim_can_stand_in_a_table(page, claim):
    assert "|" not in claim.words + claim.setting + claim.paper.source
    if isinstance(claim.question, Number):
        assert claim.paper.value >= 0 and claim.paper.spread >= 0


def test_a_number_without_a_source_cannot_be_written_down():
    with pytest.raises(ClaimError, match="no source"):
        Paper("", "1.37")


def assigned(page: str, name: str) -> dict:
    "The literal that a notebook gives to a name."
    for cell in json.loads((ROOT / f"nbs/{page}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code" and f"{name} = {{" in (source := "".join(cell["source"])):
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == [name]:
                    return ast.literal_eval(node.value)
    raise AssertionError(f"nbs/{page}.ipynb assigns no {name}")


def quoted(page: str) -> dict[tuple[str, str], tuple[str, str]]:
    "What the claims quote: (number, against) by words and setting."
    return {(claim.words, claim.setting): (claim.paper.number, claim.paper.against) for claim in CLAIMS[page] if claim.paper.number}


def test_the_papers_numbers_of_entropy_sgd_are_those_of_the_notebook():
    table, shown = assigned("02_entropy_sgd", "PAPER"), quoted("02_entropy_sgd")
    experiments = {"fully connected, MNIST": ("mnistfc", "adam"), "LeNet, MNIST": ("lenet", "adam"), "All-CNN-BN, CIFAR-10": ("allcnn", "sgd")}
    printed = lambda entry: "{:.2f} ± {:.2f}".format(*table[entry][:2])
    for (words, setting), (number, against) in shown.items():
        if "Penn" in setting:  # of which the notebook has no model
            assert (number, against) == ("77.656 ± 0.171", "78.6 ± 0.26")
        else:
            experiment, baseline = experiments[setting]
            assert number == printed((experiment, "entropy_sgd")) and against in ("", printed((experiment, baseline))), words
    assert {setting for _, setting in shown} >= set(experiments)


def test_keskars_numbers_are_those_of_the_notebook():
    small, large = (assigned("03_smoothout", "KESKAR")[batch] for batch in ("small batch", "large batch"))
    error = lambda accuracy: "{:.2f} ± {}".format(100 - float(accuracy.split(" ± ")[0]), accuracy.split(" ± ")[1])
    assert list(quoted("03_smoothout").values()) == [(error(large[0]), error(small[0])), (large[1], small[1])]


def test_the_papers_numbers_of_compression_are_those_of_the_notebook():
    table, seen = assigned("05_bayesian_compression", "PAPER"), 0
    for claim in CLAIMS["05_bayesian_compression"]:
        if claim.paper.number:
            net = next(key for start, key in {"LeNet-300": "lenet_300_100", "LeNet-5": "lenet5_caffe", "VGG": "vgg16"}.items() if claim.setting.startswith(start))
            _, _, (weights, bits, _), (error, *_) = table[net, "horseshoe" if "horseshoe" in claim.words else "bayes"]
            assert claim.paper.number == str(bits if "bits" in claim.words else weights) and claim.paper.truncated, claim.words
            # of the horseshoe's bits the error is another one, which the notebook's table has no room for
            assert claim.paper.beside in ("", f"{error} % of error") or ("horseshoe" in claim.words and "bits" in claim.words), claim.words
            assert not claim.paper.beside or claim.question.error, claim.words  # where the paper has an error, ours is shown
            seen += 1
    assert seen == 8


def test_a_theorys_number_is_what_the_fit_is_held_to():
    records = Records()
    for _, claim in ASKED:
        if isinstance(claim.question, Law) and claim.paper.number:
            assert math.isclose(claim.question.fit(records).theory, Fraction(claim.paper.number), abs_tol=1e-12), claim


# ---- records ----

def test_every_claim_has_a_status_and_every_number_of_ours_a_record(table):
    assert len(table) == len(ALL) and set(table["status"]) <= set(claims.STATUSES)
    shown = table[table["ours"] != ""]
    assert (shown["commit"].str.fullmatch(r"[0-9a-f]{40}( / [0-9a-f]{40})*")).all() and (shown["device"] != "").all()
    assert (shown["seeds"] >= 1).all() and (shown["gradient_evaluations"] > 0).all()
    blank = table["status"] == "blank"
    assert (table.loc[blank, "reason"] != "").all() and (table.loc[~blank, "seeds"] >= 3).all()
    assert set(table["page"]) == set(claims.PAGES) and all((ROOT / f"nbs/{page}.ipynb").is_file() for page in claims.PAGES)


def test_every_question_names_columns_that_exist():
    records = Records()
    for _, claim in ASKED:
        if not isinstance(claim.question, Law):
            runs, _ = claims.table_of(claim.question.runs, records)
            assert {claim.question.column, *claims.RECORD, "seed"} <= set(runs)
            runs.query(claim.question.rows)  # and the query's
            if isinstance(claim.question, Comparison) and claim.question.against:
                runs.query(claim.question.against)


def test_a_few_numbers_worked_out_by_hand(table):
    row = table.set_index(["page", "claim", "setting"])["ours"]
    errors = pd.read_csv(RESULTS / "entropy_sgd.csv").query("experiment == 'mnistfc'").set_index(["method", "seed"])["test_error"]
    change = [errors["entropy_sgd", seed] - errors["adam", seed] for seed in range(3)]
    mean = sum(change) / 3
    error = math.sqrt(sum((one - mean) ** 2 for one in change) / 2 / 3)
    assert f"{mean:+.2f} [{mean - 4.30265 * error:+.2f}, {mean + 4.30265 * error:+.2f}]" in row["02_entropy_sgd", "Entropy-SGD's test error is lower than Adam's", "fully connected, MNIST"]
    runs = pd.read_csv(RESULTS / "bayesian_compression.csv").query("experiment == 'lenet_300_100' and method == 'bayes'")
    factors = runs["structured_factor"].tolist()
    mean = sum(factors) / 3
    reach = 4.30265 * math.sqrt(sum((one - mean) ** 2 for one in factors) / 2 / 3)
    assert row["05_bayesian_compression", "Fewer weights, by a factor", "LeNet-300-100, MNIST"] == f"{mean:.1f} [{mean - reach:.1f}, {mean + reach:.1f}] at {sum(runs['test_error']) / 3:.2f} % of error (3 seeds)"


def prose() -> str:
    "The text of the page of the claims."
    return "".join("".join(cell["source"]) for cell in json.loads((ROOT / "nbs/claims.ipynb").read_text())["cells"] if cell["cell_type"] == "markdown")


def test_the_notebooks_say_the_same(table):
    "What the notebooks print of the same runs, in their committed outputs; where their rule is the weaker one, the page says what it calls different."
    def printed(page: str) -> str:
        cells = json.loads((ROOT / f"nbs/{page}.ipynb").read_text())["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        return "\n".join("".join(output.get("text", output.get("data", {}).get("text/markdown", []))) for output in outputs)

    assert "mnistfc: Entropy-SGD - Adam = +0.097 ± 0.012 % points, 3 and 3 seeds: Entropy-SGD is worse" in printed("02_entropy_sgd")
    assert "lenet: no verdict" in printed("02_entropy_sgd")
    smooth = printed("03_smoothout")
    for line in ("large batch against small batch, last_test_error: +0.633 ± 0.102, 3 seeds: DIFFERENT", "large + SmoothOut against large batch, last_test_error: -0.013 ± 0.103, 3 seeds: no difference seen",
                 "large + SmoothOut against large batch, test_error: +0.110 ± 0.051, 3 seeds: DIFFERENT", "large + SmoothOut against large batch, keskar_1e3: x 0.929, 3 seeds: DIFFERENT"):  # fmt: skip
        assert line in smooth
    sharp = printed("04_sharpest_directions")
    words = {"reproduced": "confirmed", "parity": "not seen", "not reproduced": "refuted"}
    theirs = {"The peak of the sharpest": "5 η has a lower one", "The peak is higher": "4 S has a higher peak than S", "Gradients lie": "each of the top directions, against chance", "Twice the step": "twice the step along",
              "The whole step": "the whole step lowers it", "Nudged-SGD, γ = 0.1, ends": "γ = 0.1 ends sharper", "Nudged-SGD ends farther": "γ = 0.1 ends farther", "Nudged-SGD generalises better, by": "γ = 0.1 has the lower last validation error",
              "And by the mean validation": "γ = 0.1: lower late validation error", "Nudged-SGD trains faster": "γ = 0.1: lower late training loss", "Nudged-SGD has the lower": "γ = 0.1: lower validation error at SGD's cost"}  # fmt: skip
    for ours, claim in theirs.items():
        status = table[(table["page"] == "04_sharpest_directions") & table["claim"].str.startswith(ours)]["status"].item()
        cell = next(line for line in sharp.splitlines() if claim in line).split("|")[3]  # of CIFAR-10
        weaker = dict.fromkeys(["The peak is higher", "Twice the step", "And by the mean validation", "Nudged-SGD trains faster"], "confirmed") | {"Nudged-SGD ends farther": "refuted"}
        assert weaker.get(ours, words[status]) in cell and (ours not in weaker or status == "parity"), (ours, cell)
    for said in ("the peak with four times the batch, twice the step, and the first two of those asked afterwards are *confirmed* there, and that nudged runs end farther is *refuted*", "two rows more are different"):
        assert said in prose()
    regimes = printed("06_sgd_regimes")
    for value, low, high in table[table["page"] == "06_sgd_regimes"]["ours"].str.extract(r"^(-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\]").dropna().astype(float).to_numpy():
        found = [[float(number) for number in line] for line in re.findall(r"(-?\d\.\d+) *\|? *\[?(-?\d\.\d+),? *\|? *(-?\d\.\d+)", regimes)]
        assert any(np.allclose(one, (value, low, high), atol=0.0051) for one in found), value


def test_the_numbers_in_the_pages_sentences(table):
    text = prose()
    factor = math.exp(table[table["claim"] == "SmoothOut ends flatter, by Keskar's φ, ε = 0.001"]["difference"].item())
    assert rf"$\phi$ is {100 - 100 * factor:.0f} % lower" in text
    moved = table[table["claim"] == "The weights move like T"]["ours"].item().split()[0]
    assert f"for {moved} is within 0.05 of 1" in text
    assert f"an interval of {100 * (2 / math.sqrt(6)):.0f} %" in text  # of Student's t with two degrees of freedom, two standard errors either way: 2 / sqrt(2 + 2^2)


def test_margins_are_the_same_for_a_kind():
    laws = {claim.words: claim.question.margin for _, claim in ALL if isinstance(claim.question, Law)}
    assert {words for words, margin in laws.items() if margin == 0.05} == {words for words in laws if words.endswith("like T") or "perceptron" in words}
    assert set(laws.values()) == {0.05, 0.1}


def test_a_comparison_that_was_picked_says_among_how_many():
    afterwards = sum("asked afterwards" in claim.words for _, claim in ALL)
    for _, claim in ALL:
        if isinstance(claim.question, Comparison):
            looks = claims.effect_of_noise(Records())["alpha"].nunique() if "harm" in claim.question.rows else afterwards if "afterwards" in claim.words else 1
            assert claim.question.looks == looks, claim.words


def test_whose_a_claim_is():
    for page, claim in ALL:
        assert claim.paper.source != "abstract"  # of which version?
        assert ("Keskar et al." in claim.paper.source or claim.paper.source.startswith("PNAS")) == (claim.whose == "another's"), claim.words
    with pytest.raises(ClaimError, match="no source"):
        Claim("It is better", "digits", Paper(""), "needs a GPU")
    with pytest.raises(ClaimError, match="nobody's"):
        Claim("It is better", "digits", Paper("Table 1"), "needs a GPU", whose="nobody's")


# ---- tables that are spoilt ----

def rows_of(folder: Path) -> pd.DataFrame:
    return claims.table(folder).set_index(["page", "claim", "setting"])


ADAM = ("02_entropy_sgd", "Entropy-SGD's test error is lower than Adam's", "fully connected, MNIST")


def test_rows_taken_away_blank_the_claim(tables):
    spoil(tables, "entropy_sgd", lambda rows: rows.query("experiment != 'mnistfc'"))
    row = rows_of(tables).loc[ADAM]
    assert (row["status"], row["ours"], row["reason"], row["commit"]) == ("blank", "", "no record", "")
    assert "*blank: no record*" in claims.markdown(folder=tables)


def test_a_seed_taken_away_blanks_the_claim(tables):
    spoil(tables, "entropy_sgd", lambda rows: rows.query("experiment != 'mnistfc' or seed != 1"))
    row = rows_of(tables).loc[ADAM]
    assert (row["status"], row["seeds"], row["reason"]) == ("blank", 2, "2 seeds") and row["ours"].endswith("(2 seeds)")


def test_a_run_taken_away_blanks_the_claim(tables):
    spoil(tables, "entropy_sgd", lambda rows: rows.query("experiment != 'mnistfc' or method != 'adam' or seed != 1"))
    row = rows_of(tables).loc[ADAM]
    assert (row["status"], row["reason"]) == ("blank", "2 of 3 seeds") and row["ours"].endswith("(2 of 3 seeds)")


def test_a_value_changed_changes_the_claim(tables, table):
    def better(rows):
        rows.loc[(rows["experiment"] == "mnistfc") & (rows["method"] == "entropy_sgd"), "test_error"] -= 0.2
        return rows

    spoil(tables, "entropy_sgd", better)
    assert rows_of(tables).loc[ADAM, "status"] == "reproduced"
    assert claims.markdown(folder=tables) != shown_at()


@pytest.mark.parametrize(("page", "claim"), [(page, claim) for page, claim in ASKED if not isinstance(claim.question, Law)], ids=named)
def test_without_its_rows_a_claim_is_blank_or_refused(page, claim):
    "The rows of its query, and of its baseline, taken from whatever table it asks."
    records = Records()
    runs, _ = claims.table_of(claim.question.runs, records)
    queries = [claim.question.rows] + ([claim.question.against] if getattr(claim.question, "against", None) else [])
    for query in queries:
        question = type(claim.question)(**vars(claim.question) | {"runs": lambda records: runs.drop(runs.query(query).index)})
        answer = question.answer(records, claim.paper)
        assert (answer.status, answer.ours, answer.reason) == ("blank", "", "no record")


@pytest.mark.parametrize("part", ["digits_map", "mnist", "perceptron"])
def test_a_run_taken_from_a_sweep_is_missed(tables, part):
    spoil(tables, f"sgd_regimes_{part}", lambda rows: rows.iloc[:-1])
    with pytest.raises(ClaimError, match=f"sgd_regimes_{part}.csv has .* its record"):
        claims.table(tables)


def test_a_sweep_without_its_record_is_refused(tables):
    spoil(tables, "sgd_regimes", lambda rows: rows.query("experiment != 'mnist'"))
    with pytest.raises(ClaimError, match="sgd_regimes_mnist.csv has 336 runs.* 0 of"):
        claims.table(tables)


def test_a_sweep_without_commit_is_refused(tables):
    spoil(tables, "sgd_regimes", lambda rows: rows.assign(commit=np.nan))
    with pytest.raises(ClaimError, match="without commit"):
        claims.table(tables)


@pytest.mark.parametrize("name", ["entropy_sgd", "smoothout", "sharpest_directions_curves", "bayesian_compression", "sgd_regimes_mnist"])
def test_a_table_that_is_not_there_is_named(tables, name):
    (tables / f"{name}.csv").unlink()
    with pytest.raises(ClaimError, match=f"results/{name}.csv is not there"):
        claims.table(tables)


def test_a_column_that_is_not_there_is_named_in_one_line(tables):
    spoil(tables, "smoothout", lambda rows: rows.drop(columns="last_test_error"))
    with pytest.raises(OneLineError, match="no column 'last_test_error'") as error:
        claims.table(tables)
    assert "\n" not in str(error.value)


def test_without_a_clone_one_line_says_so(tmp_path):
    shutil.copytree(ROOT / "flatmin_nb", tmp_path / "flatmin_nb", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import flatmin_nb.claims as c\ntry: c.table()\nexcept c.ClaimError as e: print(e)"
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("the claims are drawn from results/ of a clone") and said.stdout.count("\n") == 1


def test_importing_it_loads_neither_torch_nor_matplotlib():
    code = "import sys, flatmin_nb.claims; print(*{'torch', 'matplotlib', 'IPython'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.split() == []


# ---- what is shown ----

def test_the_readme_shows_the_table():
    block = re.search(r"<!-- claims: begin -->\n(.*?)<!-- claims: end -->", README, flags=re.S)[1]
    assert block.strip() == shown_at(), "README.md is not what results/ says; `make figures` writes it again"


@pytest.mark.parametrize("page", ["index", "claims"])
def test_the_pages_show_the_table(page, table):
    cells = json.loads((ROOT / f"nbs/{page}.ipynb").read_text())["cells"]
    shown = ["".join(output.get("data", {}).get("text/markdown", [])) for cell in cells for output in cell.get("outputs", [])]
    assert shown_at(base="") in shown, f"nbs/{page}.ipynb is not what results/ says; `make figures` runs it again"
    if page == "claims":
        lines = {line for text in shown for line in text.splitlines()}
        assert set(claims.written(table).splitlines()) <= lines


def test_the_markdown_is_one_table_whose_links_resolve(table):
    text = shown_at()
    lines, after, notes = text.split("\n\n")
    assert f"{table['front'].sum()} of {len(table)} rows" in after and all(line.startswith("- **") for line in notes.splitlines())
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) == len(claims.PAGES) + 1 and all((ROOT / link).is_file() for link in links)
    assert len(lines.splitlines()) == 2 + len(claims.PAGES) + table["front"].sum() and 18 <= table["front"].sum() <= 24
    for one in (lines, claims.written(table)):
        assert all(len(re.findall(r"(?<!\\)\|", line)) == 6 for line in one.splitlines())
    assert not text.startswith("\n") and not text.endswith("\n")


def test_the_counts_are_those_of_the_table(table):
    notes = shown_at().split("\n\n")[2]
    counted = {}
    for start, whose in (("claims of the five papers, ", "theirs"), ("Of two others (Keskar et al.; PNAS 2024), ", "another's"), ("A further ", "ours")):
        number, parts = re.search(re.escape(start) + r"(\d+): ([^.]+?)(?:\.|, marked)", notes).groups()
        counted[whose] = {status: int(count) for count, status in re.findall(r"(\d+) ([a-z ]+)", parts)}
        assert sum(counted[whose].values()) == int(number)
    assert counted == {whose: rows["status"].value_counts().to_dict() for whose, rows in table.groupby("whose")}


def test_the_front_page_hides_no_kind_of_outcome(table):
    "Each paper's line on the front page has its failures and its blanks, if it has any."
    for page, rows in table.groupby("page"):
        assert {"not reproduced", "blank"} & set(rows["status"]) <= set(rows[rows["front"]]["status"]), page


# ---- how to cite ----

def test_the_citation_is_that_of_this_project():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    settings = dict(re.findall(r"^(\w+) = (.*)$", (ROOT / "settings.ini").read_text(), flags=re.M))
    assert cited["cff-version"] == "1.2.0" and {"message", "title", "authors", "license"} <= set(cited)
    assert cited["version"] == settings["version"] and cited["title"] == f"{settings['title']}: {settings['description']}"
    assert cited["authors"] == [{"name": settings["author"]}]
    assert cited["url"] == f"https://github.com/{settings['user']}/{settings['repo']}"


def test_bibtex_has_the_papers_of_the_citation():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    index = "".join("".join(cell["source"]) for cell in json.loads((ROOT / "nbs/index.ipynb").read_text())["cells"])
    entries, own = (re.search(r"```bibtex\n(.*?)```", text, flags=re.S)[1] for text in (README, index))
    assert entries.startswith(own.rstrip()) and own.count("@") == 1  # the index shows our own entry alone
    assert len(re.findall(r"^@\w+\{", entries, flags=re.M)) == 1 + len(cited) == 6
    plain = " ".join(re.sub(r"\\k|\\l|[{}]", "", entries).split())
    for paper in cited:
        number = paper["url"].rsplit("/", 1)[1]
        assert f"eprint = {number}" in plain and paper["title"] in plain and f"year = {paper['year']}" in plain
        assert all(author["family-names"].encode("ascii", "ignore").decode()[:4] in plain for author in paper["authors"])
        assert number in "".join((ROOT / f"nbs/{page}.ipynb").read_text() for page in claims.PAGES if page != "01_flatness")


# ---- the front pages ----

CARDS = ["00_tour", *claims.PAGES]


@pytest.mark.parametrize(("text", "folder"), [(README, "nbs/"), ("".join("".join(cell["source"]) for cell in json.loads((ROOT / "nbs/index.ipynb").read_text())["cells"]), "")], ids=["README", "index"])
def test_every_page_has_a_card_whose_picture_has_words(text, folder):
    for page in CARDS:
        alternative = re.search(rf"\[!\[([^\]]+)\]\({folder}images/{page}\.png\)\]\({folder}{page}\.ipynb\)", text)
        assert alternative and len(alternative[1]) > 20, page
    front = re.search(rf"\[!\[([^\]]+)\]\({folder}images/front\.png\)\]\({folder}00_tour\.ipynb\)", text)
    tour = "".join("".join(cell["source"]) for cell in json.loads((ROOT / "nbs/00_tour.ipynb").read_text())["cells"] if "#| label: front" in "".join(cell["source"]))
    assert front[1] == json.loads(re.search(r"^#\| fig-alt: (\".*\")$", tour, flags=re.M)[1])  # who ends where is said once


ANSWER = "The short answer so far: at equal train loss, descent on all images ends sharper, by most measures, than small batches do, and generalises a little worse; but no method that looks for flat minima was seen to generalise better than its baseline in our runs, and one that ends three times as sharp was not seen to generalise worse after as many epochs, though at equal cost it was behind."


def test_the_short_answer_is_what_the_records_say():
    for text in (README, "".join("".join(cell["source"]) for cell in json.loads((ROOT / "nbs/index.ipynb").read_text())["cells"])):
        assert ANSWER in " ".join(text.split())
    rows = claims.table()
    rows = rows[rows["status"] != "blank"]
    status = lambda words: rows[rows["claim"].str.startswith(words)].set_index("claim")["status"]
    assert (status("At equal train loss, descent on all images") == "reproduced").all() and len(status("At equal train loss, descent on all images")) == 2
    ratio = pd.read_csv(RESULTS / "flatness.csv").pivot_table(index="measure", columns="batch", values="value").drop(["test error, %", "test loss", "length of the weights"]).eval("large / small")
    assert len(ratio) == 16 and (ratio > 1).sum() == 13  # sharper by most measures, not by all
    better = pd.concat([status(words) for words in ("Entropy-SGD's test error is lower than", "SmoothOut lowers", "AdaSmoothOut lowers", "The compressed net's test error is lower", "Nudged-SGD generalises better", "And by the mean validation")])
    assert len(better) == 8 and "reproduced" not in set(better)
    sharper = rows[rows["claim"] == "Nudged-SGD, γ = 0.1, ends sharper than SGD"].squeeze()
    assert sharper["status"] == "reproduced" and 2.5 < math.exp(sharper["difference"]) < 3.5
    assert status("Nudged-SGD has the lower validation error at the cost of SGD's").item() == "not reproduced"
    runs = Records()("smoothout")
    for experiment, column in [(experiment, column) for experiment in ("f1", "digits") for column in ("test_error", "last_test_error")]:
        errors = runs[runs["experiment"] == experiment].pivot(index="seed", columns="method", values=column)
        methods = errors.columns.intersection(["smoothout", "adasmoothout", "sam", "asam"])
        assert len(methods) > 2
        for method in methods:
            change = (errors[method] - errors["large"]).dropna()
            assert stats.ttest_1samp(change, 0, alternative="less").pvalue > 0.025, (experiment, column, method)


def cards(text: str, folder: str) -> list[tuple[str, str]]:
    "Of each card the alternative text, and its words."
    found = re.findall(rf"\[!\[([^\]]+)\]\({folder}images/\w+\.png\)\]\({folder}\w+\.ipynb\)(?:<br>|\s+)(\*\*\[.*?)(?= \||\n)", text)
    return [(picture, words.replace(f"]({folder}", "](")) for picture, words in found]


def test_the_cards_of_the_readme_are_those_of_the_index():
    index = "\n".join("".join(cell["source"]) for cell in json.loads((ROOT / "nbs/index.ipynb").read_text())["cells"])
    assert len(cards(index, "")) == len(CARDS) and cards(README, "nbs/") == cards(index, "")
