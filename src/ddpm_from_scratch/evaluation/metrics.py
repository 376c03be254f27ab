"""Distances between generated and real images, computed from their features, and the floors of these distances.

References, cited below by name:

- MMD: Gretton et al. 2012, "A Kernel Two-Sample Test", https://jmlr.org/papers/v13/gretton12a.html
- kernel distance: Bińkowski et al. 2018, "Demystifying MMD GANs", https://arxiv.org/abs/1801.01401
- Fréchet distance: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", https://arxiv.org/abs/1706.08500
- precision and recall: Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative
  Models", https://arxiv.org/abs/1904.06991
- density and coverage: Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models",
  https://arxiv.org/abs/2002.09797

| measure | identical sets | equal distributions | what moves it |
|---|---|---|---|
| kernel distance | <= 0 | 0, unbiased | everything |
| Fréchet distance | 0 | falls to 0 as N grows | everything, by means and covariances only |
| precision | 1 | below 1, falls with D | images that are not like real ones |
| recall | 1 | below 1, falls with D | real images that the generated ones are not like |
| density | 1 | 1, unbiased | as precision; it may exceed 1 |
| coverage | 1 | 1 - 2^-k for N = M | as recall, and outliers do not raise it |

Their values depend on the features (see `features`) and on the numbers of images, so they are compared at one number,
in one network's features, and read beside the floor: what real images measure against other real images.

Every function takes arrays [N, D] and computes in float64; `measure` takes `Features`, and returns all but the
distances to training images as a dictionary for a file of results.
"""

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ..diffusion.checks import check_whole, is_number
from .features import Features

SUBSETS = 10  # over which the standard error of the kernel distance is estimated

# Images of each set below which `measure` warns.
LEAST_FOR_FRECHET = 2048  # the dimension of the FID network's features; below D + 1, covariances have no full rank
LEAST_FOR_KERNEL = 1000  # the size of one subset in Bińkowski et al. 2018
LEAST_FOR_NEIGHBORS = 1000

ENTRIES = 2**24  # of a matrix of distances that is held at once: 128 MiB
# Squared distances are ‖x‖² + ‖y‖² - 2 x·y, whose rounding is some 1e-15 of the squared norms. Those that differ by
# less than this share of the largest squared norm count as equal, so that ties do not hang on it.
ROUNDING = 1e-12
WIDE = 2048  # columns, the most of a single network; of images of many channels there are some for each


# --- distances of distributions ------------------------------------------------------------------------------------


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The squared maximum mean discrepancy (MMD²) of two sets of features under the kernel (x·y / D + 1)³.

    The kernel is that of Bińkowski et al. 2018, section 4; the estimate, that of Gretton et al. 2012, eq. 3. It is
    unbiased: its expectation does not depend on the numbers of rows, and is 0 for equal distributions, so that it may
    be negative. Of a set and itself it is at most 0: pairs of equal rows count between the sets, not within.

    Args:
        a: [N, D] with N >= 2.
        b: [M, D] with M >= 2.

    Raises:
        ValueError: for other shapes, or values that are not finite.
    """
    a, b = _checked(a, b)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_of_pairs(x: np.ndarray) -> float:
        """The mean of k(x_i, x_j) over i ≠ j; k(x_i, x_i) would bias the estimate."""
        k = kernel(x, x)
        return float((k.sum() - np.trace(k)) / (len(x) * (len(x) - 1)))

    return mean_of_pairs(a) + mean_of_pairs(b) - 2 * float(kernel(a, b).mean())


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float


def kernel_distance_with_error(
    a: np.ndarray, b: np.ndarray, *, num_subsets: int = SUBSETS, seed: int | None = 0
) -> Estimate:
    """The kernel distance of the whole sets, with a standard error from disjoint subsets of both.

    Disjoint subsets give independent, unbiased estimates, and the standard error is that of their mean, their standard
    deviation / √num_subsets. The whole sets do at least as well, and much better where the distributions are all but
    equal, so that it is on the safe side. The usual KID (Bińkowski et al. 2018) is the mean over 100 subsets of 1000
    images that overlap, and what is printed beside it the standard deviation of these: that of one subset's estimate,
    which does not shrink as the sets grow.

    Args:
        a: [N, D] with N >= 2 num_subsets.
        b: [M, D] with M >= 2 num_subsets.
        num_subsets: at least 2.
        seed: of the order in which rows are dealt to subsets; None leaves them as they are, for sets without order.

    Raises:
        ValueError: for other shapes or numbers, or values that are not finite.
    """
    check_whole("num_subsets", num_subsets, 2)
    a, b = _checked(a, b, least=2 * num_subsets)
    value = kernel_distance(a, b)
    if seed is not None:
        check_whole("seed", seed, 0)
        generator = np.random.default_rng(seed)
        a, b = generator.permutation(a), generator.permutation(b)
    pairs = zip(np.array_split(a, num_subsets), np.array_split(b, num_subsets), strict=True)
    parts = [kernel_distance(x, y) for x, y in pairs]
    return Estimate(value, float(np.std(parts, ddof=1) / num_subsets**0.5))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Fréchet distance |μ_a - μ_b|² + tr(C_a + C_b - 2 (C_a C_b)^½) of two sets of features.

    Heusel et al. 2017, eq. 6, where μ is a set's mean and C its covariance. The estimate is biased: it falls as the
    sets grow, so compare sets of one size. The trace of the root is that of (C_a^½ C_b C_a^½)^½, a symmetric matrix:
    its eigenvalues are real, and those that rounding makes negative are set to 0.

    Args:
        a: [N, D] with N >= 2.
        b: [M, D] with M >= 2.

    Raises:
        ValueError: for other shapes, or values that are not finite.
    """
    a, b = _checked(a, b)
    if a.shape[1] > WIDE and min(len(a), len(b)) < a.shape[1]:
        return _frechet_by_rows(a, b)
    covariance_a, covariance_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    eigenvalues, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(eigenvalues.clip(min=0))) @ vectors.T
    trace_of_root = np.sqrt(np.linalg.eigvalsh(root @ covariance_b @ root).clip(min=0)).sum()
    distance = np.sum((a.mean(0) - b.mean(0)) ** 2)
    return float(distance + np.trace(covariance_a) + np.trace(covariance_b) - 2 * trace_of_root)


