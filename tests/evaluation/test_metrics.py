"""Measures on features against closed forms, the papers' definitions and torchmetrics; on real images made worse."""

import io
import itertools
import json
import math
import warnings

import numpy as np
import pyarrow.parquet
import pytest
import scipy.linalg
import scipy.ndimage
import scipy.spatial
import torch
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ddpm_from_scratch.evaluation import metrics as metrics
from ddpm_from_scratch.evaluation.features import Features, extract
from ddpm_from_scratch.evaluation.metrics import (
    density_coverage,
    frechet_distance,
    kernel_distance,
    kernel_distance_with_error,
    measure,
    memorization,
    nearest_neighbors,
    precision_recall,
)
from helpers.paths import ROOT

DATA = ROOT / "training" / "data" / "fashion_mnist_train.parquet"


def normal(rows, columns, seed):
    return np.random.default_rng(seed).standard_normal((rows, columns))


# --- Fréchet distance ----------------------------------------------------------------------------------------------


def test_frechet_distance_on_a_line():
    a, b = normal(50, 1, 0), 3 * normal(70, 1, 1) + 5
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_scaled_and_shifted_features():
    """The covariances S C S and C of whitened features, C = 1, commute: the distance is |shift|² + |scales - 1|²."""
    x = normal(100, 4, 0)
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    scales, shift = np.array([0.5, 1.0, 2.0, 3.0]), np.array([1.0, -2.0, 0.0, 4.0])
    assert frechet_distance(x, x * scales + shift) == pytest.approx(21 + 5.25, rel=1e-12)


def correlated(rows, seed):
    return normal(rows, 8, seed) @ normal(8, 8, seed + 1) + seed


def frechet_formula(a, b, trace_of_root):
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * trace_of_root


def test_frechet_distance_against_the_root_of_the_product():
    a, b = correlated(40, 0), correlated(40, 2)
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T))
    assert frechet_distance(a, b) == pytest.approx(frechet_formula(a, b, np.trace(root).real), rel=1e-12)


def test_frechet_distance_of_covariances_without_full_rank():
    """The trace of the root is the sum of the singular values of A Bᵀ / (N - 1), for centred features A and B."""
    a, b = correlated(5, 0), correlated(5, 2)
    singular_values = scipy.linalg.svdvals((a - a.mean(0)) @ (b - b.mean(0)).T) / 4
    assert frechet_distance(a, b) == pytest.approx(frechet_formula(a, b, singular_values.sum()), rel=1e-7)


@pytest.mark.parametrize("shared", [False, True])
def test_frechet_distance_of_more_columns_than_a_network_has(monkeypatch, shared):
    a, b = normal(30, 60, 0), normal(20, 60, 1) * 2 + 1
    b = a if shared else b
    dense = frechet_distance(a, b)
    monkeypatch.setattr(metrics, "WIDE", 50)
    assert frechet_distance(a, b) == pytest.approx(
        dense, rel=1e-7, abs=1e-5
    )  # of equal sets, the dense one rounds more


def test_frechet_distance_of_equal_sets_is_zero():
    x = normal(60, 10, 0)
    assert frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-12)


# --- kernel distance -----------------------------------------------------------------------------------------------


