"""The classes of the training images."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow
import torch
from torch import Tensor

from ..diffusion.checks import suggestion

# Names under which to look for labels; those of a webdataset only where there are none of the others.
LABEL_COLUMNS = ("label", "labels", "class", "classes", "category", "target")
WEBDATASET_COLUMNS = ("cls",)


def holds_labels(feature: Any) -> bool:  # noqa: ANN401
    """Whether a column's type can be that of labels: named classes, strings or whole numbers."""
    if not isinstance(feature, datasets.Value):
        return isinstance(feature, datasets.ClassLabel)
    kinds = (pyarrow.types.is_integer, pyarrow.types.is_string, pyarrow.types.is_large_string)
    return any(is_of_kind(feature.pa_type) for is_of_kind in kinds)


def with_keys(features: Mapping[str, Any], above: tuple[str, ...] = ()) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Place and type of all columns and of the keys inside them, such as `json.class` of a webdataset's 1.json."""
    found = {".".join((*above, name)): ((*above, name), feature) for name, feature in features.items()}
    for name, feature in features.items():
        if isinstance(feature, dict) and "bytes" not in feature:  # an encoded image has no labels inside
            for key, inside in with_keys(feature, (*above, name)).items():
                found.setdefault(key, inside)
    return found


def find_label_column(features: Mapping[str, Any], wanted: str | None) -> str:
    """The wanted column of labels; else the `ClassLabel` column, or strings or whole numbers under a usual name.

    Raises ValueError if the wanted column cannot be it, or there is not exactly one.
    """
    everything = with_keys(features)
    columns = f"its columns: {', '.join(everything)}"
    if wanted is not None:
        if wanted not in everything:
            raise ValueError(f"the data set has no label_column {wanted!r}{suggestion(wanted, everything)}; {columns}")
        if not holds_labels(everything[wanted][1]):
            raise ValueError(
                f"label_column {wanted!r} must hold classes, strings or whole numbers, got {everything[wanted][1]}"
            )
        return wanted
    kinds = (
        [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)],
        [name for name in LABEL_COLUMNS if holds_labels(features.get(name))],
        [name for name in WEBDATASET_COLUMNS if holds_labels(features.get(name))],
    )
    found = next((names for names in kinds if names), [])
    if not found:
        raise ValueError(
            f"no column of the data set holds labels; {columns}. Name one with --label_column; "
            f"in a folder of images, make a subfolder for each class"
        )
    if len(found) > 1:
        raise ValueError(f"the columns {', '.join(found)} all hold labels: choose one with --label_column")
    return found[0]


@dataclass(frozen=True)
class Labels:
    """The class of every image, and the null label, which comes after the last class and stands for none."""

    column: str
    names: tuple[str, ...]
    of_images: Tensor  # int64 [N]

    @property
    def null(self) -> int:
        """The null label."""
        return len(self.names)

    @property
    def num_class_embeds(self) -> int:
        """Embeddings that the network needs: one for each class and one for the null label."""
        return len(self.names) + 1

    @property
    def id2label(self) -> dict[int, str]:
        """The names by class, as the pipeline takes them."""
        return dict(enumerate(self.names))

    def extended(self, fingerprint: str) -> str:
        """The fingerprint of the images together with their labels."""
        return hashlib.blake2b(self.of_images.numpy().tobytes(), key=fingerprint.encode(), digest_size=16).hexdigest()


def read_labels(feature: Any, column: str, values: list[Any]) -> Labels:  # noqa: ANN401
    """The labels in a column, counted from 0: as they are, or strings in sorted order.

    Raises ValueError if an image has no label, or one that is no class.
    """
    for row, value in enumerate(values):
        if value is None or (not isinstance(value, str) and value < 0):
            raise ValueError(f"row {row} of the data set has no label: {column} is {value}. Label it or leave it out")
    if isinstance(feature, datasets.ClassLabel):
        names = feature.names
    elif isinstance(values[0], str):
        names = sorted(set(values))
        classes = {name: label for label, name in enumerate(names)}
        values = [classes[value] for value in values]
    else:  # numbers above that of the images count something else
        names = [str(label) for label in range(min(max(values) + 1, len(values)))]
    largest = max(values)
    if largest >= len(names):
        raise ValueError(
            f"row {values.index(largest)} of the data set has the label {largest} in column {column!r}, which is too "
            f"large: classes are counted from 0, and there are at most {len(names)}"
        )
    return Labels(column, tuple(names), torch.tensor(values))


def labels_of(features: Mapping[str, Any], wanted: str | None, values: Callable[[str], list[Any]]) -> Labels:
    """The labels of a data set.

    Args:
        features: its columns.
        wanted: the column of labels, or a key inside one; None to look for one.
        values: gives a column, whole.

    Raises:
        ValueError: see `find_label_column` and `read_labels`.
    """
    name = find_label_column(features, wanted)
    (column, *keys), feature = with_keys(features)[name]
    found = values(column)
    for key in keys:
        found = [row and row.get(key) for row in found]
    return read_labels(feature, name, found)
