"""Pictures of every kind in every container: two steps train on them as an independent reading sees them.

The tables of `helpers.pictures` and `helpers.containers` are the test. A picture with `refused` is turned away today by
a message that names the file; to have it trained on, take that argument out.
"""

import gc
import io
import json
import os
import re
from functools import partial

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image, features

from ddpm_from_scratch.runtime.errors import refusing
from ddpm_from_scratch.training.config import TrainingConfig
from ddpm_from_scratch.training.loop import advance, passes_from
from ddpm_from_scratch.training.run import build
from helpers.containers import CONTAINERS, gzipped, listed, metadata, parquet, renamed, tarred, tree, webdataset, zipped
from helpers.pictures import NEEDS, PICTURES, as_seen, saved
from helpers.runs import TINY

COUNT = 3

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file .*metadata.csv:ResourceWarning")


@pytest.fixture(autouse=True)
def own_cache(request, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    yield
    if "metadata" in request.node.name:
        gc.collect()  # `datasets` leaves the file open


EVERYWHERE = (
    "PNG P with a transparent colour",
    "JPEG of EXIF orientation 6",
    "JPEG CMYK",
    "GIF animated",
    "WebP",
    "AVIF",
)
MIXED_WITH = ("a zip", "a tar", "a webdataset", "Parquet of bytes", "save_to_disk", "CSV", "metadata.csv")
ROWS = [
    *((kind, "a folder") for kind in PICTURES),
    *(("PNG RGB", container) for container in CONTAINERS if container != "a folder"),
    *((kind, container) for kind in EVERYWHERE for container in MIXED_WITH),
    *(("PNG I;16", container) for container in ("a zip", "a tar", "Parquet of bytes and paths", "CSV")),
]


# --- two steps -------------------------------------------------------------------------------------------------------


def configuration(source, folder, **options):
    """Of two steps that see all COUNT images each."""
    of_run = {"output_dir": str(folder / "model"), "max_train_steps": 2, "train_batch_size": COUNT}
    model = {**TINY["model"], "block_out_channels": [8, 8], "down_block_types": ["DownBlock2D"] * 2}
    model["up_block_types"] = ["UpBlock2D"] * 2
    plain = {**TINY, **of_run, "model": model, "random_flip": False, "center_crop": True}
    config = TrainingConfig(**{**plain, "dataset_name": str(source), **options})
    config.validate()
    return config


def two_steps(config):
    """Train; the images [N, C, H, W] and labels that each step saw."""
    with refusing():
        run = build(config)
    passes = list(passes_from(run, 0))
    run.unet.train()
    before = [weight.detach().clone() for weight in run.unet.parameters()]
    assert all(torch.isfinite(advance(run, iter(passes[step:]))) for step in range(2))
    assert any(not torch.equal(old, new) for old, new in zip(before, run.unet.parameters(), strict=True))
    return [(one.batch.images, one.batch.labels) for one in passes]


def matches(images, expected, tolerance=2):
    """Whether the images [N, C, H, W] are these [H, W, 3], in any order."""
    if images.shape[1] == 1:
        expected = [seen @ [[0.299], [0.587], [0.114]] for seen in expected]
    assert len(images) == len(expected)
    arrays = images.permute(0, 2, 3, 1).double().numpy()
    if images.is_floating_point():  # deep images are in [-1, 1]
        arrays = (arrays + 1) * 127.5
    distances = np.array([[np.abs(array - seen).max() for array in arrays] for seen in expected])
    nearest = distances.argmin(1)
    return sorted(nearest) == [*range(len(arrays))] and distances.min(1).max() <= tolerance


@pytest.mark.parametrize(("kind", "container"), ROWS, ids=[f"{kind} in {container}" for kind, container in ROWS])
def test_pictures_are_trained_on_as_they_look(tmp_path, kind, container):
    picture = PICTURES[kind]
    if picture.suffix in NEEDS and not features.check(NEEDS[picture.suffix]):
        pytest.skip(f"PIL without {picture.suffix}")
    files = [(f"{seed}{picture.suffix}", picture.write(seed)) for seed in range(COUNT)]
    (tmp_path / "in").mkdir()
    config = configuration(CONTAINERS[container](tmp_path / "in", files), tmp_path, **picture.options)
    if picture.refused:
        with pytest.raises(ValueError, match=picture.refused) as error:
            two_steps(config)
        assert "image 0" in str(error.value) or str(tmp_path / "in") in str(error.value)
        return
    expected = [picture.seen(content) for _, content in files]
    for images, _ in two_steps(config):
        assert images.shape[1] == picture.channels and matches(images, expected)


@pytest.mark.parametrize(
    "container", ["Parquet of row groups", "a folder of Parquet", "a webdataset", "JSON lines", "Arrow"]
)
def test_pictures_of_a_stream_are_trained_on_as_they_look(tmp_path, container):
    files = [(f"{seed}.png", saved("PNG", "RGBA", seed)) for seed in range(COUNT)]
    (tmp_path / "in").mkdir()
    config = configuration(CONTAINERS[container](tmp_path / "in", files), tmp_path, streaming=True)
    for images, _ in two_steps(config):
        assert matches(images, [as_seen(content) for _, content in files])


# --- sizes, frames, classes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (13, 9), (9, 27), (16, 32)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_other_sizes_are_resized_and_cropped_at_the_centre(tmp_path, kind, size):
    """The shorter side becomes the resolution, by PIL's bicubic filter."""
    files = [(f"{seed}.{kind}", saved(kind, "RGB", seed, size)) for seed in range(COUNT)]
    expected = []
    for _, content in files:
        scale = 8 / min(size)
        image = Image.open(io.BytesIO(content)).resize([round(side * scale) for side in size], Image.Resampling.BICUBIC)
        left, top = ((side - 8) // 2 for side in image.size)
        expected.append(np.asarray(image.crop((left, top, left + 8, top + 8)), dtype=float))
    for images, _ in two_steps(configuration(tree(tmp_path / "in", files), tmp_path, resolution=8)):
        assert matches(images, expected, tolerance=0)


@pytest.mark.parametrize("kind", ["GIF animated", "WebP animated", "PNG of frames", "TIFF of pages", "MPO of two"])
def test_frames_after_the_first_are_not_left_out_in_silence(tmp_path, kind, caplog):
    files = [(f"{seed}{PICTURES[kind].suffix}", PICTURES[kind].write(seed)) for seed in range(COUNT)]
    build(configuration(tree(tmp_path / "in", files), tmp_path))
    assert "3 of 3 images looked at have several frames or pages, of which the first is taken" in caplog.text


ANIMALS = ("cat", "dog", "cat")


def in_folders(container):
    return lambda folder, files: container(folder, [(f"{ANIMALS[i]}/{name}", f) for i, (name, f) in enumerate(files)])


def in_zips(folder, files):
    for animal in set(ANIMALS):
        zipped(folder, [file for file, name in zip(files, ANIMALS, strict=True) if name == animal], f"{animal}.zip")
    return folder


def with_column(container, name, values):
    return partial(container, more={name: values})


def in_files(suffix, texts):
    """A webdataset whose samples have another file each."""
    return lambda folder, files: tarred(
        folder,
        [
            file
            for (name, content), text in zip(files, texts, strict=True)
            for file in ((name, content), (name.partition(".")[0] + suffix, text.encode()))
        ],
    )


JSONS = [json.dumps({"class": name, "about": {"legs": 4, "id": int(name == "cat")}}) for name in ANIMALS]
CLASSES = {  # container, --label_column, names
    "folders": (in_folders(tree), None, ("cat", "dog")),
    "folders in train": (in_folders(renamed("train/{1}")), None, ("cat", "dog")),
    "folders in a zip": (in_folders(zipped), None, ("cat", "dog")),
    "folders in a tar": (in_folders(tarred), None, ("cat", "dog")),
    "a zip each": (in_zips, None, ("cat", "dog")),
    "Parquet of names": (with_column(parquet, "label", ANIMALS), None, ("cat", "dog")),
    "Parquet of cls": (with_column(parquet, "cls", ANIMALS), None, ("cat", "dog")),
    "Parquet of numbers": (with_column(parquet, "target", (1, 0, 1)), None, ("0", "1")),
    "Parquet of keys": (
        with_column(parquet, "json", [{"class": name} for name in ANIMALS]),
        "json.class",
        ("cat", "dog"),
    ),
    "CSV": (with_column(listed, "animal", ANIMALS), "animal", ("cat", "dog")),
    "metadata": (with_column(metadata, "label", ANIMALS), None, ("cat", "dog")),
    "a webdataset of cls": (in_files(".cls", ("1", "0", "1")), None, ("0", "1")),
    "a webdataset of txt": (in_files(".txt", ANIMALS), "txt", ("cat", "dog")),
    "a webdataset of json": (in_files(".json", JSONS), "json.class", ("cat", "dog")),
    "a webdataset of keys in json": (in_files(".json", JSONS), "json.about.id", ("0", "1")),
}


@pytest.mark.parametrize("name", CLASSES)
def test_each_picture_has_its_class(tmp_path, name):
    container, column, names = CLASSES[name]
    files = [(f"{seed}.png", saved("PNG", "RGB", seed)) for seed in range(COUNT)]
    (tmp_path / "in").mkdir()
    options = {"class_conditional": True, "label_column": column, "label_dropout": 1e-9}
    config = configuration(container(tmp_path / "in", files), tmp_path, **options)
    meant = (0, 1, 0) if "cat" in names else (1, 0, 1)
    for images, labels in two_steps(config):
        found = {
            image.permute(1, 2, 0).numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)
        }
        assert found == {
            as_seen(f).astype(np.uint8).tobytes(): label for (_, f), label in zip(files, meant, strict=True)
        }
    assert build(config).data.labels.names == names


# --- what is refused -------------------------------------------------------------------------------------------------

PNGS = [(f"{seed}.png", saved("PNG", "RGB", seed)) for seed in range(COUNT)]
MEND = "mend it or leave it out, or pass over such images with --skip_bad_images"
ANEW = "It is damaged, or of another form than its name says: write it anew"


def table(name, text):
    """A table beside pictures."""
    return lambda folder, files: (
        tree(folder, [*files, (name, text.encode("utf-16" if "é" in text else "utf-8"))]) / name
    )


def cut(container, parts):
    """A file without its end."""

    def write(folder, files):
        path = container(folder, files)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * parts)])
        return path

    return write


