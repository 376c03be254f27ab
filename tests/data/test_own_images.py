"""Folders, archives and tables as people have them: every image arrives as PIL sees it, or is refused by name."""

import errno
import io
import logging
import os
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from ddpm_from_scratch.data import dataset as data
from ddpm_from_scratch.data import folders
from ddpm_from_scratch.data.config import DataConfig
from ddpm_from_scratch.evaluation import evaluate
from ddpm_from_scratch.training.arguments import parse
from helpers.runs import encode

SIZE = 16


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def pixels(seed, channels=3, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (size, size, channels), dtype=np.uint8)


def save(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed)).save(path)
    return path


def load(source, channels=None, **options):
    named = {"train_data_dir": str(source)} if Path(source).is_dir() else {"dataset_name": str(source)}
    config = DataConfig(**{**named, **options})
    config.validate()
    return data.load_data(config, channels, None)


def seeds_of(loaded, seeds):
    """Which of the pictures of these seeds the images are, each once."""
    known = {pixels(seed).tobytes(): seed for seed in seeds}
    return sorted(known[image.permute(1, 2, 0).numpy().tobytes()] for image in loaded.images)


# --- kinds of images -----------------------------------------------------------------------------------------------


def seen_on(array, background):
    """RGBA or LA as it is seen on a background, by the formula of its alpha."""
    *colours, alpha = np.moveaxis(array.astype(float), -1, 0)
    return np.stack([c * alpha / 255 + b * (1 - alpha / 255) for c, b in zip(colours, background, strict=False)], -1)


FORMATS = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
    "GIF": ("P", "L"),
    "BMP": ("1", "L", "P", "RGB"),
    "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
    "PPM": ("L", "RGB"),
    "TGA": ("L", "P", "RGB", "RGBA"),
}
KINDS = [(suffix, mode) for suffix, modes in FORMATS.items() for mode in modes]
SUFFIXES = {"JPEG": ".jpg", "TIFF": ".TIF"}  # one in capitals
LOSSLESS = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}


@pytest.mark.parametrize("background", ["white", "#0080ff"])
@pytest.mark.parametrize(("kind", "mode"), KINDS)
def test_every_kind_of_file_is_read_as_pil_reads_it(tmp_path, kind, mode, background):
    path = tmp_path / "Ünï code" / f"a b{SUFFIXES.get(kind, '.' + kind.lower())}"
    path.parent.mkdir()
    Image.fromarray(pixels(0, 4), "RGBA").convert(mode).save(path, kind, **LOSSLESS.get(kind, {}))
    loaded = load(tmp_path, background=background)
    with Image.open(path) as image:
        rgba = np.asarray(image.convert("RGBA"))
    assert loaded.channels == (1 if mode in ("1", "L", "LA") else 3)
    expected = seen_on(rgba, (255, 255, 255) if background == "white" else (0, 128, 255))
    if loaded.channels == 1:
        expected = np.asarray(Image.fromarray(expected.round().astype(np.uint8)).convert("L"))[..., None]
    np.testing.assert_allclose(loaded.images[0].permute(1, 2, 0).numpy(), expected, atol=2)


@pytest.mark.parametrize(("mode", "transparency"), [("P", 0), ("L", 7), ("RGB", (9, 9, 9))])
def test_a_transparent_colour_shows_the_background(tmp_path, mode, transparency, caplog):
    image = Image.new(mode, (SIZE, SIZE), 0 if mode == "P" else transparency)
    if mode == "P":
        image.putpalette([255, 0, 255, 9, 9, 9])
    image.save(tmp_path / "one.png", transparency=transparency)
    with caplog.at_level(logging.INFO):
        assert (load(tmp_path, background="black").images == 0).all()
        assert (load(tmp_path, 3).images == 255).all()
    assert "1 of 1 images looked at have transparent parts, which become black" in caplog.text


def test_greys_in_a_palette_are_gray(tmp_path):
    image = Image.fromarray(pixels(0)).convert("L").convert("P")
    image.putpalette([value for gray in range(256) for value in (gray, gray, gray)])
    image.save(tmp_path / "one.png")
    loaded = load(tmp_path)
    assert loaded.channels == 1
    np.testing.assert_array_equal(loaded.images[0, 0], np.asarray(image.convert("L")))