def _frechet_by_rows(a: np.ndarray, b: np.ndarray) -> float:
    """The Fréchet distance without matrices [D, D], for more columns than rows.

    With centred rows A [N, D] and B [M, D], the eigenvalues of C_a C_b are the squared singular values of
    A Bᵀ / √((N - 1) (M - 1)), so that the trace of its root is their sum.
    """
    mean_a, mean_b = a.mean(0), b.mean(0)
    rows_a, rows_b = (a - mean_a) / np.sqrt(len(a) - 1), (b - mean_b) / np.sqrt(len(b) - 1)
    trace_of_root = np.linalg.svd(rows_a @ rows_b.T, compute_uv=False).sum()
    traces = np.square(rows_a).sum() + np.square(rows_b).sum()
    return float(np.sum((mean_a - mean_b) ** 2) + traces - 2 * trace_of_root)


# --- fidelity and diversity apart ----------------------------------------------------------------------------------


class PrecisionRecall(NamedTuple):
    """The shares of generated images that look real, and of real images that the generated ones cover: 0..1."""

    precision: float
    recall: float


def precision_recall(generated: np.ndarray, reference: np.ndarray, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall, Kynkäänniemi et al. 2019, eqs. 1 and 2.

    A set's manifold is taken to be the union of balls around its rows, each reaching to the k-th nearest other row and
    including its surface. Precision is the share of generated rows in the manifold of the reference; recall, the share
    of the reference's rows in that of the generated.

    Both are biased, by an amount that depends on N, M, k and the distribution; for equal distributions they are alike
    but not 1. Outliers raise them: one lonely row has a large ball.

    Args:
        generated: [N, D] with N > k.
        reference: [M, D] with M > k.
        k: 3 in the paper.

    Raises:
        ValueError: for other shapes or k, or values that are not finite.
    """
    check_whole("k", k)
    generated, reference = _centred(*_checked(generated, reference, least=k + 1))
    tolerance = _tolerance(generated, reference)
    reach_of_generated = _squared_radii(generated, k) + tolerance
    reach_of_real = _squared_radii(reference, k) + tolerance
    precise, recalled = np.zeros(len(generated), bool), np.zeros(len(reference), bool)
    for rows, squared in _squared_distances(generated, reference):
        precise[rows] = (squared <= reach_of_real).any(axis=1)
        recalled |= (squared <= reach_of_generated[rows, None]).any(axis=0)
    return PrecisionRecall(float(precise.mean()), float(recalled.mean()))


class DensityCoverage(NamedTuple):
    """In how many real neighbourhoods a generated image lies on average, over k; the share of them that hold one."""

    density: float
    coverage: float


def density_coverage(generated: np.ndarray, reference: np.ndarray, *, k: int = 5) -> DensityCoverage:
    """Density and coverage of Naeem et al. 2020, eqs. 3 and 4.

    The neighbourhood of a real row is the ball that reaches to its k-th nearest other real row. Density is the mean
    number of neighbourhoods that a generated row lies in, divided by k; coverage, the share of neighbourhoods with a
    generated row. Balls are without their surface, as in the authors' code, which makes the density of a set
    and itself 1, where k other rows do not coincide with a row.

    For equal distributions the expectation of density is 1, and that of coverage 1 - Π_{j=1..k} (M - j) / (N + M - j),
    whatever the distribution (section 3.2): 0.97 for k = 5 and N = M.

    Args:
        generated: [N, D] with N > k.
        reference: [M, D] with M > k.
        k: 5 in the paper.

    Raises:
        ValueError: for other shapes or k, or values that are not finite.
    """
    check_whole("k", k)
    generated, reference = _centred(*_checked(generated, reference, least=k + 1))
    reach = _squared_radii(reference, k) - _tolerance(generated, reference)
    inside, covered = 0, np.zeros(len(reference), bool)
    for _, squared in _squared_distances(generated, reference):
        contained = squared < reach  # [C, M]
        inside += int(contained.sum())
        covered |= contained.any(axis=0)
    return DensityCoverage(inside / (k * len(generated)), float(covered.mean()))


# --- copies of training images -------------------------------------------------------------------------------------


class Neighbors(NamedTuple):
    """Euclidean distance of each row to the nearest of other rows, float64 [N], and its number, int64 [N]."""

    distance: np.ndarray
    row: np.ndarray


def nearest_neighbors(features: np.ndarray, training_features: np.ndarray) -> Neighbors:
    """Find the nearest training image of each image; of equally near ones, one. The distance of a copy is 0.

    Args:
        features: [N, D] with N >= 1: features, or pixels (images.reshape(N, -1)).
        training_features: [M, D] with M >= 1.

    Raises:
        ValueError: for other shapes, or values that are not finite.
    """
    features, training_features = _centred(*_checked(features, training_features, least=1))
    nearest = np.empty(len(features), np.int64)
    for rows, squared in _squared_distances(features, training_features):
        nearest[rows] = squared.argmin(axis=1)
    # From the difference itself, which does not round to anything but 0 for copies.
    distance = np.sqrt(np.square(features - training_features[nearest]).sum(axis=1))
    return Neighbors(distance, nearest)


class Memorization(NamedTuple):
    """How near generated images are to the training set, compared with held-out real images.

    Attributes:
        share_nearer: share of generated images that are nearer to the training set than all but the nearest held-out
            images, a share `quantile` of these: 0..1.
        quantile: what share_nearer would be if generated images were as near as held-out ones.
        median_ratio: median distance of generated images to the training set, over that of held-out images.
    """

    share_nearer: float
    quantile: float
    median_ratio: float


def memorization(
    generated: np.ndarray, training: np.ndarray, held_out: np.ndarray, *, quantile: float = 0.05
) -> Memorization:
    """Whether generated images are nearer to the training images than held-out real images are.

    Held-out images set the scale, since in every set some images are alike. If generated images are as new as these,
    share_nearer is `quantile` and the ratio 1, up to the noise of sampling; of held-out images themselves they are so,
    of training images they are 1 and 0. Values between mean copies, or images that are plainer than real ones: blurred
    ones are near to everything, above all in pixels, so look at the nearest pairs (`nearest_neighbors`).

    Args:
        generated: [N, D] with N >= 1, features or pixels.
        training: [M, D], all the training images: of a part of them, copies of the rest are not found.
        held_out: [K, D], real images of the same origin that were not trained on; 1 / K well below the quantile.
        quantile: of the distances of held-out images, above 0 and below 1.

    Raises:
        ValueError: for other shapes or another quantile, values that are not finite, or if half of the held-out images
            are in the training set.
    """
    if not (is_number(quantile) and 0 < quantile < 1):
        raise ValueError(f"quantile={quantile!r} must be a number above 0 and below 1.")
    near, usual = (nearest_neighbors(x, training).distance for x in (generated, held_out))
    if np.median(usual) == 0:
        raise ValueError("held_out: half of these images are in the training set, so they are not held out.")
    share = float((near < np.quantile(usual, quantile)).mean())
    return Memorization(share, float(quantile), float(np.median(near) / np.median(usual)))


# --- all of them, for a file of results ----------------------------------------------------------------------------


def measure(
    generated: Features, reference: Features, others: Features, *, floor: dict[str, float] | None = None
) -> dict[str, Any]:
    """Measure generated images against real ones, and as many other real images likewise: the floor.

    Args:
        generated: of N >= 20 images.
        reference: of M >= 20 real images.
        others: of N real images that are not in the reference. They take the place of the generated ones for the floor.
        floor: the floor that an earlier call with the same reference and others returned, to save time.

    Returns:
        A dictionary of numbers and strings: `extractor`, `size` and `weights` of the features; `num_generated` (N) and
        `num_reference` (M); `kernel_distance`, `kernel_distance_error`, `frechet_distance`, `precision`, `recall`,
        `density` and `coverage`; and `floor`, a dictionary of these seven. The Fréchet distance is called `fid`, here
        and in the floor, if it is one: in the features of `inception`.

    Raises:
        ValueError: the features are of different networks, sizes or weights, `others` has not N rows, a set has less
            than 20, or values are not finite.

    Warns:
        UserWarning: for each measure for which there are too few images, and if others are in the reference.
    """
    for name, features in {"reference": reference, "others": others}.items():
        for key in ("extractor", "size", "weights"):
            one, two = getattr(generated, key), getattr(features, key)
            if one != two:
                raise ValueError(f"{name} has features of {key} {two}, generated of {one}: both need the same.")
    if len(others) != len(generated):
        raise ValueError(
            f"others has {len(others)} rows, generated {len(generated)}: the floor needs as many, since the measures "
            "depend on their number."
        )
    _warn_of_few(min(len(generated), len(reference)), generated.values.shape[1])
    _warn_of_shared(others.values, reference.values)
    frechet = "fid" if generated.extractor == "inception" else "frechet_distance"
    return {
        "extractor": generated.extractor,
        "size": generated.size,
        "weights": generated.weights,
        "num_generated": len(generated),
        "num_reference": len(reference),
        **_figures(generated.values, reference.values, frechet),
        "floor": floor or _figures(others.values, reference.values, frechet),
    }


def _figures(a: np.ndarray, b: np.ndarray, frechet: str) -> dict[str, float]:
    kernel = kernel_distance_with_error(a, b)
    return {
        "kernel_distance": kernel.value,
        "kernel_distance_error": kernel.error,
        frechet: frechet_distance(a, b),
        **precision_recall(a, b)._asdict(),
        **density_coverage(a, b)._asdict(),
    }


def _warn_of_few(count: int, columns: int) -> None:
    """Warn of each measure for which the smaller set has too few images."""
    rank = f"; with {columns} features and no more images, covariances have no full rank" if count <= columns else ""
    limits = {
        "the Fréchet distance": (max(LEAST_FOR_FRECHET, columns + 1), f"it is mostly bias{rank}"),
        "the kernel distance": (LEAST_FOR_KERNEL, "its standard error is large, and rough itself"),
        "precision, recall, density and coverage": (LEAST_FOR_NEIGHBORS, "balls around so few images are wide"),
    }
    for name, (least, reason) in limits.items():
        if count < least:
            warnings.warn(f"{name} from {count} images, with less than {least}: {reason}.", stacklevel=3)


def _warn_of_shared(others: np.ndarray, reference: np.ndarray) -> None:
    """Warn if more than 1 % of the rows are in both sets; fewer duplicates are common in data sets."""
    known = {row.tobytes() for row in reference}
    shared = sum(row.tobytes() in known for row in others)
    if shared > len(others) / 100:
        warnings.warn(f"{shared} of {len(others)} rows of others are in reference: the floor is too low.", stacklevel=3)


# --- parts of the above --------------------------------------------------------------------------------------------


def _checked(a: np.ndarray, b: np.ndarray, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Convert both to float64 and check that they have at least `least` rows."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    for x in (a, b):
        if x.ndim != 2 or x.shape[0] < least or x.shape[1] < 1:
            rows = "row" if least == 1 else "rows"
            raise ValueError(f"features have shape {x.shape}; they must be [N, D] with at least {least} {rows}.")
        if not np.isfinite(x).all():
            raise ValueError(f"{int((~np.isfinite(x)).sum())} of {x.size} values of the features are not finite.")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features have {a.shape[1]} and {b.shape[1]} columns; both need the same.")
    return a, b


def _centred(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Subtract the mean of b from both: distances stay, and norms, whose rounding matters, become small."""
    mean = b.mean(axis=0)
    return a - mean, b - mean


def _squared_distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield slices of the rows of a, each with the squared distances [C, M] of its rows to all rows of b."""
    norms = np.square(b).sum(axis=1)
    count = max(1, ENTRIES // len(b))
    for first in range(0, len(a), count):
        rows = slice(first, first + count)
        squared = a[rows] @ b.T
        squared *= -2
        squared += np.square(a[rows]).sum(axis=1)[:, None]
        squared += norms
        yield rows, np.maximum(squared, 0, out=squared)  # rounding makes those of copies negative


def _squared_radii(x: np.ndarray, k: int) -> np.ndarray:
    """The squared distance of each row to its k-th nearest other row: [N]."""
    radii = np.empty(len(x))
    for rows, squared in _squared_distances(x, x):
        np.fill_diagonal(squared[:, rows], np.inf)  # a row is not its own neighbour
        radii[rows] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return radii


def _tolerance(a: np.ndarray, b: np.ndarray) -> float:
    """The difference up to which squared distances count as equal."""
    return ROUNDING * max(float(np.square(x).sum(axis=1).max()) for x in (a, b))
