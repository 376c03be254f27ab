"""The rows of a data set, undecoded: in memory, on the disk, or streamed a block at a time."""

import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import datasets
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from ..diffusion.checks import suggestion
from ..runtime.random_streams import Block
from .config import DataConfig, check_local, local_files
from .folders import (
    ARRAYS,
    READERS,
    archive_kind,
    files_of,
    has_configurations,
    holds_pictures,
    list_archive,
    open_folder,
    reading,
    splits_by_words,
)

READ_WHOLE_BYTES = 2**30  # a single parquet file up to this size
SURVEYED_ROWS = 20_000  # of larger sets, this many rows are looked at before the run
SURVEYED_STREAM_ROWS, LEAST_BLOCKS = 2000, 4  # of a streamed one, fewer rows, from at least so many blocks
FOOTERS_AT_ONCE = 16
MIB = 2**20
SAVED = ("state.json", "dataset_dict.json")  # in a folder that save_to_disk wrote: of one split, or of several
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")  # of a set, beside its files
PATH_COLUMNS = ("image", "file_name", "filename", "file", "path", "image_path", "filepath")
TEXTS = (datasets.Value("string"), datasets.Value("large_string"))


class Rows(Protocol):
    """Undecoded images by index, each as `{"image": {"bytes": ..., "path": ...}}`."""

    def __len__(self) -> int: ...  # noqa: D105

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...  # noqa: D105


@dataclass(frozen=True)
class Source:
    """An opened data set."""

    features: Mapping[str, Any]  # the columns
    images: Rows
    values: Callable[[str], list[Any]]  # of a column, whole
    surveyed: Sequence[int]  # rows spread over the set, to look at before the run
    blocks: tuple[Block, ...] | None = None  # of a streamed set
    about: str = ""  # of a folder of pictures: how many images of how many files

    @property
    def extent(self) -> str:
        """Extent of the set: the number of rows, or the blocks."""
        return str(self.blocks or len(self.images))


def open_source(config: DataConfig, split: str | None = None) -> Source:
    """A split of the data set; a single file is the split "train".

    Raises ValueError if it is empty, there is no such split, or it has no images; FileNotFoundError for a path that
    leads to nothing.
    """
    check_local("dataset_name", config.dataset_name)
    split, path = split or config.split, Path(config.source).expanduser()
    # The files of a folder of pictures are read one by one as it is.
    streamed = config.streaming and not (path.exists() and holds_pictures(path))
    with naming_arrays(config):
        source = open_stream(config, split or "train") if streamed else open_rows(config, split)
    return source


@contextmanager
def naming_arrays(config: DataConfig) -> Iterator[None]:
    """A ValueError in here also says that a folder was read as the table in it, if arrays lie beside that."""
    try:
        yield
    except ValueError as error:
        path = Path(config.dataset_name or "").expanduser()
        arrays = [] if config.dataset_name is None or not path.is_dir() or holds_pictures(path) else arrays_in(path)
        if not arrays:
            raise
        raise ValueError(
            f"{error}. The folder was read as a table, since it holds one; to train on its {len(arrays)} {ARRAYS} "
            f"files, such as {arrays[0].name}, pass it as --train_data_dir"
        ) from error


def arrays_in(folder: Path) -> list[Path]:
    """The arrays in a folder, at any depth."""
    return [file for file in files_of(folder) if file.suffix.lower() == ARRAYS]


# --- rows by index -------------------------------------------------------------------------------------------------


def open_rows(config: DataConfig, split: str | None) -> Source:
    """Rows in memory, or on the disk in a form of which any row can be read at once; errors as of `open_source`."""
    rows, about = load_rows(config, split)
    if len(rows) == 0:
        raise ValueError(f"{config.source} holds no images")

    def values(column: str) -> list[Any]:
        with reading_local(config):
            found: list[Any] = rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()
        return found

    return Source(
        rows.features,
        image_column(rows, config),
        values,
        evenly(SURVEYED_ROWS, len(rows)).tolist(),
        about=about,
    )