def test_a_colour_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"background must be a colour such as white, .* got 'whyte'"):
        DataConfig(background="whyte").validate()


# --- folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["photo_{}", "steam_train_{}", "ILSVRC2012_val_{}", "test-{}", "dev {}", "valid.{}"])
def test_words_in_names_split_nothing(tmp_path, names):
    for seed in range(4):
        save(tmp_path / f"{names.format(seed)}.png", seed)
    save(tmp_path / "my_train_ticket.png", 4)
    assert seeds_of(load(tmp_path), range(5)) == [*range(5)]


@pytest.mark.parametrize("other", ["car", "trains", "dev", "eval"])
def test_a_folder_beside_train_is_a_class_not_a_split(tmp_path, other):
    for seed in range(4):
        save(tmp_path / ("train", other)[seed % 2] / f"{seed}.png", seed)
    loaded = load(tmp_path, class_conditional=True)
    assert seeds_of(loaded, range(4)) == [*range(4)] and set(loaded.labels.names) == {"train", other}


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Validation"])
@pytest.mark.parametrize("classes", [("",), ("cat", "dog")])
def test_folders_that_are_called_as_splits_are_splits(tmp_path, name, classes, caplog):
    seed = 0
    for folder in ("train", name, "test"):
        for part in classes:
            save(tmp_path / folder / part / f"{seed}.png", seed)
            seed += 1
    each = len(classes)
    with caplog.at_level(logging.INFO):
        assert seeds_of(load(tmp_path), range(seed)) == [*range(each)]
    assert f"{each} images of {3 * each} files" in caplog.text and f"{each} in split test" in caplog.text
    assert seeds_of(load(tmp_path, split="validation"), range(seed)) == [*range(each, 2 * each)]
    options = {"class_conditional": True, "split": "test"}
    if each > 1:
        assert load(tmp_path, **options).labels.names == classes
    else:
        with pytest.raises(ValueError, match="no column of the data set holds labels"):
            load(tmp_path, **options)


def test_a_folder_of_one_split_is_that_split(tmp_path):
    save(tmp_path / "test" / "1.png", 1)
    assert seeds_of(load(tmp_path), [1]) == [1]
    with pytest.raises(ValueError, match=r"no split 'train'; it has test \(1 images\): choose with --split"):
        load(tmp_path, split="train")


def test_other_files_are_counted_and_hidden_ones_are_not(tmp_path, caplog):
    save(tmp_path / "1.PNG", 1)
    for name in ("notes.txt", "more.txt", "array.npy", ".hidden.png", "__MACOSX/1.png", "without"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with caplog.at_level(logging.INFO):
        assert len(load(tmp_path).images) == 1
    assert f"1 images of 5 files in {tmp_path} (no images: 1 .npy, 2 .txt, 1 without suffix)" in caplog.text


@pytest.mark.parametrize("name", ["notes.csv", "labels.json", "train.jsonl"])
def test_a_table_beside_pictures_changes_nothing(tmp_path, name):
    save(tmp_path / "photo_1.png", 1)
    save(tmp_path / "photo_train_2.png", 2)
    (tmp_path / name).write_text("{}")
    config = DataConfig(dataset_name=str(tmp_path))
    assert seeds_of(data.load_data(config, None, None), [1, 2]) == [1, 2]


@pytest.mark.parametrize(("suffix", "said"), [(".pdf", ", but 3 .pdf"), (".txt", ", but 3 .txt"), ("", "3 without")])
def test_a_folder_without_images_says_what_it_holds(tmp_path, suffix, said):
    for number in range(3):
        (tmp_path / f"{number}{suffix}").write_bytes(b"x")
    with pytest.raises(ValueError, match=f"holds no images.*{said}.*images are files such as .png"):
        load(tmp_path)


def test_classes_are_in_the_order_of_datasets(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("order")  # `datasets` takes the name of this test for that of a split
    for seed, part in enumerate(("b", "a", "B", "c/a")):
        save(tmp_path / part / f"{seed}.png", seed)
    ours, _ = folders.open_folder(tmp_path, None, None)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train").cast_column(
        "image", datasets.Image(decode=False)
    )
    assert ours["image"] == theirs["image"] and "label" not in ours.features  # at two depths
    (tmp_path / "c" / "a" / "3.png").rename(tmp_path / "c" / "3.png")
    ours, _ = folders.open_folder(tmp_path, None, None)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train")
    assert ours["label"] == theirs["label"] and ours.features["label"].names == theirs.features["label"].names


def test_metadata_name_images_and_columns(tmp_path, caplog):
    for seed in range(3):
        save(tmp_path / "images" / f"{seed}.png", seed)
    lines = (f'{{"file_name": "images/{seed}.png", "label": "{"ab"[seed]}"}}\n' for seed in range(2))
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    with caplog.at_level(logging.INFO):
        loaded = load(tmp_path, class_conditional=True)
    assert seeds_of(loaded, range(3)) == [0, 1] and loaded.labels.names == ("a", "b")
    assert "2 images of 4 files" in caplog.text and "1 that no metadata name" in caplog.text


def unreadable(monkeypatch, name):
    """Nobody may list folders of this name, whatever the system says."""
    scan = os.scandir

    def refuse(folder):
        if Path(folder).name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)


