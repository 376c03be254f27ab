"""Damaged files of every form: their images are all there, or the file is named; none is lost in silence.

Hypothesis flips, cuts out, inserts and repeats parts. What loads has as many images as the whole set, and what does not
is refused by one of the project's errors, with the name of the file or the number of the image; with `skip_bad_images`
the missing ones are reported one by one.
"""

import csv
import datetime
import gc
import io
import json
import re
import tempfile
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddpm_from_scratch.data.config import DataConfig
from ddpm_from_scratch.data.dataset import load_data
from helpers.containers import (
    arrow,
    featured,
    gzipped,
    listed,
    metadata,
    parquet,
    tarred,
    tree,
    webdataset,
    zipped,
)
from helpers.pictures import PICTURES, saved

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]

COUNT = 3
PNGS = [(f"{seed}.png", saved("PNG", "RGB", seed)) for seed in range(COUNT)]


def flipped(data, start, _, value):
    return data[:start] + bytes([data[start] ^ value]) + data[start + 1 :]


def cut_out(data, start, length, _):
    return data[:start] + data[start + length :]


def cut_off(data, start, _length, _value):
    return data[:start]


def inserted(data, start, length, value):
    return data[:start] + bytes([value]) * length + data[start:]


def repeated(data, start, length, _):
    return data[: start + length] + data[start:]


def blanked(data, start, length, value):
    return data[:start] + bytes([value]) * len(data[start : start + length]) + data[start + length :]


EDITS = st.lists(
    st.tuples(
        st.sampled_from([flipped, cut_out, cut_off, inserted, repeated, blanked]),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from([1, 2, 4, 16, 100, 512]),
        st.integers(1, 255),
    ),
    min_size=1,
    max_size=3,
)


def damaged(data, edits):
    for edit, place, length, value in edits:
        if data:
            data = edit(data, int(place * len(data)), length, value)
    return data


def all_of_them(_):
    return COUNT


def headers(content):
    """How many pictures a tar has by the magic words of its headers: a whole block may be missing without a trace."""
    blocks = (content[start : start + 512] for start in range(0, len(content), 512))
    return len({block[:100] for block in blocks if block[257:262] == b"ustar" and b".png" in block[:100]})


def lines(content):
    """Rows of CSV, but for the first: a whole line may be missing without a trace."""
    text = content.decode(errors="replace").replace("\0", "")
    return max(0, sum(any(row) for row in csv.reader(io.StringIO(text, newline=""))) - 1)


def objects(content):
    """Objects of JSON lines."""
    text, found, decoder = content.decode(errors="replace").strip(), 0, json.JSONDecoder()
    while text:
        _, stop = decoder.raw_decode(text)
        text, found = text[stop:].strip(), found + 1
    return found


def picture_folder(kind, folder, edits):
    """A folder of three pictures of a kind, of which the second is damaged; the folder and the file."""
    picture = PICTURES[kind]
    contents = [picture.write(seed) for seed in range(COUNT)]
    contents[1] = damaged(contents[1], edits)
    tree(folder, [(f"{seed}{picture.suffix}", content) for seed, content in enumerate(contents)])
    return folder, folder / f"1{picture.suffix}"


def container(write, folder, edits):
    """A damaged archive or table, which is to be loaded; and the file once more."""
    path = write(tree(folder, []), PNGS)
    path.write_bytes(damaged(path.read_bytes(), edits))
    return path, path


def damaged_metadata(name, folder, edits):
    metadata(tree(folder, []), PNGS, name)
    path = folder / name
    path.write_bytes(damaged(path.read_bytes(), edits))
    return folder, path


SETS = {  # what is damaged, how many images there are by the file alone, and how often
    **{kind: (partial(picture_folder, kind), all_of_them, 80) for kind in PICTURES if not PICTURES[kind].refused},
    "zip": (partial(container, zipped), all_of_them, 400),
    "tar": (partial(container, tarred), headers, 400),
    "tar.gz": (partial(container, gzipped), all_of_them, 200),
    "webdataset": (partial(container, webdataset), headers, 100),
    "parquet": (partial(container, parquet), all_of_them, 400),
    "parquet without compression": (partial(container, partial(parquet, compression="none")), all_of_them, 400),
    "parquet of features": (partial(container, featured), all_of_them, 100),
    "arrow": (partial(container, arrow), all_of_them, 100),
    "CSV": (partial(container, listed), lines, 150),
    "JSON lines": (partial(container, partial(listed, name="set.jsonl")), objects, 150),
    "metadata.csv": (partial(damaged_metadata, "metadata.csv"), lines, 100),
    "metadata.jsonl": (partial(damaged_metadata, "metadata.jsonl"), objects, 100),
}


STREAMED = {
    name: (partial(container, write), count, 100)
    for name, write, count in (
        ("parquet", partial(parquet, row_group_size=1), all_of_them),
        ("webdataset", webdataset, headers),
        ("JSON lines", partial(listed, name="set.jsonl"), objects),
    )
}


def load(path, folder, channels=None, **options):
    config = DataConfig(dataset_name=str(path), cache_dir=str(folder / "cache"), **options)
    config.validate()
    return load_data(config, channels, 8)


def names(error, file):
    """Whether an error says which file or image is meant."""
    return file.name in str(error) or re.search(r"image \d+|none of \d+ images|rows \d+ to \d+", str(error))


def check(path, file, folder, count, **options):
    """No image is lost in silence."""
    for skip in (False, True):
        try:
            data = load(path, folder, skip_bad_images=skip, **options)
        except (ValueError, OSError) as error:
            assert names(error, file), str(error)
        else:
            assert len(data.images) + len(data.unreadable) == count(file.read_bytes())
            assert skip or not data.unreadable


def check_stream(path, file, folder, count):
    """No image of a stream is lost in silence."""
    try:
        data = load(path, folder, 3, streaming=True, skip_bad_images=True)
    except (ValueError, OSError) as error:
        assert names(error, file), str(error)
        return
    assert len(data.images) == count(file.read_bytes())
    for index in range(len(data.images)):
        try:
            assert data.images[index].shape[0] == 3
        except ValueError as error:
            assert names(error, file), str(error)


def damage(write, examples, check_one):
    """Check many damaged files."""

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=datetime.timedelta(seconds=20),
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(EDITS)
    def run(edits):
        with tempfile.TemporaryDirectory() as folder:
            check_one(*write(Path(folder) / "set", edits), Path(folder))

    run()
    gc.collect()  # `datasets` leaves files of metadata open


@pytest.mark.parametrize("name", SETS)
def test_no_image_is_lost_in_silence(name):
    write, count, examples = SETS[name]
    options = PICTURES[name].options if name in PICTURES else {}
    damage(write, examples, partial(check, count=count, **options))


@pytest.mark.parametrize("name", STREAMED)
def test_no_image_of_a_stream_is_lost_in_silence(name):
    write, count, examples = STREAMED[name]
    damage(write, examples, partial(check_stream, count=count))