def load_rows(config: DataConfig, split: str | None) -> tuple[datasets.Dataset, str]:
    """A split with all its columns, and what was found where it is a folder; ValueError if there is none of this name.

    Which folders and files are what: pictures by `folders`, a set that `datasets` saved, tables, and what else
    `datasets` knows.
    """
    if config.train_data_dir is not None:
        return open_folder(Path(config.train_data_dir).expanduser(), split, config.cache_dir)
    files = local_files(config.source)
    path = files[0] if len(files) == 1 else None
    wanted = split or "train"
    if path and path.suffix == ".parquet" and path.is_file() and path.stat().st_size <= READ_WHOLE_BYTES:
        with reading(path):
            table = datasets.table.InMemoryTable(pyarrow.parquet.read_table(path))  # no copy in the cache
            rows = datasets.Dataset(table)
        return pick_split({"train": rows}, wanted, path), ""
    if path and any((path / name).is_file() for name in SAVED):
        with reading(path):
            saved = datasets.load_from_disk(str(path))
        return pick_split(saved if isinstance(saved, Mapping) else {"train": saved}, wanted, path), ""
    if path and holds_pictures(path):
        return open_folder(path, split, config.cache_dir)
    builder = table_builder(config)
    with reading_local(config):
        builder.download_and_prepare()
    named = re.split(r"[\[+]", wanted)[0]  # `datasets` takes parts and sums too: train[:1000], train+test
    if pick_split(builder.info.splits, named, config.source).num_examples == 0:
        raise ValueError(f"{config.source} holds no images")
    return builder.as_dataset(split=wanted), ""


def reading_local(config: DataConfig) -> AbstractContextManager[None]:
    """Errors in here name the set; those of a set on the Hub are the network's, and stay as they are."""
    return reading(config.source) if local_files(config.source) else nullcontext()


def pick_split(splits: Mapping[str, Any], split: str, name: object) -> Any:  # noqa: ANN401
    """The split of this name; ValueError if there is none."""
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(map(str, splits))}: choose with --split")
    return splits[split]


# --- streams -------------------------------------------------------------------------------------------------------


class StreamedRows:
    """Rows by index of a stream that is read a block at a time; the blocks last used are kept.

    Args:
        stream: undecoded images in the column `image`; its shards are the blocks.
        blocks: what the shards hold.
        kept_bytes: blocks that hold more than this together are not kept, but always the largest one is.
        local: whether the files are on the disk; errors of the Hub are the network's, and stay as they are.
    """

    def __init__(
        self, stream: datasets.IterableDataset, blocks: tuple[Block, ...], kept_bytes: int, local: bool = True
    ) -> None:
        self.stream, self.blocks, self.local = stream, blocks, local
        self.starts = [block.start for block in blocks]
        self.kept_bytes = max(kept_bytes, *(block.num_bytes for block in blocks))
        self.kept: OrderedDict[int, pyarrow.Table] = OrderedDict()

    def __len__(self) -> int:
        """Number of rows."""
        return self.blocks[-1].stop

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row: {"image": {"bytes": ..., "path": ...}}.

        Raises ValueError if the block is not as long as it was when the run started.
        """
        number = bisect_right(self.starts, index) - 1
        if number not in self.kept:
            self.kept[number] = self.read(number)
            while sum(self.blocks[kept].num_bytes for kept in self.kept) > self.kept_bytes:
                self.kept.popitem(last=False)
        self.kept.move_to_end(number)
        return {"image": self.kept[number]["image"][index - self.starts[number]].as_py()}

    def read(self, number: int) -> pyarrow.Table:
        """A block; ValueError if it cannot be read, or is not as long as it was when the run started."""
        block = self.blocks[number]
        name = f"rows {block.start} to {block.stop - 1} of the data set"
        with reading(name, "a block") if self.local else nullcontext():
            table = pyarrow.concat_tables(tables(self.stream.shard(self.stream.num_shards, number)))
        if len(table) != block.stop - block.start:
            raise ValueError(
                f"{name} are now {len(table)} rows: it was changed while the run went on. Start the same command again."
            )
        return table

    def evenly(self, count: int) -> list[int]:
        """At most `count` rows, spread evenly over some blocks, which are spread evenly over the set."""
        number = LEAST_BLOCKS
        while True:
            chosen = [self.blocks[block] for block in evenly(number, len(self.blocks))]
            rows = np.concatenate([np.arange(block.start, block.stop) for block in chosen])
            if len(rows) >= count or number >= len(self.blocks):
                found: list[int] = rows[evenly(count, len(rows))].tolist()
                return found
            number *= 2


def evenly(count: int, total: int) -> np.ndarray:
    """At most `count` of the numbers 0 .. total - 1, evenly spaced: sets are often in the order of their classes."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int)