@pytest.mark.parametrize("name", [".Trashes", "lost+found"])
def test_folders_of_the_system_are_not_looked_into(tmp_path, monkeypatch, name):
    save(tmp_path / name / "1.png", 1)
    save(tmp_path / "2.png", 2)
    unreadable(monkeypatch, name)
    assert seeds_of(load(tmp_path), [1, 2]) == [2]


def test_a_folder_that_nobody_may_read_is_named(tmp_path, monkeypatch):
    save(tmp_path / "private" / "1.png", 1)
    unreadable(monkeypatch, "private")
    with pytest.raises(PermissionError, match=r"Permission denied: .*private"):
        load(tmp_path)


def test_folders_that_link_to_each_other_count_once(tmp_path):
    for seed, name in enumerate("ab"):
        save(tmp_path / name / f"{seed}.png", seed)
    (tmp_path / "a" / "link").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "link").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "top").symlink_to(tmp_path)
    loaded = load(tmp_path, class_conditional=True)
    assert seeds_of(loaded, range(2)) == [0, 1] and loaded.labels.names == ("a", "b")


def test_a_link_to_a_folder_elsewhere_is_followed(tmp_path):
    save(tmp_path / "elsewhere" / "1.png", 1)
    save(tmp_path / "set" / "2.png", 2)
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    assert seeds_of(load(tmp_path / "set"), [1, 2]) == [1, 2]


# --- archives and single files -------------------------------------------------------------------------------------


def add_file(archive, name, content):
    """Put a file into a tar."""
    about = tarfile.TarInfo(name)
    about.size = len(content)
    archive.addfile(about, io.BytesIO(content))


def write_archive(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for seed, name in enumerate(names):
                archive.writestr(name, encode(Image.fromarray(pixels(seed))))
        return path
    with tarfile.open(path, "w:" if path.suffix == ".tar" else "w:gz") as archive:
        for seed, name in enumerate(names):
            add_file(archive, name, encode(Image.fromarray(pixels(seed))))
    return path


@pytest.mark.parametrize("name", ["images.zip", "images.tar", "images.tgz", "images.tar.gz"])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "in a folder"])
def test_archives_are_their_images(tmp_path, name, alone):
    path = write_archive(tmp_path / "set" / name, ["1.png", "ü n/2.png", "train_3.PNG", "__MACOSX/4.png"])
    loaded = load(path if alone else path.parent)
    assert seeds_of(loaded, range(4)) == [0, 1, 2]


