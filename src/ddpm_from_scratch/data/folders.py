"""Folders of pictures: all images in them and in their archives, by split.

`datasets` guesses splits from words in paths, so that `photo_train.png` is a split of its own, and `photo_1.png` is in
none. Here a folder is all its images, unless all of them lie under folders that are called as splits are.
"""

import logging
import os
import re
import tarfile
import zipfile
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import datasets
import fsspec
from PIL import Image

# The folders that are splits, by the names under which people have them; and the words in names of tables.
SPLIT_FOLDERS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}
SPLIT_WORDS = {**SPLIT_FOLDERS, "training": "train", "dev": "validation", "testing": "test", "eval": "test"}
ARCHIVES = {".zip": "zip", ".tar": "tar", ".tar.gz": "tar", ".tgz": "tar", ".tar.bz2": "tar", ".tar.xz": "tar"}
SYSTEM_FOLDERS = ("lost+found",)  # hidden too, though no dot begins its name: only root may read it
ARRAYS = ".npy"
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # columns of a folder, as `datasets` reads them
TABLES = {".parquet", ".arrow"}  # never notes beside pictures, as other tables may be
READERS: dict[str, tuple[str, dict[str, str]]] = {  # what reads files of a suffix, and how; the first that is there
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".tar": ("webdataset", {}),
    ".tar.gz": ("webdataset", {}),
    ".tgz": ("webdataset", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
}


logger = logging.getLogger(__name__)


def image_suffixes() -> set[str]:
    """The suffixes of the files that PIL opens."""
    # PIL opens MPO, which is several JPEG files in one, as JPEG.
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in {*Image.OPEN, "MPO"}}


@dataclass(frozen=True)
class Folder:
    """The files of a folder of pictures, without hidden ones."""

    path: Path
    images: tuple[str, ...]  # paths, sorted; inside an archive `zip://cat/1.png::/pictures/images.zip`
    metadata: tuple[str, ...]
    others: Mapping[str, int]  # how many of each suffix are no images

    def parts(self, image: str) -> tuple[str, ...]:
        """The folders of an image and its name, seen from this folder; an archive counts as a folder."""
        inner, _, archive = image.partition("::")
        if not archive:
            return Path(image).relative_to(self.path).parts
        *outer, name = Path(archive).relative_to(self.path).parts or ("",)
        stem = [name.removesuffix(suffix) for suffix in ARCHIVES if name.lower().endswith(suffix)][:1]
        return (*outer, *stem, *Path(inner.partition("://")[2]).parts)

    @cached_property
    def splits(self) -> dict[str, list[str]]:
        """The images by split; all of them as "train" unless each lies in a folder that is called as a split is."""
        splits: dict[str, list[str]] = {}
        for image in self.images:
            top = SPLIT_FOLDERS.get(self.parts(image)[0].lower()) if len(self.parts(image)) > 1 else None
            if top is None:
                return {"train": list(self.images)}
            splits.setdefault(top, []).append(image)
        return splits

    @property
    def not_images(self) -> str:
        """The other files in words."""
        return ", ".join(f"{count} {suffix}" for suffix, count in sorted(self.others.items()))

    def describe(self, used: int, split: str) -> str:
        """How many images of how many files are used, and why not the others."""
        remarks = [f"{len(images)} in split {name}" for name, images in self.splits.items() if name != split]
        if used < len(self.splits[split]):
            remarks.append(f"{len(self.splits[split]) - used} that no metadata name")
        if self.others:
            remarks.append(f"no images: {self.not_images}")
        total = len(self.images) + len(self.metadata) + sum(self.others.values())
        return f"{used} images of {total} files in {self.path}" + (f" ({'; '.join(remarks)})" if remarks else "")


def files_of(path: Path) -> list[Path]:
    """The files in a folder, at any depth, but for hidden ones; of a file, itself."""
    return [path] if path.is_file() else sorted(walk(path))


def walk(folder: Path) -> Iterator[Path]:
    """All files in a folder and in the folders that links in it lead to, but for hidden ones; each folder once.

    Raises OSError, which names it, for a folder that cannot be read.
    """
    waiting = deque([folder])
    known: set[Path] = set()
    while waiting:
        here = waiting.popleft()
        if (real := here.resolve()) in known:  # a link led to it
            continue
        known.add(real)
        for entry in sorted(os.scandir(here), key=lambda entry: entry.name):
            if hidden([entry.name]):
                continue
            if entry.is_dir():  # links come after all folders, whose images keep their own paths
                (waiting.append if entry.is_symlink() else waiting.appendleft)(here / entry.name)
            elif entry.is_file() or entry.is_symlink():  # a link that leads nowhere is an image that cannot be read
                yield here / entry.name