def tables(stream: datasets.IterableDataset) -> list[pyarrow.Table]:
    """All rows of a stream."""
    return list(stream.with_format("arrow").iter(batch_size=10_000))


def open_stream(config: DataConfig, split: str) -> Source:
    """Rows that are read while the training goes on, without a copy in the cache.

    A block is a row group of Parquet, whose footers tell what there is; files of other forms are read through once.

    Raises ValueError as in `open_source`; or it is a folder that is read row by row anyway.
    """
    name, path = config.source, Path(config.source).expanduser()
    if any((path / saved).is_file() for saved in SAVED):
        raise ValueError(f"{name} was written by save_to_disk and is read row by row as it is: leave out --streaming")
    builder = table_builder(config)
    files = [str(file) for file in pick_split(builder.config.data_files or {}, split, name)]
    is_parquet = all(file.endswith(".parquet") for file in files)
    with reading_local(config):
        stream = builder.as_streaming_dataset(split).reshard()
    if stream.features is None:
        raise ValueError(f"{name} does not say what its columns hold: convert it to Parquet to stream it")
    images = image_column(stream, config)
    with reading_local(config):
        blocks = into_blocks(row_groups(files) if is_parquet else read_through(images))
    if not blocks or blocks[-1].stop == 0:
        raise ValueError(f"{name} holds no images")

    def values(column: str) -> list[Any]:
        one = table_builder(config, columns=[column]).as_streaming_dataset(split) if is_parquet else stream
        with reading_local(config):
            found: list[Any] = pyarrow.concat_tables(tables(one.select_columns([column])))[column].to_pylist()
        return found

    rows = StreamedRows(images, blocks, config.shuffle_window_mb * MIB, local=bool(local_files(config.source)))
    return Source(stream.features, rows, values, rows.evenly(SURVEYED_STREAM_ROWS), blocks)


def table_builder(config: DataConfig, **options: Any) -> datasets.DatasetBuilder:  # noqa: ANN401
    """The builder with which `datasets` reads the set; only its description is downloaded.

    Raises ValueError for files of a kind that nobody reads, or files that the splits leave out.
    """
    files = local_files(config.source)
    cached = {"cache_dir": config.cache_dir, **options}
    folder = files[0] if len(files) == 1 and files[0].is_dir() else None
    if not files or (folder and (has_configurations(folder) or config.dataset_config_name)):
        return datasets.load_dataset_builder(
            str(folder or config.source), config.dataset_config_name, revision=config.dataset_revision, **cached
        )
    suffix, tables = one_kind(config.source, files_of(folder) if folder else files)
    for table in tables:  # `datasets` takes a damaged tar for a short one
        if kind := archive_kind(table.name):
            list_archive(table, kind)
    splits = splits_by_words(folder, tables) if folder else {"train": [*map(str, tables)]}
    reader, how = READERS[suffix]
    return datasets.load_dataset_builder(reader, data_files=splits, **how, **cached)


def one_kind(name: str, files: Sequence[Path]) -> tuple[str, list[Path]]:
    """The files of the first suffix of READERS that there is, which it also gives; ValueError if there is none."""
    for suffix in READERS:
        if found := [file for file in files if file.name.lower().endswith(suffix) and file.name not in DESCRIPTIONS]:
            return suffix, found
    kinds = ", ".join(sorted({file.suffix or file.name for file in files}))
    raise ValueError(f"{name} is {kinds}, which nobody reads: images are in folders, .zip, {', '.join(READERS)}")


def row_groups(files: Sequence[str]) -> list[tuple[int, int]]:
    """Rows and bytes of each row group of these Parquet files, from their footers."""

    def footer(file: str) -> list[tuple[int, int]]:
        with fsspec.open(file, "rb") as opened:
            about = pyarrow.parquet.read_metadata(opened)
        groups = map(about.row_group, range(about.num_row_groups))
        return [(group.num_rows, group.total_byte_size) for group in groups]

    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        return [group for groups in pool.map(footer, files) for group in groups]


def read_through(stream: datasets.IterableDataset) -> list[tuple[int, int]]:
    """Rows and bytes of each shard of a stream, which takes reading it."""
    shards = map(partial(stream.shard, stream.num_shards), range(stream.num_shards))
    read = (tables(shard) for shard in tqdm(shards, "counting the images", stream.num_shards, unit="file"))
    return [(sum(map(len, parts)), sum(part.nbytes for part in parts)) for parts in read]


