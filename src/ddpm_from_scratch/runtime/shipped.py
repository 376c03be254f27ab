"""Files outside the package's code: a wheel has them inside the package, a checkout at the top of the repository."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
CHECKOUT = PACKAGE.parents[1]
IN_WHEEL = PACKAGE / "shipped"  # pyproject.toml says what a wheel puts there


EMBEDDED_DATASET = "zalando-datasets/fashion_mnist"  # the Hub original of the embedded images


def shipped(name: str) -> Path:
    """The path of a file or folder, such as "model_card.md", which need not exist."""
    return IN_WHEEL / name if IN_WHEEL.is_dir() else CHECKOUT / name
