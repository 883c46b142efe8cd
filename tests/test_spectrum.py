"""Eigenpairs, traces and densities, where a notebook would be too slow: many spectra, many seeds, peers, a real net."""

from itertools import product

import curvlinops
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh

from flatmin_nb.lab.curvature import (
    CurvatureError,
    Dense,
    Hessian,
    Operator,
    Overflow,
    diagonal,
    spectral_density,
    squared_frobenius_norm,
    top_eigenpairs,
    trace,
    track_eigenpairs,
)
from flatmin_nb.lab.data import load
from flatmin_nb.lab.models import mlp


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_spectrum(eigenvalues, seed=0):
    Q = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=seed)).Q
    matrix = (Q * eigenvalues.double()) @ Q.T
    return Dense(((matrix + matrix.T) / 2).to(eigenvalues.dtype))


class Counted(Operator):
    "The products of a matrix, changed; each one counted."

    def __init__(self, matrix, change=lambda product, vector: product):
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix, self.change = matrix, change

    def _multiply(self, vectors):
        return [self.change(self.matrix @ vector, vector) for vector in vectors]


SPECTRA = {
    "outliers on a bulk": torch.cat([torch.linspace(-1, 1, 290), torch.arange(2.0, 12.0)]),
    "no gap": torch.linspace(-3, 3, 300),
    "squares": 1 + torch.linspace(0, 1, 300) ** 2,
    "decay": torch.logspace(0, -9, 300) - 0.5,
    "negative definite": -torch.linspace(1, 5, 300),
    "both ends": torch.cat([torch.linspace(-9, -5, 10), torch.zeros(280), torch.linspace(5.2, 9.2, 10)]),
    "pairs": torch.arange(1.0, 151.0).repeat_interleave(2) / 150,
}


def true_residuals(matrix, pairs):
    matrix, vectors, values = matrix.double(), pairs.vectors.double(), pairs.values.double()
    return (matrix @ vectors - vectors * values).norm(dim=0)