def test_processes_read_the_same_archive_at_once(tmp_path):
    path = write_archive(tmp_path / "one.zip", [f"{seed}.png" for seed in range(3)])
    assert seeds_of(load(path), range(3)) == [0, 1, 2]  # open in this process, and not to be shared
    stream = data.ImageStream(load(path), 0, False, False)
    loader = data.build_loader(stream, data.StreamBatches(range(4), 0, 1, 3), 2, False)
    assert [batch.images.shape for batch in loader] == [(3, 3, SIZE, SIZE)] * 4


def test_classes_of_an_archive_and_of_several(tmp_path):
    one = write_archive(tmp_path / "one.zip", ["cat/1.png", "dog/2.png"])
    assert load(one, class_conditional=True).labels.names == ("cat", "dog")
    for name in ("cat.zip", "dog.zip"):
        write_archive(tmp_path / "several" / name, ["1.png"])
    loaded = load(tmp_path / "several", class_conditional=True)
    assert loaded.labels.names == ("cat", "dog") and len(loaded.images) == 2


def test_a_broken_archive_is_named(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK but no more")
    with pytest.raises(ValueError, match=r"images.zip cannot be read as an archive"):
        load(tmp_path)


def test_an_encrypted_note_in_a_zip_is_not_opened(tmp_path):
    path = write_archive(tmp_path / "images.zip", ["1.png", "ü/2.png"])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("README", "secret")
        archive.writestr("ü/", "")
    content = bytearray(path.read_bytes())
    in_file, in_list = content.index(b"README") - 30, content.rindex(b"README") - 46
    content[in_file + 6] |= 1  # the bit for encryption
    content[in_list + 8] |= 1
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive, pytest.raises(RuntimeError, match="encrypted"):
        archive.open("README")
    assert seeds_of(load(path), [0, 1]) == [0, 1]


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "I/O error")])
@pytest.mark.parametrize("wrapped", [False, True])
def test_errors_of_the_system_are_no_damage(error, wrapped):
    with pytest.raises(ValueError, match=r"^a.zip cannot be read as an archive: \[Errno \d+\] [\w /]+$"), in_zip():
        if wrapped:
            raise datasets.exceptions.DatasetGenerationError("while reading") from error
        raise error


def in_zip():
    return folders.reading("a.zip", "an archive")


def test_too_little_memory_is_no_damage():
    with pytest.raises(MemoryError), in_zip():
        raise MemoryError
    with pytest.raises(MemoryError), in_zip():
        raise datasets.exceptions.DatasetGenerationError("while reading") from MemoryError()
    with pytest.raises(ValueError, match=r"a.zip cannot be read as an archive: 'x'. It is damaged, or"), in_zip():
        raise KeyError("x")


def test_a_webdataset_keeps_its_columns(tmp_path):
    with tarfile.open(tmp_path / "one.tar", "w") as archive:
        for seed in range(3):
            add_file(archive, f"{seed}.png", encode(Image.fromarray(pixels(seed))))
            add_file(archive, f"{seed}.cls", str(seed % 2).encode())
    loaded = load(tmp_path / "one.tar", class_conditional=True, label_column="cls")
    assert seeds_of(loaded, range(3)) == [0, 1, 2] and loaded.labels.of_images.tolist() == [0, 1, 0]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_tables_of_paths(tmp_path, suffix):
    for seed in range(3):
        save(tmp_path / "pictures" / f"{seed}.png", seed)
    rows = [(f"pictures/{seed}.png", "ab"[seed % 2]) for seed in range(3)]
    if suffix == "jsonl":
        text = "\n".join(f'{{"file_name": "{path}", "label": "{label}"}}' for path, label in rows)
    else:
        comma = {"csv": ",", "tsv": "\t"}[suffix]
        text = "\n".join(comma.join(row) for row in [("file_name", "label"), *rows])
    (tmp_path / f"set.{suffix}").write_text(text + "\n")
    loaded = load(tmp_path / f"set.{suffix}", class_conditional=True)
    assert seeds_of(loaded, range(3)) == [0, 1, 2] and loaded.labels.names == ("a", "b")