def into_blocks(sizes: Sequence[tuple[int, int]]) -> tuple[Block, ...]:
    """Blocks of these numbers of rows and bytes, one after another."""
    stops = np.cumsum([rows for rows, _ in sizes]).tolist()
    return tuple(Block(stop - rows, stop, size) for stop, (rows, size) in zip(stops, sizes, strict=True))


# --- columns -------------------------------------------------------------------------------------------------------


def image_column(rows: Any, config: DataConfig) -> Any:  # noqa: ANN401
    """The undecoded images alone, of a `Dataset` or an `IterableDataset`, in one column named `image`.

    Raises ValueError if the data set has no image column, or several and none is chosen.
    """
    wanted = config.image_column
    if wanted is not None and "," in wanted and wanted not in rows.features:
        return bands(rows, config, [name.strip() for name in wanted.split(",")])
    try:
        column = find_image_column(rows.features, wanted)
    except ValueError as error:
        raise ValueError(f"{config.source}: {error}") from error
    rows = rows.select_columns([column])
    if column != "image":
        rows = rows.rename_column(column, "image")
    if rows.features["image"] in TEXTS:
        with reading_local(config):
            # The type is given, since a stream does not know that of mapped columns.
            rows = rows.map(partial(beside, table_folder(config)), features=datasets.Features(image=TEXTS[0]))
    return rows.cast_column("image", datasets.Image(decode=False))


class Bands:
    """Images whose channels lie in several columns: row i has a list of undecoded images in the column `image`."""

    def __init__(self, columns: Sequence[datasets.Dataset]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.columns[0])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row: {"image": [{"bytes": ..., "path": ...}, ...]}."""
        return {"image": [column[index]["image"] for column in self.columns]}


def bands(rows: Any, config: DataConfig, names: Sequence[str]) -> Bands:  # noqa: ANN401
    """The undecoded images of several columns; ValueError if one is none, or the set is streamed."""
    if config.streaming:
        raise ValueError(f"image_column {config.image_column!r}: several columns are not streamed: drop --streaming")
    return Bands([image_column(rows, replace(config, image_column=name)) for name in names])


def find_image_column(features: Mapping[str, Any], wanted: str | None = None) -> str:
    """The column of images: of `datasets`' Image type, else encoded bytes with or without a path, else paths of files.

    Raises ValueError if there is none, or several of the same kind and none is wanted; or the wanted one is none.
    """
    columns = f"its columns: {', '.join(features)}"
    kinds = (
        [name for name, feature in features.items() if isinstance(feature, datasets.Image)],
        [name for name, feature in features.items() if holds_bytes(feature)],
        [name for name in PATH_COLUMNS if features.get(name) in TEXTS],
    )
    if wanted is not None:
        if wanted not in features:
            raise ValueError(f"the data set has no image_column {wanted!r}{suggestion(wanted, features)}; {columns}")
        if not (any(wanted in names for names in kinds) or features[wanted] in TEXTS):
            raise ValueError(f"image_column {wanted!r} must hold images or paths of them, got {features[wanted]}")
        return wanted
    found = next((names for names in kinds if names), [])
    if not found:
        raise ValueError(
            f"no column of the data set holds images; {columns}. Name one with --image_column; paths of images are "
            f"looked for in columns called {', '.join(PATH_COLUMNS)}"
        )
    if len(found) > 1:
        raise ValueError(f"the columns {', '.join(found)} all hold images: choose one with --image_column")
    return found[0]


def holds_bytes(feature: Any) -> bool:  # noqa: ANN401
    """Whether a column's type can be that of image files."""
    return feature == datasets.Value("binary") or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def table_folder(config: DataConfig) -> Path:
    """The folder from which paths in a local table are meant; ValueError for paths in a table from the Hub."""
    files = local_files(config.source)
    if not files:
        raise ValueError(f"{config.source} holds paths of images, not images: download it, and name its folder")
    return files[0].parent if files[0].is_file() else files[0]


def beside(folder: Path, row: Mapping[str, str | None]) -> dict[str, str | None]:
    """A row whose path, if it has one, is seen from a folder."""
    return {"image": None if row["image"] is None else str(folder / row["image"])}