@pytest.mark.parametrize("basis", [None, 14], ids=["one basis", "restarts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("name", SPECTRA)
def test_eigenpairs_are_those_of_the_matrix(name, which, dtype, basis):
    values = SPECTRA[name].double()
    A = Counted(with_spectrum(values).matrix.to(dtype))
    pairs = top_eigenpairs(A, k=4, which=which, basis=basis)
    assert pairs.converged.all()
    assert pairs.products == A.products
    scale = values.abs().max()
    assert (true_residuals(A.matrix, pairs) <= pairs.residuals + 1e-6 * scale).all()
    assert (pairs.residuals <= torch.maximum(1e-3 * pairs.values.abs(), 1e-5 * scale)).all()
    identity = torch.eye(4, dtype=dtype)
    torch.testing.assert_close(pairs.vectors.T @ pairs.vectors, identity, atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=0)
    # each is within its residual of an eigenvalue; and unless values repeat without end, these are the best ones
    assert ((pairs.values[:, None].double() - values).abs().amin(1) <= pairs.residuals + 1e-6 * scale).all()
    if name != "pairs":
        rank = {"LA": torch.clone, "SA": torch.neg, "LM": torch.abs}[which]
        best = rank(values).sort(descending=True).values[:4]
        torch.testing.assert_close(rank(pairs.values.double()), best, atol=2e-3 * scale.item(), rtol=0)


@pytest.mark.parametrize("seed", range(6))
def test_rounding_does_not_undo_convergence(seed):
    "The rounding of single precision is a tenth of what these small eigenvalues may be wrong by: the search leaves room for it."
    for name, basis in product(("outliers on a bulk", "pairs"), (None, 14)):
        A = Counted(with_spectrum(SPECTRA[name].double()).matrix.float())
        pairs = top_eigenpairs(A, k=4, which="SA", basis=basis, seed=seed)
        assert pairs.converged.all() and pairs.products == A.products < 400
        assert (true_residuals(A.matrix, pairs) <= pairs.residuals + 1e-6).all()


def test_what_is_nearly_zero_and_not_found_is_not_called_converged():
    "The smallest of values that decay to zero: hopeless, relative to themselves."
    for basis in (None, 14):
        pairs = top_eigenpairs(with_spectrum(torch.logspace(0, -9, 300).double()), k=4, which="SA", basis=basis, max_products=200)
        assert pairs.products == 200 and not pairs.converged[1:].any()


@pytest.mark.parametrize("seed", range(5))
def test_fewer_products_than_eigsh(seed):
    A = Counted(with_spectrum(SPECTRA["outliers on a bulk"].double(), seed).matrix)
    eigsh(A.to_scipy(), k=5, which="LA", tol=1e-3, v0=normal(A.size, seed=seed).numpy())
    asked = A.products
    assert top_eigenpairs(A, k=5, seed=seed).products <= asked


def test_residuals_far_below_the_tolerance_are_reached_after_many_restarts():
    A = with_spectrum(torch.linspace(0, 1, 400).double())
    pairs = top_eigenpairs(A, k=3, tolerance=1e-9, basis=12, max_products=5000)
    assert pairs.converged.all() and pairs.products > 100
    assert (true_residuals(A.matrix, pairs) < 1e-8).all()


@pytest.mark.parametrize("copies", [2, 3, 7])
def test_copies_of_an_eigenvalue_are_found_after_a_breakdown(copies):
    values = torch.tensor([5.0] * copies + [2.0] * 40 + [-1.0] * 50).double()
    for basis in (None, 10):
        pairs = top_eigenpairs(with_spectrum(values), k=4, basis=basis)
        torch.testing.assert_close(pairs.values, values[:4], atol=1e-9, rtol=0)
        assert pairs.converged.all() and pairs.products < 30


@pytest.mark.parametrize("size", range(1, 9))
def test_every_pair_of_a_small_matrix(size):
    matrix = normal(size, size)
    A = Dense(matrix + matrix.T)
    for k in range(1, size + 1):
        pairs = top_eigenpairs(A, k=k)
        torch.testing.assert_close(pairs.values, torch.linalg.eigvalsh(A.matrix).flip(0)[:k], atol=1e-2, rtol=1e-2)
        assert pairs.converged.all() and pairs.products <= size + 1


def test_a_diagonal_matrix_and_a_start_that_is_an_eigenvector():
    values = torch.arange(1, 201).double()
    A = Dense(torch.diag(values))
    start = torch.zeros(200, 1, dtype=torch.float64)
    start[0] = 1  # the smallest
    torch.testing.assert_close(top_eigenpairs(A, k=3, start=start).values, values.flip(0)[:3], atol=0.1, rtol=0)
    blind = top_eigenpairs(A, k=3, start=torch.zeros(200).double())
    torch.testing.assert_close(blind.values, values.flip(0)[:3], atol=0.1, rtol=0)


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3])
def test_an_operator_that_changes_is_never_called_converged(noise):
    matrix = with_spectrum(SPECTRA["outliers on a bulk"].double()).matrix
    count = iter(range(1, 10**6))

    def changed(product, vector):
        direction = normal(len(vector), seed=next(count))
        return product + noise * product.norm() * direction / direction.norm()

    for seed in range(10):
        pairs = top_eigenpairs(Counted(matrix, changed), k=3, tolerance=noise / 10, max_products=60, seed=seed)
        assert not pairs.converged.any()


def test_an_operator_that_is_not_linear_is_never_called_converged():
    matrix = with_spectrum(SPECTRA["outliers on a bulk"].double()).matrix
    shift = normal(300) / 300**0.5
    for change in (lambda product, vector: product + 0.03 * shift, lambda product, vector: product + vector.abs(), lambda product, vector: product.relu()):
        assert not top_eigenpairs(Counted(matrix, change), k=3, max_products=60).converged.any()