def beside_with(file):
    return lambda folder, files: tree(folder, [*files, file])


def in_folder(name, text):
    return lambda folder, files: tree(folder, [*files, (name, text.encode())])


def other_columns(folder, files):
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2]}), folder / "set.parquet")
    return folder / "set.parquet"


def dead_link(folder, files):
    os.symlink(folder / "gone.png", tree(folder, files) / "link.png")
    return folder


def cut_at_a_file(folder, files):
    path = tarred(folder, files)
    path.write_bytes(path.read_bytes()[: 2 * 1024])
    return path


def damaged_header(folder, files):
    path = tarred(folder, files)
    path.write_bytes(path.read_bytes().replace(b"1.png", b"7.png"))
    return path


def swallowed_record(folder, files):
    """A zip whose list has a comment of 256 bytes after its second file, in which the third one disappears."""
    path = zipped(folder, files)
    content = bytearray(path.read_bytes())
    content[[match.start() for match in re.finditer(b"PK\1\2", content)][1] + 33] = 1
    path.write_bytes(content)
    return path


def renamed_in_the_list(folder, files):
    path = zipped(folder, files)
    before, _, after = path.read_bytes().rpartition(b"2.png")
    path.write_bytes(before + b"2.pnf" + after)
    return path


def no_text(folder, files):
    path = parquet(folder, files, compression="none", write_statistics=False)
    path.write_bytes(path.read_bytes().replace(b"0.png", b"0.pn\xe7"))
    return path


