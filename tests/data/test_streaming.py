"""Data sets that are streamed: their order, what is read and kept, every form they come in, and exact resume."""

import io
import itertools
import json
import tarfile

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from ddpm_from_scratch.data import dataset as data
from ddpm_from_scratch.data import sources
from ddpm_from_scratch.runtime.errors import BadImages
from ddpm_from_scratch.runtime.random_streams import Block, WindowedOrder
from ddpm_from_scratch.training.config import TrainingConfig
from helpers.runs import SIZE, STEPS, assert_equal, checkpoint_tensors, encode, picture, run_main, write_parquet
from helpers.shards import CLASSES, FEATURES, NUM, rows_of, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder / "data")
    return folder / "data"


def load(path, tmp_path, **options):
    config = TrainingConfig(dataset_name=str(path), streaming=True, cache_dir=str(tmp_path / "cache"), **options)
    return data.load_data(config, None, options.get("resolution"))


@pytest.fixture
def small_window(monkeypatch):
    """A window of two blocks of 4 rows or so."""
    monkeypatch.setattr(sources, "MIB", 2500 // 128)
    monkeypatch.setattr(data, "MIB", 2500 // 128)


# --- the order -----------------------------------------------------------------------------------------------------


BLOCKS = (*tuple(Block(start, start + 5, 50) for start in range(0, 50, 5)), Block(50, 57, 500))


def order_of(epoch, order, seed=0):
    total = order.blocks[-1].stop
    return [order.index_at(seed, position) for position in range(epoch * total, (epoch + 1) * total)]


@pytest.mark.parametrize("window_bytes", [1, 100, 175, 10_000])
def test_an_epoch_holds_each_image_once(window_bytes):
    order = WindowedOrder(BLOCKS, window_bytes)
    epochs = [order_of(epoch, order) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(57)) for epoch in epochs)
    assert len({*map(tuple, epochs), tuple(order_of(0, order, seed=1))}) == 4
    assert order_of(1, WindowedOrder(BLOCKS, window_bytes)) == epochs[1]


@pytest.mark.parametrize(("window_bytes", "blocks"), [(1, 1), (100, 2), (175, 3), (10_000, 11)])
def test_a_window_holds_as_many_blocks_as_there_is_room_for(window_bytes, blocks):
    order = WindowedOrder(BLOCKS, window_bytes)
    windows = order.windows(0, 0)
    assert max(len(window.blocks) for window in windows) == blocks
    assert all(len(w.blocks) == 1 or sum(b.num_bytes for b in w.blocks) <= window_bytes for w in windows)
    stops = [*(window.start for window in windows[1:]), 57]
    places = order_of(0, order)
    for window, stop in zip(windows, stops, strict=True):
        inside = {row for block in window.blocks for row in range(block.start, block.stop)}
        assert set(places[window.start : stop]) == inside


def test_rows_are_shuffled_over_the_whole_window():
    """Of neighbours in the order, as many come from one block as of a permutation by chance."""
    order = WindowedOrder(tuple(Block(start, start + 100, 1) for start in range(0, 10_000, 100)), 20)
    places = [index // 100 for index in order_of(0, order)]
    same = sum(one == other for one, other in itertools.pairwise(places)) / 9999
    assert same == pytest.approx(99 / 1999, abs=0.01)  # windows of 20 blocks
    assert len(set(places[:2000])) == 20


# --- rows ----------------------------------------------------------------------------------------------------------


def test_blocks_are_row_groups(shards, tmp_path):
    rows = load(shards, tmp_path).images.rows
    assert [(block.start, block.stop) for block in rows.blocks] == [
        *((0, 4), (4, 8), (8, 12), (12, 16)),
        *((16, 20), (20, 24), (24, 28), (28, NUM)),
    ]
    assert len(rows) == NUM


def test_every_row_and_label_is_what_it_is_in_memory(shards, tmp_path):
    streamed = load(shards, tmp_path, class_conditional=True)
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    config = TrainingConfig(dataset_name=str(shards), cache_dir=str(tmp_path / "memory"), class_conditional=True)
    whole = data.load_data(config, None, None)
    assert list((tmp_path / "memory").rglob("*.arrow"))  # so the look for a copy can fail
    assert isinstance(whole.images, torch.Tensor) and isinstance(streamed.images, data.DecodedOnDemand)
    assert all(torch.equal(streamed.images[index], whole.images[index]) for index in range(NUM))
    assert torch.equal(streamed.labels.of_images, whole.labels.of_images) and streamed.labels.names == CLASSES
    assert streamed.describe(config)["streaming"] is True and "streaming" not in whole.describe(config)


def reads(rows, monkeypatch):
    """The numbers of the blocks as they are read."""
    seen, read = [], rows.read
    monkeypatch.setattr(rows, "read", lambda number: seen.append(number) or read(number))
    return seen


@pytest.mark.usefixtures("small_window")
def test_an_epoch_reads_each_block_once_and_keeps_few(shards, tmp_path, monkeypatch):
    loaded = load(shards, tmp_path)
    rows = loaded.images.rows
    rows.kept.clear()
    seen, most = reads(rows, monkeypatch), 0
    for position in range(NUM):
        loaded.images[loaded.index_at(0, position)]
        most = max(most, len(rows.kept))
    assert sorted(seen) == list(range(8)) and most == 2
    assert max(len(window.blocks) for window in loaded.order.windows(0, 0)) == 2


@pytest.mark.usefixtures("small_window")
def test_going_on_in_the_middle_reads_nothing_of_before(shards, tmp_path, monkeypatch):
    loaded = load(shards, tmp_path)
    rows = loaded.images.rows
    rows.kept.clear()
    seen = reads(rows, monkeypatch)
    last = loaded.order.windows(0, 0)[-1]
    loaded.images[loaded.index_at(0, last.start)]
    assert len(seen) == 1 and rows.blocks[seen[0]] in last.blocks


def test_the_largest_block_is_always_kept():
    rows = sources.StreamedRows(None, (Block(0, 2, 10), Block(2, 4, 100)), 20)
    tables = [pyarrow.table({"image": [b"a", b"b"]}), pyarrow.table({"image": [b"c", b"d"]})]
    rows.read = tables.__getitem__
    assert [rows[index]["image"] for index in (0, 1)] == [b"a", b"b"] and list(rows.kept) == [0]
    assert [rows[index]["image"] for index in (2, 3)] == [b"c", b"d"] and list(rows.kept) == [1]


def test_some_rows_are_looked_at_in_few_blocks():
    blocks = tuple(Block(start, start + 10, 1) for start in range(0, 1000, 10))
    rows = sources.StreamedRows(None, blocks, 20)
    assert len({row // 10 for row in rows.evenly(4)}) == 4
    some = rows.evenly(100)
    assert len(some) == 100 == len(set(some)) and some == sorted(some)
    touched = {row // 10 for row in some}
    assert len(touched) == 16 and {0, 99} <= touched  # 4 blocks and 8 hold too few
    assert rows.evenly(5000) == list(range(1000))


def test_a_set_that_changes_under_the_run_is_told(tmp_path):
    folder = write_shards(tmp_path / "data")
    loaded = load(folder, tmp_path)
    loaded.images.rows.kept.clear()
    file = folder / "train-00001-of-00003.parquet"
    table = pyarrow.parquet.read_table(file)
    pyarrow.parquet.write_table(table.slice(0, 3), file)
    with pytest.raises(ValueError, match=r"rows 12 to 15 of the data set are now 3 rows: it was changed"):
        loaded.images[12]


class Broken:
    """A stream that cannot be read."""

    num_shards = 1

    def shard(self, *_):
        raise ConnectionError("the connection was dropped")


def test_a_connection_that_drops_is_no_damage():
    with pytest.raises(ConnectionError, match=r"^the connection was dropped$"):
        sources.StreamedRows(Broken(), (Block(0, 2, 10),), 20, local=False)[0]
    with pytest.raises(ValueError, match=r"rows 0 to 1 of the data set cannot be read as a block: .* It is damaged"):
        sources.StreamedRows(Broken(), (Block(0, 2, 10),), 20)[0]


@pytest.mark.parametrize(("shard", "numbers"), [(0, range(100, 112)), (1, range(12, 15))])
def test_a_stream_is_known_by_its_blocks_and_images(shards, tmp_path, shard, numbers):
    other = write_shards(tmp_path / "other")
    assert load(shards, tmp_path).fingerprint == load(other, tmp_path).fingerprint
    table = pyarrow.Table.from_pydict(rows_of(numbers), schema=FEATURES.arrow_schema)
    pyarrow.parquet.write_table(table, other / f"train-{shard:05d}-of-00003.parquet", row_group_size=4)
    assert load(shards, tmp_path).fingerprint != load(other, tmp_path).fingerprint


def test_other_splits(tmp_path):
    folder = write_shards(tmp_path / "data")
    table = pyarrow.Table.from_pydict(rows_of([50]), schema=FEATURES.arrow_schema)
    pyarrow.parquet.write_table(table, folder / "test-00000-of-00001.parquet")
    config = TrainingConfig(dataset_name=str(folder), streaming=True, cache_dir=str(tmp_path / "cache"))
    assert [len(data.load_data(config, None, None, split).images) for split in ("train", "test")] == [NUM, 1]
    with pytest.raises(ValueError, match=r"has no split 'validation'; it has train, test"):
        data.load_data(config, None, None, "validation")


# --- other forms ---------------------------------------------------------------------------------------------------


def test_a_single_parquet_file_and_the_embedded_data(inputs, tmp_path):
    assert len(load(inputs.parquet, tmp_path).images) == 22
    embedded = data.load_data(TrainingConfig(streaming=True, cache_dir=str(tmp_path)), None, None)
    assert (len(embedded.images), embedded.resolution) == (10_000, 28)


def test_tar_files_are_read_through_once(tmp_path):
    folder = tmp_path / "tars"
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as tar:
            for number in range(3 + shard):
                encoded = encode(picture("RGB", seed=10 * shard + number))
                entry = tarfile.TarInfo(f"{shard}{number}.png")
                entry.size = len(encoded)
                tar.addfile(entry, io.BytesIO(encoded))
    loaded = load(folder, tmp_path)
    assert [(block.start, block.stop) for block in loaded.images.rows.blocks] == [(0, 3), (3, 7)]
    expected = [picture("RGB", seed=seed) for seed in (0, 1, 2, 10, 11, 12, 13)]
    got = [loaded.images[index].permute(1, 2, 0).numpy().tobytes() for index in range(7)]
    assert got == [image.tobytes() for image in expected]


def test_a_folder_of_images_in_classes(tmp_path):
    for name, seeds in {"bags": (2, 3, 4), "shoes": (0, 1)}.items():
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for seed in seeds:
            picture(seed=seed).save(tmp_path / "pictures" / name / f"{seed}.png")
    loaded = load(tmp_path / "pictures", tmp_path, class_conditional=True)
    assert loaded.labels.names == ("bags", "shoes") and loaded.labels.of_images.tolist() == [0, 0, 0, 1, 1]
    assert loaded.images[3].numpy().tobytes() == picture(seed=0).tobytes()


def test_what_cannot_be_streamed_is_refused(tmp_path):
    datasets.Dataset.from_dict(rows_of([0]), features=FEATURES).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="save_to_disk and is read row by row as it is: leave out --streaming"):
        load(tmp_path / "saved", tmp_path)
    with pytest.raises(ValueError, match="streaming is of a dataset_name"):
        TrainingConfig(streaming=True, train_data_dir=str(tmp_path), model={}).validate()
    with pytest.raises(ValueError, match="shuffle_window_mb must be at least 1, got 0"):
        TrainingConfig(shuffle_window_mb=0, model={}).validate()
    empty = pyarrow.Table.from_pydict(rows_of([]), schema=FEATURES.arrow_schema)
    pyarrow.parquet.write_table(empty, tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="holds no images"):
        load(tmp_path / "empty.parquet", tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"n": [1]}), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="no column of the data set holds images; its columns: n"):
        load(tmp_path / "none.parquet", tmp_path)


def test_images_that_cannot_be_read(tmp_path):
    images = [picture(seed=seed) for seed in range(5)]
    path = write_parquet(tmp_path / "set.parquet", [*images, b"no image"])
    with pytest.raises(BadImages, match="image 5 cannot be read"):
        load(path, tmp_path)
    stream = data.ImageStream(load(path, tmp_path, skip_bad_images=True), 0, True, False, skip_bad_images=True)
    batch = stream.__getitems__(range(6))
    assert [message.split(" cannot")[0] for message in batch.unreadable] == ["image 5"]


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_window")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumes_exactly(inputs, shards, tmp_path, workers):
    flags = ("--dataset_name", shards, "--streaming", "--dataloader_num_workers", workers, "--class_conditional")
    flags += ("--cache_dir", tmp_path / "cache")
    whole = run_main(inputs, tmp_path / "whole", *flags, "--checkpointing_steps", 5)
    start = whole / "checkpoints" / "step_00000005"
    resumed = run_main(
        inputs, tmp_path / "resumed", *flags, "--resume_from_checkpoint", start, "--checkpointing_steps", 5
    )
    assert_equal(checkpoint_tensors(resumed), checkpoint_tensors(whole))
    assert json.loads((whole / "results.json").read_text())["dataset"]["streaming"] is True
    with pytest.raises(Exception, match="shuffle_window_mb"):
        run_main(inputs, tmp_path / "resumed", *flags, "--max_train_steps", STEPS + 1, "--shuffle_window_mb", 3)


@pytest.mark.full
def test_evaluations_on_the_way_read_the_stream(inputs, shards, tmp_path):
    flags = ("--dataset_name", shards, "--cache_dir", tmp_path / "cache", "--max_train_steps", 1)
    flags += ("--eval_steps", 1, "--eval_num_images", 20, "--log_steps", 1)
    evaluations = [
        json.loads((run_main(inputs, tmp_path / kind, *flags, f"--streaming={kind}") / "results.json").read_text())
        for kind in ("true", "false")
    ]
    ours, whole = (results["evaluations"][0]["kernel_distance"] for results in evaluations)
    assert ours != whole and ours == pytest.approx(whole, rel=0.2)  # of other images: the order is another one


def test_large_photographs_are_decoded_by_the_workers(tmp_path):
    """JPEG of 256x256 pixels and of 300x256, which are cropped at the centre."""
    sizes = [(256, 256), (300, 256)] * 3
    files, expected = [], []
    for number, size in enumerate(sizes):
        buffer = io.BytesIO()
        picture("RGB", size, seed=number).save(buffer, "JPEG")
        files.append(buffer.getvalue())
        left = (size[0] - 256) // 2
        expected.append(np.asarray(Image.open(buffer))[:, left : left + 256])
    path = write_parquet(tmp_path / "photographs.parquet", files)
    loaded = load(path, tmp_path, resolution=256)
    stream = data.ImageStream(loaded, 0, center_crop=True, random_flip=False)
    batches = data.StreamBatches(range(3), rank=0, world_size=1, batch_size=2)
    found = torch.cat([batch.images for batch in data.build_loader(stream, batches, 2, False)])
    order = [loaded.index_at(0, position) for position in range(6)]
    assert found.shape == (6, 3, 256, 256) and sorted(order) == list(range(6))
    for image, index in zip(found, order, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected[index])


@pytest.mark.usefixtures("small_window")
def test_workers_change_nothing(shards, tmp_path):
    stream = data.ImageStream(load(shards, tmp_path), 0, center_crop=False, random_flip=True)
    batches = data.StreamBatches(range(3, 20), rank=0, world_size=1, batch_size=4)
    loaders = [data.build_loader(stream, batches, workers, False) for workers in (0, 2)]
    pairs = list(zip(*loaders, strict=True))
    assert len(pairs) == 17 and all(torch.equal(one.images, other.images) for one, other in pairs)
    assert pairs[0][0].images.shape == (4, 1, SIZE, SIZE)