def read_folder(path: Path) -> Folder:
    """List a folder, or a single archive, with what is in archives."""
    names: list[str] = []
    for file in files_of(path):
        archive = archive_kind(file.name)
        names += list_archive(file, archive) if archive else [str(file)]
    suffixes = image_suffixes()
    pictures = [name for name in names if suffix_of(name) in suffixes]
    arrays = [name for name in names if suffix_of(name) == ARRAYS]
    images = pictures or arrays  # arrays beside pictures are taken for notes on them, such as masks
    if len(arrays) > len(images):
        logger.warning(
            "%d %s files in %s are left out, since arrays are images only in a folder without pictures, and it has %d "
            "pictures, such as %s: move these elsewhere to train on the arrays",
            len(arrays),
            ARRAYS,
            path,
            len(pictures),
            pictures[0],
        )
    metadata = [name for name in names if Path(name).name in METADATA]
    rest = Counter(suffix_of(name) or "without suffix" for name in set(names) - set(images) - set(metadata))
    return Folder(path, tuple(sorted(images)), tuple(metadata), rest)


def suffix_of(name: str) -> str:
    """The suffix of a file, or of one inside an archive, in lower case."""
    return Path(name.partition("::")[0]).suffix.lower()


def hidden(parts: Iterable[str]) -> bool:
    """Whether a file is of the system, not of the user: `.DS_Store`, `__MACOSX/...`."""
    return any(part.startswith((".", "__")) or part in SYSTEM_FOLDERS for part in parts)


def archive_kind(name: str) -> str | None:
    """How fsspec opens a file, if it is an archive."""
    return next((kind for suffix, kind in ARCHIVES.items() if name.lower().endswith(suffix)), None)


def list_archive(path: Path, kind: str) -> list[str]:
    """The files of an archive, as addresses that `read_file` reads; ValueError if it cannot be read."""
    with reading(path, "an archive"):
        archive = open_archive(kind, str(path), os.getpid())
        inside = archive.find("")
        if kind == "zip":
            check_zip(archive.zip, path)
        else:
            check_end(archive.tar)
    return [f"{kind}://{name.lstrip('/')}::{path}" for name in inside if not hidden(Path(name.lstrip("/")).parts)]


@contextmanager
def reading(name: object, kind: str = "a data set") -> Iterator[None]:
    """Errors in here are those of a file or folder, of whichever type its parser raises; ValueError that names it.

    An error of the system, such as a file that may not be read, is no damage. MemoryError stays as it is.
    """
    try:
        yield
    except Exception as error:
        fault = (isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__) or error
        if isinstance(fault, MemoryError):
            raise fault from None
        reason = str(fault).strip(" .\n") or type(fault).__name__
        of_system = isinstance(fault, OSError) and fault.errno is not None
        advice = "" if of_system else ". It is damaged, or of another form than its name says: write it anew"
        raise ValueError(f"{name} cannot be read as {kind}: {reason}{advice}") from error