def test_a_vector_that_is_multiplied_is_never_changed():
    kept = []
    A = Counted(with_spectrum(SPECTRA["no gap"].double()).matrix, lambda product, vector: kept.append((vector, vector.clone())) or product)
    top_eigenpairs(A, k=2, max_products=40)
    assert len(kept) == A.products and all(torch.equal(vector, copy) for vector, copy in kept)
    same = Counted(torch.eye(50).double(), lambda product, vector: vector)  # returns its argument itself
    assert top_eigenpairs(same, k=3).values.tolist() == [1, 1, 1]


def test_nothing_is_drawn_from_the_global_generators():
    A = with_spectrum(SPECTRA["no gap"].double())
    before = torch.get_rng_state()
    results = [top_eigenpairs(A, k=2, max_products=30).values, spectral_density(A, steps=8).nodes, diagonal(A, products=12).value]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(123)
    again = [top_eigenpairs(A, k=2, max_products=30).values, spectral_density(A, steps=8).nodes, diagonal(A, products=12).value]
    assert all(torch.equal(one, two) for one, two in zip(results, again))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(k=0), "k must be an integer from 1"),
        (dict(k=301), "got 301 eigenpairs of an operator of size 300"),
        (dict(tolerance=-1), "tolerance must be a number in"),
        (dict(max_products=5), "max_products must be an integer from 6"),
        (dict(basis=6), "basis must be an integer from 7"),
        (dict(which="largest"), "no order 'largest'"),
        (dict(start=torch.ones(299)), "got [299]"),
        (dict(start=torch.full((300,), torch.nan)), "start must be finite"),
        (dict(seed=-1), "seed must be an integer from 0"),
    ],
)
def test_what_cannot_be_asked(arguments, message):
    with pytest.raises(CurvatureError) as trouble:
        top_eigenpairs(with_spectrum(SPECTRA["no gap"].double()), **arguments)
    assert message in str(trouble.value) and "\n" not in str(trouble.value)


# ---- estimates: z-scores over many seeds ----

STEEP = torch.cat([torch.logspace(1, -2, 60), torch.linspace(-0.2, 0.2, 90)]).double()
SEEDS = 300


def scores(estimate, exact):
    return torch.tensor([(one.value - exact) / one.standard_error for one in (estimate(seed) for seed in range(SEEDS))])


def is_student(scores, lowest=0.85, highest=1.3):
    "Centred within four standard errors, and as wide as a Student's t of some twenty degrees of freedom."
    assert abs(scores.mean()) < 4 * scores.std() / len(scores) ** 0.5
    assert lowest < scores.std() < highest


@pytest.mark.parametrize("method", ["hutch++", "xtrace", "hutchinson"])
def test_the_trace_is_unbiased_and_its_error_is_what_it_says(method):
    A = with_spectrum(STEEP)
    is_student(scores(lambda seed: trace(A, method=method, products=60, seed=seed), STEEP.sum()))


@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
def test_the_squared_norm_is_unbiased_and_its_error_is_what_it_says(method):
    A = with_spectrum(STEEP)
    is_student(scores(lambda seed: squared_frobenius_norm(A, method=method, products=60, seed=seed), STEEP.square().sum()))


@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
def test_the_diagonal_is_unbiased_and_its_errors_are_what_they_say(method):
    A = with_spectrum(STEEP)
    tries = [diagonal(A, method=method, products=60, seed=seed) for seed in range(40)]
    z = torch.stack([(one.value - A.matrix.diag()) / one.standard_error for one in tries])
    assert 0.9 < z.std() < 1.2
    assert (z.mean(0).abs() < 4.5 * z.std() / len(tries) ** 0.5).all()


