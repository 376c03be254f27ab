"""What is made of the times that `speed.py` measures; also by `docs/make_speed.py`, without importing torch."""

import statistics
from typing import Any

Row = dict[str, Any]  # of a system: "seconds" by rounds, and more


def median(row: Row) -> float:
    """Seconds of a round."""
    return statistics.median(row["seconds"])


def round_ratios(of: Row, to: Row) -> list[float]:
    """How many times as fast `of` is, in each round."""
    return [b / a for a, b in zip(of["seconds"], to["seconds"], strict=True)]


def ratio(of: Row, to: Row) -> float:
    """How many times as fast `of` is: the median over the rounds."""
    return statistics.median(round_ratios(of, to))


def faster_format(rows: dict[str, Row], precision: str) -> str:
    """The name of the faster of diffusers' two memory formats."""
    return min(
        (name for name in rows if name.startswith(f"diffusers {precision}")), key=lambda name: median(rows[name])
    )


def images_per_second(network: dict[str, Any], row: Row) -> float:
    """Of training."""
    return float(network["batch"] / median(row))


def peak_share(network: dict[str, Any], row: Row, peak: float) -> float:
    """Of the operations that a matrix product does in the time; a backward pass takes twice those of a forward pass."""
    return 3 * images_per_second(network, row) * float(network["flops"]) / peak