def check_zip(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise ValueError if the list at the end of a zip may lack images.

    The list ends with the number of files, which zipfile does not compare with it. Each name also stands before its
    file, where zipfile looks only when it opens the file: those that are not called as images are, which are never
    opened, are compared here.
    """
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 2**16 + 22), os.SEEK_END)
        _, _, end = file.read().rpartition(b"PK\5\6")
        count, listed = int.from_bytes(end[6:8], "little"), len(archive.infolist())
        if count not in (0xFFFF, listed % 2**16):  # large zips have the number elsewhere
            raise ValueError(f"it lists {listed} files and says that they are {count}")
        suffixes = image_suffixes()
        for about in archive.infolist():
            if suffix_of(about.filename) not in suffixes:
                check_name(file, about)


def check_name(file: BinaryIO, about: zipfile.ZipInfo) -> None:
    """Raise ValueError if the name of a file in the list of a zip is not the one that stands before the file."""
    file.seek(about.header_offset)
    header = file.read(30)
    name = file.read(int.from_bytes(header[26:28], "little"))
    in_list = about.orig_filename.encode("utf-8" if about.flag_bits & 0x800 else "cp437")
    if not header.startswith(b"PK\3\4") or name != in_list:
        raise ValueError(f"the names of a file in its list, {in_list!r}, and before the file, {name!r}, differ")


def check_end(archive: tarfile.TarFile) -> None:
    """Raise ValueError unless a tar that was listed ends in zeros: tarfile takes a damaged header for its end."""
    file = cast(Any, archive.fileobj)
    file.seek(archive.offset)
    size, zeros = 0, True
    while block := file.read(2**20):
        size, zeros = size + len(block), zeros and not block.strip(b"\0")
    if size < tarfile.BLOCKSIZE or not zeros:
        raise ValueError(f"it is cut off, or damaged, after {len(archive.getmembers())} files")


@lru_cache(maxsize=4)
def open_archive(kind: str, path: str, process: int) -> fsspec.AbstractFileSystem:
    """An archive, listed once in every process: forked ones would read at each other's places."""
    options = {"compression": "gzip"} if path.lower().endswith(".tgz") else {}  # fsspec knows .tar.gz by its name
    return fsspec.filesystem(kind, fo=path, **options)


def read_file(path: str) -> bytes:
    """The bytes of a file, on the disk or in an archive; OSError or ValueError if it cannot be read."""
    if "://" not in path:
        return Path(path).read_bytes()
    inner, _, archive = path.partition("::")
    kind, _, name = inner.partition("://")
    if archive and "://" not in archive:
        with reading(archive, "an archive"):
            return cast(bytes, open_archive(kind, archive, os.getpid()).cat_file(name))
    with fsspec.open(path, "rb") as file:
        return cast(bytes, file.read())


def holds_pictures(path: Path) -> bool:
    """Whether a folder or archive holds images as files of their own, not in tables or samples of a webdataset."""
    if path.is_file():
        kind = archive_kind(path.name)
        return kind == "zip" or (kind == "tar" and not holds_samples(path))
    names = [file.name for file in files_of(path) if file.name not in METADATA]
    kinds = {archive_kind(name) or suffix_of(name) for name in names}
    if has_configurations(path) or kinds & TABLES:
        return False
    # A folder without any of these goes to `open_folder`, which says what it holds.
    return bool(kinds & {*image_suffixes(), "zip"}) or not kinds & {*READERS, "tar"}


def holds_samples(path: Path) -> bool:
    """Whether some files of a tar are a sample of a webdataset: several of one name, such as `1.png` and `1.json`.

    What follows the first dot of a name is the field. Fields that begin with a digit, as in `cat.1.png` and
    `cat.2.png`, only number pictures.
    """
    fields = defaultdict(list)
    for name in list_archive(path, "tar"):
        inner = Path(name.partition("::")[0])
        stem, _, field = inner.name.partition(".")
        fields[inner.parent / stem].append(field)
    samples = [sample for sample in fields.values() if len(sample) > 1]
    return any(not field[:1].isdigit() for sample in samples for field in sample)


def has_configurations(path: Path) -> bool:
    """Whether the folder's card says which files are which split, as one of a Hub data set does."""
    card = path / "README.md"
    return card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8", errors="replace")


def splits_by_words(folder: Path, tables: Sequence[Path]) -> dict[str, list[str]]:
    """Tables by the split that a word in their names or folders says, as in `train-00000-of-00002.parquet`.

    All are "train" if no name says one. ValueError if some names do, and others do not, or say two.
    """
    splits: dict[str, list[str]] = {}
    for table in tables:
        words = re.split("[^a-z]+", str(table.relative_to(folder)).lower())
        found = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
        splits.setdefault(found.pop() if len(found) == 1 else "", []).append(str(table))
    if list(splits) == [""]:
        return {"train": splits[""]}
    if lost := splits.get("", []):
        there = ", ".join(sorted(name for name in splits if name))
        raise ValueError(
            f"{len(lost)} files of {folder}, such as {Path(lost[0]).name}, are in none of its splits ({there}), which "
            f"words in the files' names make: name the files that are meant, as in '{folder}/*{Path(lost[0]).suffix}'"
        )
    return {name: splits[name] for name in ("train", "validation", "test") if name in splits}


def open_folder(path: Path, split: str | None, cache_dir: str | None) -> tuple[datasets.Dataset, str]:
    """The images of a split, with their classes where every one lies in a folder of a class; and what was found.

    Args:
        path: of the folder, or of an archive.
        split: train, validation or test; None for train, or the only one.
        cache_dir: where `datasets` keeps what it makes of metadata.

    Raises:
        ValueError: there are no images, or no such split.
    """
    folder = read_folder(path)
    splits = folder.splits
    if not splits:
        found = f", but {folder.not_images}" if folder.others else ""
        raise ValueError(
            f"{path} holds no images{found}: images are files such as .png, .jpg, .webp, .tiff or .npy, or .zip and "
            ".tar archives of them"
        )
    chosen = split or ("train" if "train" in splits else next(iter(splits)))
    if chosen not in splits or (split is None and "train" not in splits and len(splits) > 1):
        there = ", ".join(f"{name} ({len(images)} images)" for name, images in splits.items())
        raise ValueError(f"{path} has no split {chosen if split else 'train'!r}; it has {there}: choose with --split")
    if folder.metadata and suffix_of(folder.images[0]) == ARRAYS:
        raise ValueError(f"{path} holds arrays, of which {folder.metadata[0]} is the table: pass it as --dataset_name")
    if folder.metadata:
        on_disk = [image for image in splits[chosen] if "://" not in image]  # metadata only name files on the disk
        files = {chosen: [*on_disk, *folder.metadata]}
        with reading(", ".join(folder.metadata), "metadata of images"):
            rows = datasets.load_dataset("imagefolder", data_files=files, split=chosen, cache_dir=cache_dir)
    else:
        rows = with_classes(folder, chosen)
    return rows, folder.describe(len(rows), chosen)


def with_classes(folder: Folder, split: str) -> datasets.Dataset:
    """A row for each image; its class is the folder that it lies in, if there are several, all at one depth."""
    by_folders = list(folder.splits) != ["train"]
    inside = {image: folder.parts(image)[by_folders:] for image in folder.images}
    parents = {parts[-2] if len(parts) > 1 else "" for parts in inside.values()}
    rows: dict[str, list[str]] = {"image": folder.splits[split]}
    features: dict[str, Any] = {"image": datasets.Image(decode=False)}
    if len(parents) > 1 and len(set(map(len, inside.values()))) == 1:
        rows["label"] = [inside[image][-2] for image in folder.splits[split]]
        features["label"] = datasets.ClassLabel(names=sorted(parents))
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))