def test_moments_and_log_determinants_are_unbiased_and_their_errors_are_what_they_say():
    values = torch.cat([torch.linspace(0.5, 2, 190), torch.linspace(3, 9, 10)]).double()
    A = with_spectrum(values)
    densities = [spectral_density(A, steps=24, vectors=12, seed=seed) for seed in range(100)]
    for f in (lambda values: values, lambda values: values**2, torch.log):
        estimates = [density.trace(f) for density in densities]
        z = torch.tensor([(one.value - f(values).sum()) / one.standard_error for one in estimates])
        is_student(z, highest=1.4)


def test_known_pairs_are_counted_exactly_and_the_rest_is_still_unbiased():
    values = torch.cat([torch.linspace(0.5, 2, 190), torch.linspace(30, 90, 10)]).double()
    A = with_spectrum(values)
    known = top_eigenpairs(A, k=10)
    densities = [spectral_density(A, steps=24, vectors=12, known=known, seed=seed) for seed in range(100)]
    for p in (1, 2):
        estimates = [density.moment(p) for density in densities]
        assert max(one.standard_error for one in estimates) < 1e-2 * (values**p).mean()
    is_student(torch.tensor([(one.value - torch.log(values).sum()) / one.standard_error for one in (d.trace(torch.log) for d in densities)]), highest=1.4)
    assert torch.isclose(densities[0].weights.sum(1), torch.ones(12).double()).all()
    partly = top_eigenpairs(A, k=10, max_products=13)
    assert not partly.converged.all()
    is_fine = spectral_density(A, known=partly, vectors=12).moment(1)
    assert abs(is_fine.value - values.mean()) < 4 * is_fine.standard_error + 1e-3
    with pytest.raises(CurvatureError, match="all 200 eigenvalues are known"):
        spectral_density(A, known=top_eigenpairs(A, k=200))


def test_quadrature_is_exact_for_what_the_start_vector_sees():
    "n nodes integrate polynomials of degree 2n - 1: v^T A^p v, p up to 15 for 8 nodes, with A scaled to keep the powers tame."
    A = with_spectrum(torch.linspace(-1, 1, 100).double())
    density = spectral_density(A, steps=8, vectors=1)
    finer = spectral_density(A, steps=40, vectors=1)  # the same start vector
    for p in range(16):
        torch.testing.assert_close((density.weights * density.nodes**p).sum(), (finer.weights * finer.nodes**p).sum(), atol=1e-12, rtol=0)