def test_kernel_distance_against_the_sum_over_pairs():
    a, b = normal(5, 3, 0), normal(7, 3, 1) + 0.5

    def mean(pairs):
        values = [(sum(p * q for p, q in zip(x, y, strict=True)) / 3 + 1) ** 3 for x, y in pairs]
        return sum(values) / len(values)

    within = [[(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j] for s in (a, b)]
    expected = mean(within[0]) + mean(within[1]) - 2 * mean([(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.full
def test_kernel_distance_is_unbiased():
    """Its mean over small draws is the distance of the distributions: 0, or with a shift by m along an axis, in 1-D.

    There E k(x, y) = E (xy + 1)³ = E[x³] E[y³] + 3 E[x²] E[y²] + 3 E[x] E[y] + 1, so that MMD² is a sum of squared
    differences of moments: (3m + m³)² + 3 (m²)² + 3 m².
    """
    m = 0.5
    for shift, expected in ((0, 0), (m, (3 * m + m**3) ** 2 + 3 * m**4 + 3 * m**2)):
        draws = normal(20_000 * 7, 1, 0).reshape(20_000, 7, 1)
        distances = np.array([kernel_distance(x[:3], x[3:] + shift) for x in draws])
        error = distances.std() / len(distances) ** 0.5
        assert abs(distances.mean() - expected) < 4 * error
        assert error < 0.5


def test_kernel_distance_tells_sets_apart():
    a, b = normal(500, 4, 0), normal(500, 4, 1)
    assert abs(kernel_distance(a, b)) < 0.05 < kernel_distance(a, b + 0.5)


# --- the kernel distance's standard error --------------------------------------------------------------------------


def test_the_error_is_that_of_the_mean_over_disjoint_subsets():
    a, b = normal(43, 3, 0), normal(35, 3, 1) + 0.5
    parts = [kernel_distance(x, y) for x, y in zip(np.array_split(a, 5), np.array_split(b, 5), strict=True)]
    found = kernel_distance_with_error(a, b, num_subsets=5, seed=None)
    assert found == (kernel_distance(a, b), pytest.approx(np.std(parts, ddof=1) / 5**0.5, rel=1e-12))


def test_the_error_covers_what_the_estimates_spread():
    """Where the distributions differ, it is the standard deviation over draws of both sets."""
    draws = [
        kernel_distance_with_error(normal(100, 2, 2 * seed), normal(100, 2, 2 * seed + 1) + 1) for seed in range(200)
    ]
    spread = np.std([draw.value for draw in draws], ddof=1)
    assert np.mean([draw.error for draw in draws]) == pytest.approx(spread, rel=0.25)


def test_subsets_are_dealt_so_that_the_order_of_the_rows_does_not_matter():
    a, b = (np.sort(normal(200, 1, seed), axis=0) for seed in (0, 1))
    b = b[::-1]
    in_order, dealt = (kernel_distance_with_error(a, b, seed=seed) for seed in (None, 0))
    assert dealt.value == in_order.value
    assert dealt.error < in_order.error / 5
    assert kernel_distance_with_error(a, b) == dealt != kernel_distance_with_error(a, b, seed=1)


# --- precision and recall, density and coverage --------------------------------------------------------------------


def squared(x, y):
    return sum((p - q) ** 2 for p, q in zip(x, y, strict=True))


def squared_radius(x, index, k):
    return sorted(squared(x[index], other) for j, other in enumerate(x) if j != index)[k - 1]


def share_in_manifold(rows, manifold, k):
    """Kynkäänniemi et al. 2019, eqs. 1 and 2."""
    radii = [squared_radius(manifold, i, k) for i in range(len(manifold))]
    return sum(any(squared(x, y) <= r for y, r in zip(manifold, radii, strict=True)) for x in rows) / len(rows)


def naive_density_coverage(generated, reference, k):
    """Naeem et al. 2020, eqs. 3 and 4."""
    radii = [squared_radius(reference, i, k) for i in range(len(reference))]
    inside = [[squared(x, y) < r for x in generated] for y, r in zip(reference, radii, strict=True)]
    return sum(map(sum, inside)) / (k * len(generated)), sum(map(any, inside)) / len(reference)


@pytest.mark.parametrize("entries", [2**24, 100], ids=["at once", "in parts"])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("kind", ["continuous", "ties"])
def test_against_the_definitions(monkeypatch, entries, k, kind):
    """Whole numbers put many rows on top of each other and on the surfaces of balls; there Python computes exactly."""
    monkeypatch.setattr(metrics, "ENTRIES", entries)
    if kind == "ties":
        draw = np.random.default_rng(0).integers
        generated, reference = draw(103, 110, (41, 3)), draw(100, 106, (29, 3))
    else:
        generated, reference = normal(41, 3, 0) + 0.7, normal(29, 3, 1)
    a, b = generated.tolist(), reference.tolist()
    expected = share_in_manifold(a, b, k), share_in_manifold(b, a, k)
    assert precision_recall(generated, reference, k=k) == pytest.approx(expected, rel=1e-12)
    assert 0 < min(expected) < 1
    expected = naive_density_coverage(a, b, k)
    assert density_coverage(generated, reference, k=k) == pytest.approx(expected, rel=1e-12)
    assert min(expected) > 0


def test_density_and_coverage_of_equal_distributions():
    """Their expectations do not depend on the distribution: Naeem et al. 2020, section 3.2."""
    k, n, m = 5, 60, 90
    draws = np.array([density_coverage(normal(n, 3, 2 * seed), normal(m, 3, 2 * seed + 1)) for seed in range(300)])
    errors = draws.std(axis=0, ddof=1) / len(draws) ** 0.5
    coverage = 1 - math.prod((m - j) / (n + m - j) for j in range(1, k + 1))
    assert np.abs(draws.mean(axis=0) - (1, coverage)).max() < 4 * errors.max() < 0.02


def test_features_far_from_the_origin_lose_nothing_to_rounding():
    a, b = normal(60, 5, 0).round(3), normal(50, 5, 1).round(3)
    assert precision_recall(a + 2**20, b + 2**20) == precision_recall(a, b)
    assert density_coverage(a + 2**20, b + 2**20) == density_coverage(a, b)
    np.testing.assert_allclose(nearest_neighbors(a + 2**20, b + 2**20), nearest_neighbors(a, b), rtol=1e-8)


def test_no_squared_distance_is_negative():
    x = normal(50, 5, 0) + 100
    for _, squared_distances in metrics._squared_distances(x, x):
        assert squared_distances.min() == 0


def test_nothing_is_shared_by_sets_far_apart():
    a, b = normal(30, 3, 0), normal(30, 3, 1) + 100
    assert precision_recall(a, b) == (0, 0)
    assert density_coverage(a, b) == (0, 0)


# --- what holds of all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_ideal_values_of_a_set_and_itself(scale):
    x = scale * (normal(60, 10, 0) + 5)
    assert frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-11 * scale**2)
    k = (x @ x.T / 10 + 1) ** 3
    assert kernel_distance(x, x) == pytest.approx(2 * (k.sum() - 60 * np.trace(k)) / (60**2 * 59), rel=1e-6)
    assert kernel_distance(x, x) <= 0
    assert precision_recall(x, x[::-1]) == (1, 1)
    assert density_coverage(x, x[::-1]) == (1, 1)
    assert (nearest_neighbors(x, x[::-1]).distance == 0).all()


def test_symmetry():
    a, b = normal(40, 4, 0), normal(30, 4, 1) + 0.3
    assert kernel_distance(a, b) == pytest.approx(kernel_distance(b, a), rel=1e-12)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert precision_recall(a, b) == precision_recall(b, a)[::-1]


@pytest.fixture(scope="module")
def images():
    """1200 real images, and their classes."""
    rows = pyarrow.parquet.read_table(DATA)[:1200]
    pixels = [np.array(Image.open(io.BytesIO(row["bytes"]))) for row in rows["image"].to_pylist()]
    return np.stack(pixels), np.array(rows["label"])


N = 300
DIMENSION = 64  # below N, so that covariances have full rank


@pytest.fixture(scope="module")
def features():
    """From images to features in a subspace that is drawn at random."""
    subspace = np.linalg.qr(normal(1280, DIMENSION, 0))[0]
    return lambda images: extract(images, size=32).values @ subspace


@pytest.fixture(scope="module")
def real(images, features):
    """Features of all the images; the first N are the reference."""
    return features(images[0])


def noisy(images, deviation):
    return (images + deviation * np.random.default_rng(0).standard_normal(images.shape)).clip(0, 255).astype(np.uint8)


def blurred(images, deviation):
    return scipy.ndimage.gaussian_filter(images, (0, deviation, deviation))


def check_strict(values, sign):
    assert all(sign * (after - before) > 0 for before, after in itertools.pairwise(values)), values


def check_distances_grow(sets, reference):
    for distance in (kernel_distance, frechet_distance):
        check_strict([distance(x, reference) for x in sets], 1)


@pytest.mark.full
def test_noise_adds_to_the_distances_and_takes_from_fidelity(images, features, real):
    sets = [features(noisy(images[0][N : 2 * N], deviation)) for deviation in (0, 4, 8, 16)]
    check_distances_grow(sets, real[:N])
    check_strict([precision_recall(x, real[:N]).precision for x in sets], -1)
    check_strict([density_coverage(x, real[:N]).density for x in sets], -1)


@pytest.mark.full
def test_blur_adds_to_the_distances_and_takes_from_fidelity(images, features, real):
    sets = [features(blurred(images[0][N : 2 * N], deviation)) for deviation in (0.1, 0.5, 0.75, 1, 1.5)]
    check_distances_grow(sets, real[:N])
    check_strict([precision_recall(x, real[:N]).precision for x in sets], -1)
    check_strict([density_coverage(x, real[:N]).density for x in sets], -1)


def test_missing_classes_add_to_the_distances_and_take_from_diversity(images, real):
    rest, labels = real[N:], images[1][N:]
    sets = [rest[np.resize(np.flatnonzero(labels < classes), N)] for classes in (10, 5, 2, 1)]
    check_distances_grow(sets, real[:N])
    check_strict([precision_recall(x, real[:N]).recall for x in sets], -1)
    check_strict([density_coverage(x, real[:N]).coverage for x in sets], -1)


def test_repeated_images_add_to_the_distances_and_take_from_diversity(real):
    sets = [real[N:][np.resize(np.arange(distinct), N)] for distinct in (300, 100, 30, 10, 3)]
    check_distances_grow(sets, real[:N])
    check_strict([precision_recall(x, real[:N]).recall for x in sets[:3]], -1)
    assert [precision_recall(x, real[:N]).recall for x in sets[2:]] == [0, 0, 0]
    check_strict([density_coverage(x, real[:N]).coverage for x in sets], -1)


def test_real_images_are_near_to_others(real):
    a, b = real[N : 2 * N], real[:N]
    value, error = kernel_distance_with_error(a, b)
    assert abs(value) < 3 * error < 0.01
    assert frechet_distance(a, b) < 0.2
    assert min(precision_recall(a, b)) > 0.75
    assert 0.9 < density_coverage(a, b).density < 1.15
    assert density_coverage(a, b).coverage > 0.95


class Given(torch.nn.Module):
    """An extractor for torchmetrics, to which features are given in place of images."""

    num_features = DIMENSION

    def forward(self, features):
        return features


def by_torchmetrics(metric, generated, reference):
    metric.set_dtype(torch.float64)
    metric.update(torch.from_numpy(reference), real=True)
    metric.update(torch.from_numpy(generated), real=False)
    return metric.compute()


@pytest.mark.parametrize("kind", ["noise", "fresh"])
def test_against_torchmetrics(images, features, real, kind):
    generated = features(noisy(images[0][N : 2 * N], 8)) if kind == "noise" else real[N : 2 * N]
    reference = real[:N]
    expected = float(by_torchmetrics(FrechetInceptionDistance(Given()), generated, reference))
    assert frechet_distance(generated, reference) == pytest.approx(expected, rel=1e-3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all extracted features")
        metric = KernelInceptionDistance(Given(), subsets=1, subset_size=N)
    expected = float(by_torchmetrics(metric, generated, reference)[0])
    assert kernel_distance(generated, reference) == pytest.approx(expected, rel=1e-3)


# --- copies of training images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [2**24, 50], ids=["at once", "in parts"])
def test_nearest_neighbors_are_those_of_all_distances(monkeypatch, entries):
    monkeypatch.setattr(metrics, "ENTRIES", entries)
    a, b = normal(30, 5, 0), normal(20, 5, 1) + 100
    distances = scipy.spatial.distance.cdist(a, b)
    found = nearest_neighbors(a, b)
    np.testing.assert_array_equal(found.row, distances.argmin(axis=1))
    np.testing.assert_allclose(found.distance, distances.min(axis=1), rtol=1e-12)


def test_copies_of_training_images_are_found_by_their_pixels(images):
    training, fresh = (x.reshape(N, -1) for x in (images[0][:N], images[0][N : 2 * N]))
    order = np.random.default_rng(0).permutation(N)
    found = nearest_neighbors(training[order], training)
    np.testing.assert_array_equal(found.distance, 0)
    np.testing.assert_array_equal(training[found.row], training[order])
    assert nearest_neighbors(fresh, training).distance.min() > 0
    assert nearest_neighbors(fresh[:1], training[:1]).row.tolist() == [0]


def test_memorization_tells_copies_from_new_images(real):
    training, held_out, fresh = real[: 2 * N], real[2 * N : 3 * N], real[3 * N :]
    assert memorization(training, training, held_out) == (1, 0.05, 0)
    assert memorization(held_out, training, held_out) == (pytest.approx(0.05, abs=1 / N), 0.05, 1)
    new = memorization(fresh, training, held_out, quantile=0.2)
    assert 0.1 < new.share_nearer < 0.3 and 0.9 < new.median_ratio < 1.1
    half = memorization(np.concatenate([fresh[:150], training[:150]]), training, held_out, quantile=0.2)
    assert half.share_nearer == pytest.approx(0.5 + new.share_nearer / 2, abs=0.05)


def test_held_out_images_that_were_trained_on_are_refused(real):
    with pytest.raises(ValueError, match="held_out: half of these images are in the training set"):
        memorization(real[:50], real, real[:50])


@pytest.mark.parametrize("quantile", [0, 1, -0.1, 5, "0.1", float("nan")])
def test_wrong_quantiles_are_refused(quantile):
    with pytest.raises(ValueError, match="quantile="):
        memorization(GOOD, GOOD, GOOD + 1, quantile=quantile)


# --- for a file of results -----------------------------------------------------------------------------------------

FIGURES = [
    "kernel_distance",
    "kernel_distance_error",
    "frechet_distance",
    "precision",
    "recall",
    "density",
    "coverage",
]


def described(values, extractor="dinov2", size=224, weights="ab"):
    return Features(values, extractor, size, weights)


ENOUGH = [described(normal(2048, 4, seed)) for seed in range(3)]


def test_measure_names_the_features_and_gives_the_floor_beside_every_figure():
    generated, reference, others = ENOUGH[0], ENOUGH[1][:2047], ENOUGH[2]
    with pytest.warns(UserWarning, match="Fréchet distance from 2047 images"):
        found = measure(generated, reference, others)
    assert json.loads(json.dumps(found)) == found
    described_by = {"extractor": "dinov2", "size": 224, "weights": "ab", "num_generated": 2048, "num_reference": 2047}
    assert {key: found[key] for key in described_by} == described_by
    assert list(found) == [*described_by, *FIGURES, "floor"]
    for figures, set_of in ((found, generated), (found["floor"], others)):
        a, b = set_of.values, reference.values
        expected = [*kernel_distance_with_error(a, b), frechet_distance(a, b), *precision_recall(a, b)]
        assert [figures[key] for key in FIGURES] == [*expected, *density_coverage(a, b)]
    assert list(found["floor"]) == FIGURES


def test_only_the_frechet_distance_in_features_of_the_fid_network_is_an_fid():
    named = [described(x.values, "inception", 299) for x in ENOUGH]
    found = measure(*named)
    keys = ["fid" if key == "frechet_distance" else key for key in FIGURES]
    assert list(found["floor"]) == keys
    assert list(found)[5:] == [*keys, "floor"]
    assert found["fid"] == frechet_distance(named[0].values, named[1].values)


def messages(*sets):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        measure(*sets)
    assert all(warning.category is UserWarning and warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


def test_too_few_images_are_warned_of():
    assert messages(*ENOUGH) == []
    (only,) = messages(*(x[:1000] for x in ENOUGH))
    assert only.startswith("the Fréchet distance from 1000 images, with less than 2048")
    assert "rank" not in only
    few = messages(*(x[:999] for x in ENOUGH))
    assert [message.split(" from 999 images")[0] for message in few] == [
        "the Fréchet distance",
        "the kernel distance",
        "precision, recall, density and coverage",
    ]
    wide = [described(normal(40, 40, seed)) for seed in range(3)]
    assert "with 40 features and no more images, covariances have no full rank" in messages(*wide)[0]


def test_others_that_are_in_the_reference_are_warned_of():
    generated, reference, others = ENOUGH
    mixed = described(np.concatenate([others.values[:1900], reference.values[:148]]))
    assert messages(generated, reference, mixed) == [
        "148 of 2048 rows of others are in reference: the floor is too low."
    ]
    assert messages(generated, reference, described(np.concatenate([others.values[:-1], reference.values[:1]]))) == []


WRONG_SETS = {
    "another extractor": (
        described(normal(30, 4, 1), extractor="clip"),
        "features of extractor clip, generated of din",
    ),
    "another size": (described(normal(30, 4, 1), size=112), "features of size 112, generated of 224"),
    "other weights": (described(normal(30, 4, 1), weights="cd"), "features of weights cd, generated of ab"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG_SETS.values(), ids=WRONG_SETS)
def test_sets_of_different_features_are_refused(wrong, message):
    good = described(normal(30, 4, 0))
    for place in range(3):
        sets = [good, good, good]
        sets[place] = wrong
        with pytest.raises(ValueError, match=message if place else "both need the same"):
            measure(*sets)


@pytest.mark.full
def test_a_known_floor_is_not_computed_again(monkeypatch):
    first, calls = measure(*ENOUGH), []

    def count(a, b):
        calls.append(a)
        return frechet_distance(a, b)

    monkeypatch.setattr(metrics, "frechet_distance", count)
    assert measure(*ENOUGH, floor=first["floor"]) == first
    assert len(calls) == 1 and calls[0] is ENOUGH[0].values
    assert measure(*ENOUGH, floor={"kernel_distance": 2.0})["floor"] == {"kernel_distance": 2.0}
    assert measure(*ENOUGH) == first and len(calls) == 4


def test_a_floor_of_another_number_of_images_is_refused():
    with pytest.raises(ValueError, match="others has 29 rows, generated 30"):
        measure(ENOUGH[0][:30], ENOUGH[1][:30], ENOUGH[2][:29])


# --- wrong input ---------------------------------------------------------------------------------------------------

GOOD = normal(4, 3, 0)
WRONG_FEATURES = {
    "one axis": (GOOD[0], r"shape \(3,\)"),
    "three axes": (GOOD[None], r"shape \(1, 4, 3\)"),
    "one row": (GOOD[:1], "at least 2 rows"),
    "no columns": (GOOD[:, :0], r"shape \(4, 0\)"),
    "other columns": (GOOD[:, :2], "columns"),
    "NaN": (np.where(GOOD[0, 0] == GOOD, np.nan, GOOD), "1 of 12 values"),
    "infinite": (np.full((2, 3), np.inf), "6 of 6 values"),
}
MEASURES = {
    "kernel": kernel_distance,
    "Fréchet": frechet_distance,
    "precision and recall": lambda a, b: precision_recall(a, b, k=1),
    "density and coverage": lambda a, b: density_coverage(a, b, k=1),
}


@pytest.mark.parametrize("function", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize(("wrong", "message"), WRONG_FEATURES.values(), ids=WRONG_FEATURES)
def test_wrong_features_are_refused(function, wrong, message):
    for pair in ((GOOD, wrong), (wrong, GOOD)):
        with pytest.raises(ValueError, match=message):
            function(*pair)


WRONG_CALLS = {
    "k of 0": (precision_recall, {"k": 0}, "k=0 must be a whole number"),
    "k of all rows": (precision_recall, {"k": 4}, "at least 5 rows"),
    "half a k": (density_coverage, {"k": 2.5}, "k=2.5 must be a whole number"),
    "too few rows for k": (density_coverage, {}, "at least 6 rows"),
    "one subset": (kernel_distance_with_error, {"num_subsets": 1}, "num_subsets=1"),
    "too many subsets": (kernel_distance_with_error, {"num_subsets": 3}, "at least 6 rows"),
    "seed": (kernel_distance_with_error, {"num_subsets": 2, "seed": -1}, "seed=-1"),
}


@pytest.mark.parametrize(("function", "options", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_numbers_are_refused(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(GOOD, GOOD, **options)


def test_no_rows_have_no_neighbors():
    for pair in ((GOOD[:0], GOOD), (GOOD, GOOD[:0]), (GOOD, GOOD[:, :1])):
        with pytest.raises(ValueError, match=r"at least 1 row|columns"):
            nearest_neighbors(*pair)