def test_a_table_without_rows_or_a_file_of_no_known_kind(tmp_path):
    (tmp_path / "one.csv").write_text("image,label\n")
    with pytest.raises(ValueError, match=r"one.csv holds no images"):
        load(tmp_path / "one.csv")
    (tmp_path / "one.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"one.npz is .npz, which nobody reads: images are in folders, .zip, .parquet"):
        load(tmp_path / "one.npz")
    with pytest.raises(FileNotFoundError, match=r"dataset_name: no file or folder .*\*.tar"):
        load(tmp_path / "*.tar")


# --- tables --------------------------------------------------------------------------------------------------------


def as_table(path, seeds, columns=("image",)):
    rows = [{"bytes": encode(Image.fromarray(pixels(seed))), "path": None} for seed in seeds]
    pyarrow.parquet.write_table(pyarrow.table(dict.fromkeys(columns, rows)), path)
    return path


def test_tables_that_no_split_holds_are_refused_and_a_pattern_takes_them(tmp_path):
    as_table(tmp_path / "clothes_train.parquet", [0, 1])
    as_table(tmp_path / "shoes.parquet", [2])
    with pytest.raises(ValueError, match=r"1 files of .*, such as shoes.parquet, are in none of its splits \(train\)"):
        data.load_data(DataConfig(dataset_name=str(tmp_path)), None, None)
    assert seeds_of(load(tmp_path / "*.parquet"), range(3)) == [0, 1, 2]


def test_a_part_of_a_split(tmp_path):
    for name, seeds in (("train", [0, 1, 2]), ("test", [3])):
        as_table(tmp_path / f"{name}-00000-of-00001.parquet", seeds)  # in a folder whose name has a split's, too
    for split, seeds in {None: [0, 1, 2], "test": [3], "train[1:]": [1, 2], "train+test": [0, 1, 2, 3]}.items():
        config = DataConfig(dataset_name=str(tmp_path), split=split)
        assert seeds_of(data.load_data(config, None, None), range(4)) == seeds
    with pytest.raises(ValueError, match=r"no split 'val'; it has .*train.*: choose with --split"):
        data.load_data(DataConfig(dataset_name=str(tmp_path), split="val"), None, None)


def test_the_column_of_images(tmp_path):
    path = as_table(tmp_path / "pairs.parquet", [0, 1], ("mask", "picture"))
    with pytest.raises(ValueError, match="the columns mask, picture all hold images: choose one with --image_column"):
        load(path)
    assert seeds_of(load(path, image_column="picture"), [0, 1]) == [0, 1]
    with pytest.raises(ValueError, match="no image_column 'pictur'; did you mean 'picture'"):
        load(path, image_column="pictur")


def test_held_out_images_are_read_as_the_training_images_are(tmp_path):
    """With the same column and background."""
    white = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0))
    rows = [{"bytes": encode(image), "path": None} for image in (white,) * 20]
    for name in ("train", "test"):
        pyarrow.parquet.write_table(pyarrow.table({"mask": rows, "picture": rows}), tmp_path / f"{name}.parquet")
    flags = ["--dataset_name", tmp_path / "train.parquet", "--test_set", tmp_path / "test.parquet"]
    flags += ["--image_column", "picture", "--background", "black"]
    real = evaluate.real_images(evaluate.parse(["model", *map(str, flags)]), 3, (SIZE, SIZE), [])
    assert (real.training == 0).all() and (real.held_out == 0).all()


# --- the length of the run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", [["--num_epochs", "5"], ["--num_epochs=5"], ["--num_epochs=5", "--max_train_steps=null"]]
)
def test_a_flag_for_epochs_beats_the_presets_steps(flags):
    config, _ = parse(["fashion_mnist_quick", *flags])
    assert (config.num_epochs, config.max_train_steps) == (5, None)


def test_the_presets_steps_stay_without_a_flag(capsys):
    config, _ = parse(["fashion_mnist_quick"])
    assert config.max_train_steps is not None and config.max_train_minutes is not None
    with pytest.raises(SystemExit):
        parse(["--num_epochs", "5", "--max_train_steps", "7"])
    assert "--num_epochs and --max_train_steps both say how long the run is" in capsys.readouterr().err