def test_random_vectors_are_not_the_data_that_were_drawn_with_the_same_seed():
    data = torch.randn(400, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    A = Dense(data.T @ data / 400)
    z = torch.tensor([(one := spectral_density(A, steps=4, vectors=8, seed=7).moment(p)).value - torch.trace(torch.matrix_power(A.matrix, p)) / 200
                      for p in (1, 2)]) / one.standard_error  # fmt: skip
    assert (z.abs() < 5).all()


@pytest.mark.parametrize("ours, theirs", [("hutch++", curvlinops.hutchpp_trace), ("xtrace", curvlinops.xtrace), ("hutchinson", curvlinops.hutchinson_trace)])
def test_traces_are_as_good_as_those_of_curvlinops(ours, theirs):
    A, exact = with_spectrum(STEEP), STEEP.sum()
    own = torch.tensor([trace(A, method=ours, products=60, seed=seed).value for seed in range(100)]) - exact
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        peer = torch.tensor([float(theirs(A.matrix, 60)) for _ in range(100)]) - exact
    assert own.square().mean().sqrt() < 1.3 * peer.square().mean().sqrt()


# ---- a net whose whole Hessian can still be decomposed ----


@pytest.mark.slow
def test_the_spectrum_of_a_net_of_5000_weights():
    digits = load("digits")
    data = digits.train_images.double() / 127.5 - 1, digits.train_labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = mlp(hidden=(52, 26)).double()
    descent = torch.optim.SGD(net.parameters(), lr=0.2)
    for _ in range(100):
        descent.zero_grad()
        F.cross_entropy(net(data[0]), data[1]).backward()
        descent.step()
    H = Hessian(net, F.cross_entropy, data)
    assert 4900 < H.size < 5100
    matrix = H.dense()
    exact = torch.linalg.eigvalsh(matrix)
    A = Dense((matrix + matrix.T) / 2)  # the same products, faster
    for which, best in (("LA", exact.flip(0)), ("SA", exact)):
        torch.testing.assert_close(top_eigenpairs(H, k=5, which=which, tolerance=1e-5).values, best[:5], atol=1e-6 * exact[-1].item(), rtol=0)
    density = spectral_density(A, steps=80, vectors=10)
    scale = exact[-1].item()
    grid = torch.cat([torch.linspace(exact[0].item(), scale, 20001).double()])
    gap = (density.cumulative(grid) - torch.searchsorted(exact, grid, right=True) / len(exact)).abs()
    assert gap.sum() * (grid[1] - grid[0]) < 2e-3 * scale  # Wasserstein
    assert gap[grid.abs() > 0.01 * scale].max() < 0.01  # Kolmogorov, off the mass at zero
    for p in (1, 2, 3):
        moment = density.moment(p)
        assert abs(moment.value - (exact**p).mean()) < 4.8 * moment.standard_error
    for estimate, truth in ((trace(A), exact.sum()), (squared_frobenius_norm(A), exact.square().sum())):
        assert abs(estimate.value - truth) < 4 * estimate.standard_error


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_says_the_same():
    values = SPECTRA["outliers on a bulk"].double()
    A = Dense(with_spectrum(values).matrix.cuda())
    pairs = top_eigenpairs(A, k=5)
    assert pairs.converged.all() and {tensor.device.type for tensor in (pairs.values, pairs.vectors, pairs.residuals, pairs.converged)} == {"cuda"}
    torch.testing.assert_close(pairs.values.cpu(), values.flip(0)[:5], atol=1e-3, rtol=0)
    again = top_eigenpairs(A, k=5, start=pairs.vectors, basis=8, tolerance=1e-8)
    torch.testing.assert_close(again.values.cpu(), values.flip(0)[:5], atol=1e-9, rtol=0)
    for method in ("hutch++", "xtrace", "hutchinson"):
        estimate = trace(A, method=method)
        assert abs(estimate.value - values.sum()) < 5 * estimate.standard_error
    for estimate in (squared_frobenius_norm(A), spectral_density(A, vectors=12, known=pairs).trace(torch.square)):
        assert abs(estimate.value - values.square().sum()) < 5 * estimate.standard_error
    assert diagonal(A).value.device.type == "cuda"


@pytest.mark.parametrize("scale", [1e20, 1e30, 1e-24, 1e-30])
def test_what_the_precision_cannot_hold_is_not_called_converged(scale):
    "The squares of such norms are infinite or nothing in float32."
    matrix = torch.diag(scale * torch.linspace(-1, 1, 40, dtype=torch.float64))
    with pytest.raises(CurvatureError, match="scale the loss, or use float64"):
        top_eigenpairs(Dense(matrix.float()))
    assert top_eigenpairs(Dense(matrix)).values[0].item() == pytest.approx(scale, rel=1e-3)


def test_a_trace_beyond_the_rank_of_rounding():
    "One eigenvalue takes all the bits, two thousand others add up to 2."
    A = Dense(torch.diag(torch.tensor([1e4] + 2000 * [1e-3])))
    estimate = trace(A, method="xtrace")
    assert estimate.standard_error > 0
    assert abs(estimate.value - 10_002) < 4 * estimate.standard_error + 0.01
    assert estimate.products == A.products


# ---- tracking


def moved(A, by=0.05, seed=1):
    "A matrix near another one."
    change = normal(A.size, A.size, seed=seed)
    return Counted(A.matrix + by * A.matrix.abs().max() * ((change + change.T) / A.size).to(A.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("name", SPECTRA)
def test_tracked_pairs_are_orthonormal_with_true_residuals_and_counted_products(name, which, dtype):
    A = with_spectrum(SPECTRA[name].to(dtype))
    B = moved(A)
    pairs = track_eigenpairs(B, top_eigenpairs(A, k=4, which=which).vectors, which=which, max_products=15)
    assert pairs.products == B.products <= 15
    scale = B.matrix.abs().max()
    true = true_residuals(B.matrix, pairs)
    assert (true <= pairs.residuals + 1e-5 * scale).all() and (pairs.residuals <= 1.01 * true + 1e-5 * scale).all()
    assert (true <= torch.maximum(1e-2 * pairs.values.abs(), 1e-4 * scale))[pairs.converged].all()
    torch.testing.assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(4, dtype=dtype), atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_tracking_with_products_enough_finds_what_lanczos_finds(seed):
    A = with_spectrum(SPECTRA["outliers on a bulk"].double(), seed)
    B = moved(A, seed=seed + 1)
    tracked = track_eigenpairs(B, top_eigenpairs(A, k=5).vectors, tolerance=1e-6, max_products=200)
    assert tracked.converged.all()
    torch.testing.assert_close(tracked.values, torch.linalg.eigvalsh(B.matrix).flip(0)[:5], atol=1e-9, rtol=0)


def test_with_k_and_one_products_the_span_stays_and_only_its_pairs_are_found():
    A = moved(with_spectrum(SPECTRA["no gap"].double()))
    start = torch.linalg.qr(normal(A.size, 4)).Q
    pairs = track_eigenpairs(A, start, max_products=5)
    torch.testing.assert_close(pairs.vectors @ pairs.vectors.T, start @ start.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(pairs.values, torch.linalg.eigvalsh(start.T @ A.matrix @ start).flip(0), atol=1e-12, rtol=0)


def test_an_operator_that_is_not_the_same_twice_is_never_called_converged_when_tracked():
    A, random = with_spectrum(SPECTRA["outliers on a bulk"].double()), torch.Generator().manual_seed(0)
    noise = lambda product, v: product + 1e-2 * product.norm() * torch.randn(A.size, dtype=torch.float64, generator=random) / A.size**0.5
    assert not track_eigenpairs(Counted(A.matrix, noise), top_eigenpairs(A, k=4).vectors, tolerance=1e-4, max_products=60).converged.any()


def test_a_start_of_too_few_directions_and_a_space_that_is_all():
    A = with_spectrum(torch.arange(1.0, 9.0).double())
    same = normal(8, 1).expand(8, 3)
    assert track_eigenpairs(A, same, max_products=50).converged.all()
    assert track_eigenpairs(A, torch.zeros(8, 2), max_products=50).converged.all()
    whole = track_eigenpairs(A, normal(8, 8))
    torch.testing.assert_close(whole.values, torch.arange(8.0, 0, -1).double(), atol=1e-12, rtol=0)
    assert whole.products == 9 and whole.converged.all()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(start=torch.ones(5)), r"start must be real and finite, of shape \[8, k\]; got \[5\]"),
        (dict(start=torch.ones(8, 2, dtype=torch.complex64)), r"got \[8, 2\], torch.complex64"),
        (dict(start=torch.ones(8)), r"of shape \[8, k\]; got \[8\]"),
        (dict(start=torch.ones(8, 9)), r"of shape \[8, k\]; got \[8, 9\]"),
        (dict(start=torch.full((8, 2), torch.nan)), "start must be real and finite"),
        (dict(start=[1.0] * 8), "got list"),
        (dict(start=torch.ones(8, 2), max_products=2), "max_products"),
        (dict(start=torch.ones(8, 2), tolerance=1.0), "tolerance"),
        (dict(start=torch.ones(8, 2), which="top"), "no order 'top'"),
    ],
)
def test_what_cannot_be_tracked_is_said_in_one_line(arguments, words):
    with pytest.raises(CurvatureError, match=words) as caught:
        track_eigenpairs(with_spectrum(torch.arange(1.0, 9.0).double()), **arguments)
    assert "\n" not in str(caught.value)


def test_a_net_is_tracked_over_a_step():
    images = load("digits")
    x, y = images.train_images[:200].double() / 16, images.train_labels[:200]
    net = mlp(inputs=64, hidden=(16,)).double()
    old = top_eigenpairs(Hessian(net, F.cross_entropy, (x, y)), k=3).vectors
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    H = Hessian(net, F.cross_entropy, (x, y))
    pairs = track_eigenpairs(H, old, tolerance=1e-4, max_products=300)
    torch.testing.assert_close(pairs.values, torch.linalg.eigvalsh(H.dense()).flip(0)[:3], rtol=1e-6, atol=0)


# ---- numbers too large, and precisions too small ----

@pytest.mark.parametrize("find", [top_eigenpairs, lambda A, k: track_eigenpairs(A, normal(A.size, k, dtype=A.dtype))], ids=["found", "tracked"])
def test_products_too_large_to_square_are_an_overflow_and_too_small_ones_are_not(find):
    eigenvalues = torch.arange(1.0, 9.0)
    with pytest.raises(Overflow, match="whose squares torch.float32 cannot hold"):
        find(with_spectrum(eigenvalues * 1e19), k=2)
    with pytest.raises(CurvatureError, match="whose squares torch.float32 cannot hold") as trouble:
        find(with_spectrum(eigenvalues * 1e-22), k=2)
    assert not isinstance(trouble.value, ArithmeticError)
    assert find(with_spectrum((eigenvalues * 1e19).double()), k=2).values.isfinite().all()


def test_products_that_are_not_numbers_and_a_gradient_that_is_none_are_an_overflow():
    A = with_spectrum(torch.arange(1.0, 9.0))
    with pytest.raises(Overflow, match="the product is not finite at component 0"):
        Counted(A.matrix, lambda product, vector: product / 0) @ torch.ones(8)
    A.gradient = torch.full((8,), torch.inf)
    with pytest.raises(Overflow, match="the gradient is not finite"):
        top_eigenpairs(A, k=2)
    with pytest.raises(CurvatureError, match="the vector holds numbers that are not finite") as trouble:
        A @ A.gradient
    assert not isinstance(trouble.value, Overflow)  # that is a mistake, and no divergence


def test_pairs_are_tracked_in_bfloat16():
    eigenvalues = torch.tensor([8.0, 4.0, 1.0, 0.5, 0.0, -1.0])
    A, exact = with_spectrum(eigenvalues.bfloat16()), with_spectrum(eigenvalues.double())
    pairs = track_eigenpairs(A, torch.linalg.eigh(exact.matrix).eigenvectors.flip(1)[:, :2], max_products=6)
    assert pairs.values.dtype == torch.bfloat16 and pairs.values.tolist() == pytest.approx([8, 4], rel=0.03)


def test_more_pairs_than_the_usual_number_of_products():
    def begun(product, vector):
        raise InterruptedError("its arguments were good")

    with pytest.raises(InterruptedError):
        top_eigenpairs(Counted(torch.eye(600), begun), k=550)


def test_tracking_an_operator_that_is_not_symmetric_ends():
    lopsided = torch.zeros(4, 4).double()
    lopsided[0, 0], lopsided[0, 1] = 1.0, 5.0  # what is left of every product lies in the span of the first two
    start = torch.eye(4, 2).double().requires_grad_()
    pairs = track_eigenpairs(Counted(lopsided, lambda product, vector: product), start, max_products=20, tolerance=1e-6)
    assert pairs.values.isfinite().all() and not pairs.converged.all() and not pairs.vectors.requires_grad