def two_in_one(folder, files):
    path = tarred(folder, files[:1])
    path.write_bytes(path.read_bytes() + tarred(folder, files[1:], "more.tar").read_bytes())
    return path


def without_sample(folder, files):
    return tarred(folder, [*PNGS, *((name.replace("png", "cls"), b"1") for name, _ in files)])


REFUSED = {
    "an empty file": (beside_with(("3.png", b"")), rf"image 3 \(.*3.png\) cannot be read: it is empty; {MEND}"),
    "a text": (beside_with(("3.png", b"text")), rf"image 3 \(.*3.png\) cannot be read: it is no image file; {MEND}"),
    "a cut picture": (beside_with(("3.png", PNGS[0][1][:90])), rf"image 3 \(.*3.png\) cannot be read: .*; {MEND}"),
    "a link that leads nowhere": (dead_link, rf"image 3 \(.*link.png\) cannot be read: .*No such file.*; {MEND}"),
    "an empty folder": (lambda folder, _: tree(folder, []), "in holds no images: images are files such as .png"),
    "a folder of texts": (
        lambda folder, _: tree(folder, [("a.txt", b"")]),
        "in holds no images, but 1 .txt: images are",
    ),
    "an empty zip": (lambda folder, _: zipped(folder, []), "set.zip holds no images: images are files such as .png"),
    "a cut zip": (cut(zipped, 0.5), rf"set.zip cannot be read as an archive: .*\. {ANEW}"),
    "a text called zip": (
        lambda folder, _: tree(folder, [("a.zip", b"text")]) / "a.zip",
        rf"a.zip cannot be .*\. {ANEW}",
    ),
    "a zip that lists too few": (swallowed_record, rf"set.zip cannot be .*: it lists 2 files and says .* 3\. {ANEW}"),
    "a zip that lists another name": (renamed_in_the_list, rf"set.zip cannot be read .*2.pnf.* differ.*\. {ANEW}"),
    "a path that is no text": (no_text, f"image 0 cannot be read: .* a path that is no text; {MEND}"),
    "a cut tar": (cut_at_a_file, rf"set.tar cannot be read as an archive: it is cut off, .* after 2 files\. {ANEW}"),
    "a cut webdataset": (cut(webdataset, 0.5), rf"set.tar cannot be read as an archive: .*\. {ANEW}"),
    "a damaged tar": (
        damaged_header,
        rf"set.tar cannot be read as an archive: it is cut off, .* after 1 files\. {ANEW}",
    ),
    "a tar after a tar": (two_in_one, rf"set.tar cannot be read as an archive: it is cut off, or .*1 files\. {ANEW}"),
    "a cut tar.gz": (cut(gzipped, 0.7), rf"set.tar.gz cannot be read as an archive: .*\. {ANEW}"),
    "samples that are apart": (without_sample, rf"set.tar cannot be read as a data set: .*\. {ANEW}"),
    "a class that is no number": (
        in_files(".cls", ANIMALS),
        rf"set.tar cannot be read as a data set: .*cat.*\. {ANEW}",
    ),
    "a cut Parquet": (cut(parquet, 0.5), rf"set.parquet cannot be read as a data set: .*\. {ANEW}"),
    "Parquet of other columns": (
        other_columns,
        r"set.parquet: no column .* holds images; its columns: n\. Name one with",
    ),
    "an empty CSV": (table("a.csv", ""), rf"a.csv cannot be read as a data set: .*\. {ANEW}"),
    "CSV in UTF-16": (
        table("a.csv", "file_name,label\n0.png,é\n"),
        rf"a.csv cannot be read as a data set: .*\. {ANEW}",
    ),
    "CSV without names": (
        table("a.csv", "0.png\n1.png\n"),
        "a.csv: no column .* holds images; its columns: 0.png. Name",
    ),
    "CSV with more in a line": (table("a.csv", "image,n\n0.png,1\n1.png,2,3\n"), rf"a.csv cannot be read .*\. {ANEW}"),
    "CSV with an empty line of two": (table("a.csv", "image,n\n0.png,1\n,2\n"), f"image 1 cannot be read: .*; {MEND}"),
    "CSV that names none": (
        table("a.csv", "image\n0.png\nno.png\n"),
        rf"image 1 \(.*no.png\) cannot be read: .*; {MEND}",
    ),
    "JSON lines with null": (
        table("a.jsonl", '{"image": null}\n'),
        r"a.jsonl: no column .* holds images; .* Name one with",
    ),
    "cut JSON lines": (
        table("a.jsonl", '{"image": "0.png"}\n{"im'),
        rf"a.jsonl cannot be read as a data set: .*\. {ANEW}",
    ),
    "metadata without file_name": (in_folder("metadata.csv", "name\n0.png\n"), rf"metadata.csv cannot be .*\. {ANEW}"),
    "empty metadata": (
        in_folder("metadata.csv", ""),
        rf"metadata.csv cannot be read as metadata of images: .*\. {ANEW}",
    ),
    "metadata that name none": (
        in_folder("metadata.csv", "file_name\nno.png\n"),
        rf"image 0 \(.*no.png\) cannot .*{MEND}",
    ),
    "a list of numbers": (
        lambda folder, _: tree(folder, [("a.npz", b"x")]) / "a.npz",
        "a.npz is .npz, which nobody reads",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_named_with_its_remedy(tmp_path, name):
    write, message = REFUSED[name]
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=message):
        build(configuration(write(tmp_path / "in", PNGS), tmp_path))


def test_pictures_that_are_passed_over_are_reported_one_by_one(tmp_path, caplog):
    bad = {"3.png": b"", "4.png": b"text", "5.png": PNGS[0][1][:90], "6.jpg": b"\xff\xd8\xff"}
    config = configuration(tree(tmp_path / "in", [*PNGS, *bad.items()]), tmp_path, skip_bad_images=True)
    for images, _ in two_steps(config):
        assert matches(images, [as_seen(content) for _, content in PNGS], tolerance=0)
    assert [message for message in build(config).data.unreadable if "cannot be read" in message] != []
    assert sorted(name for name in bad if f"{name}) cannot be read" in caplog.text) == sorted(bad)
