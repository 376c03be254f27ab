"""Which images: a data set, and how its images are cropped, flipped and labelled."""

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

from ..runtime.shipped import shipped

T = TypeVar("T")

EMBEDDED_DATA = shipped("training/data") / "fashion_mnist_train.parquet"

EMBEDDED_TEST_SET = EMBEDDED_DATA.with_name("fashion_mnist_test.parquet")


def knob(default: T, help: str) -> T:
    """A dataclass field with its explanation, which `--help` prints."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DataConfig:
    """A data set, and how its images are read; a field is also a flag of every command that reads images."""

    # Data
    dataset_name: str | None = knob(
        None, "Hub name, local parquet file, or folder that `datasets` reads; without it: the embedded Fashion-MNIST"
    )
    dataset_config_name: str | None = knob(None, "the data set's configuration, where it has several")
    dataset_revision: str | None = knob(None, "commit, tag or branch of a Hub data set; its newest if left out")
    train_data_dir: str | None = knob(None, "folder of images, in place of dataset_name")
    streaming: bool = knob(
        False, "read dataset_name while training, without a copy in the cache; for sets that do not fit elsewhere"
    )
    shuffle_window_mb: int = knob(
        128, "MiB of encoded images that streaming reads from places all over the set and shuffles, in every process"
    )
    cache_dir: str | None = knob(None, "where downloads are kept; the Hugging Face cache by default")
    resolution: int | None = knob(None, "image size in pixels; the images' own if left out (paper: 32)")
    center_crop: bool = knob(False, "crop images that are not square at the centre; at a random place otherwise")
    random_flip: bool = knob(False, "mirror half of the images (paper: true)")
    dataloader_num_workers: int = knob(0, "processes that decode images; 0: the training process does it")
    skip_bad_images: bool = knob(False, "pass over images that cannot be read, and report them; otherwise they end it")
    max_bad_images: int = knob(100, "more such images end the run")

    # Classes
    class_conditional: bool = knob(False, "train with the images' labels, to sample by class with guidance")
    label_column: str | None = knob(None, "the column of labels; found by itself if left out")
    label_dropout: float = knob(
        0.1,
        "share of the training images whose label is replaced by the null label, so that the network also learns the "
        "unconditional score",
    )

    @property
    def trains_on_embedded_data(self) -> bool:
        """Whether no other images are named."""
        return self.dataset_name is None and self.train_data_dir is None
