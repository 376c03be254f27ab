"""Which images: a data set, and how its images are read, cropped, flipped and labelled."""

import glob
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageColor

from ..diffusion.checks import is_number
from ..runtime.privacy import looks_local
from ..runtime.shipped import EMBEDDED_DATASET, shipped
from .fields import FRACTION, Allowed, at_least, check_fields, knob
from .sizes import Size, as_size, is_size

EMBEDDED_DATA = shipped("training/data") / "fashion_mnist_train.parquet"
EMBEDDED_TEST_SET = EMBEDDED_DATA.with_name("fashion_mnist_test.parquet")

BACKGROUND = "white"  # behind transparent pixels
SIZES = Allowed("at least 1 pixel: a side such as 64, or height x width such as 64x128", is_size)


@dataclass(frozen=True)
class DataConfig:
    """A data set, and how its images are read; a field is also a flag of every command that reads images."""

    # Data
    dataset_name: str | None = knob(
        None,
        "Hub name, or local folder, archive, table (Parquet, CSV, JSON ...) or glob of them; without it: the embedded "
        "Fashion-MNIST",
    )
    dataset_config_name: str | None = knob(None, "the data set's configuration, where it has several")
    dataset_revision: str | None = knob(None, "commit, tag or branch of a Hub data set; its newest if left out")
    train_data_dir: str | None = knob(None, "folder of images, in place of dataset_name")
    split: str | None = knob(None, "of the data set; train, or the only one of a folder, if left out")
    image_column: str | None = knob(
        None,
        "the column of images; found by itself if left out and there is one; several, such as red,nir, are channels of "
        "one image",
    )
    streaming: bool = knob(
        False, "read dataset_name while training, without a copy in the cache; for sets that do not fit elsewhere"
    )
    shuffle_window_mb: int = knob(
        128,
        "MiB of encoded images that streaming reads from places all over the set and shuffles, in every process",
        at_least(1),
    )
    cache_dir: str | None = knob(None, "where downloads are kept; the Hugging Face cache by default")
    resolution: int | str | None = knob(
        None,
        "image size in pixels, 64 or, as height x width, 64x128; the images' own if left out (paper: 32)",
        SIZES,
    )
    value_range: list[float] | None = knob(
        None,
        "the values that become -1 and 1; their type's own range if left out, 0 and 1 for floats",
        Allowed("two finite numbers, the lower one first", lambda pair: is_range(pair)),
    )
    background: str = knob(BACKGROUND, "colour that transparent pixels show: a name, or #rrggbb")
    center_crop: bool = knob(False, "crop images of another shape at the centre; at a random place otherwise")
    random_flip: bool = knob(False, "mirror half of the images (paper: true)")
    dataloader_num_workers: int = knob(0, "processes that decode images; 0: the training process does it", at_least(0))
    skip_bad_images: bool = knob(False, "pass over images that cannot be read, and report them; otherwise they end it")
    max_bad_images: int = knob(100, "more such images end the run", at_least(0))

    # Classes
    class_conditional: bool = knob(False, "train with the images' labels, to sample by class with guidance")
    label_column: str | None = knob(None, "the column of labels; found by itself if left out")
    label_dropout: float = knob(
        0.1,
        "share of the training images whose label is replaced by the null label, so that the network also learns the "
        "unconditional score",
        FRACTION,
    )

    @property
    def trains_on_embedded_data(self) -> bool:
        """Whether no other images are named."""
        return self.dataset_name is None and self.train_data_dir is None

    @property
    def size(self) -> Size | None:
        """The resolution as (height, width); None for the images' own."""
        return None if self.resolution is None else as_size(self.resolution)

    @property
    def source(self) -> str:
        """Hub name, file or folder of the images."""
        return self.dataset_name or self.train_data_dir or embedded_set()[0]

    def held_out(self, test_set: str | None) -> tuple[str, str | None] | None:
        """Name and split of held-out images: those named, or the embedded ones' own; None where nobody named any."""
        if test_set is not None:
            return test_set, None
        return embedded_set("test") if self.trains_on_embedded_data else None

    def of_another_set(self, name: str) -> "DataConfig":
        """Another set, such as one of held-out images, read as this one is."""
        same = {field: getattr(self, field) for field in ("image_column", "background", "value_range")}
        return DataConfig(dataset_name=name, **same)

    def validate(self) -> None:
        """Check what concerns the data; nothing is downloaded.

        Raises ValueError if a value is impossible by itself or together with another; FileNotFoundError if a local file
        or folder is missing.
        """
        check_fields(self)
        check_data(self)


def is_range(values: object) -> bool:
    """Whether values are two finite numbers, the lower one first."""
    if not isinstance(values, Sequence) or len(values) != 2 or not all(map(is_number, values)):
        return False
    return bool(-math.inf < values[0] < values[1] < math.inf)


def embedded_set(split: str = "train") -> tuple[str, str]:
    """Name and split of the embedded images, train or test; of their Hub original where a package came without them."""
    path = {"train": EMBEDDED_DATA, "test": EMBEDDED_TEST_SET}[split]
    return (str(path), "train") if path.is_file() else (EMBEDDED_DATASET, split)


def check_data(config: DataConfig) -> None:
    """Local data are there, and what is said of them fits together; see `DataConfig.validate`."""
    name, folder = config.dataset_name, config.train_data_dir
    if name is not None and folder is not None:
        raise ValueError("dataset_name and train_data_dir both name the training data: give one")
    if config.dataset_config_name is not None and name is None:
        raise ValueError("dataset_config_name needs dataset_name")
    check_revision("dataset", config.dataset_revision, name)
    if config.streaming and folder is not None:
        raise ValueError("streaming is of a dataset_name; the files of a train_data_dir are read one by one as it is")
    try:
        ImageColor.getrgb(config.background)
    except ValueError as error:
        raise ValueError(
            f"background must be a colour such as white, black or #ff8800, got {config.background!r}"
        ) from error
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"train_data_dir: no folder {folder}")
    check_local("dataset_name", name)
    if config.label_column is not None and not config.class_conditional:
        raise ValueError(f"label_column {config.label_column!r} needs --class_conditional")
    if config.class_conditional and config.label_dropout == 0:
        raise ValueError("label_dropout 0 would leave the null label untrained, which guidance needs: take 0.1 or so")


def check_local(field: str, name: str | None) -> None:
    """Raise FileNotFoundError for a name that can only be a path, and leads to nothing."""
    if name is not None and looks_local(name) and not local_files(name):
        raise FileNotFoundError(f"{field}: no file or folder {name}")


def local_files(name: str) -> list[Path]:
    """The files or folders of this name on the disk; of a pattern with `*`, all that match, sorted."""
    path = Path(name).expanduser()
    return [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))


def check_revision(kind: str, revision: str | None, name: str | None) -> None:
    """Raise ValueError for the revision of a data set or model that is not on the Hub."""
    if revision is not None and (name is None or looks_local(name) or Path(name).exists()):
        raise ValueError(f"{kind}_revision is of a {kind} on the Hub, got {name}: leave it out")
