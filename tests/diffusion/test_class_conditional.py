"""Class-conditional training: the labels, how some are dropped, and the model that comes of them."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import train as script
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler, ScratchUNet2DModel
from ddpm_from_scratch.data import dataset as data
from ddpm_from_scratch.data.labels import find_label_column, read_labels
from ddpm_from_scratch.runtime import random_streams as draws
from ddpm_from_scratch.training.config import TrainingConfig
from helpers.runs import (
    BATCH,
    NUM_IMAGES,
    SIZE,
    STEPS,
    TINY,
    assert_equal,
    checkpoint_tensors,
    picture,
    run_main,
    stratified_timesteps,
)

GENERATOR = draws.DRAWS["generator"]
NAMES = ("bag", "shoe", "coat")
NULL = len(NAMES)
DROPOUT = 0.25
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
# Fashion-MNIST's classes, as in its authors' table.
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]

LABELS = [int(label) for label in np.random.default_rng(4).integers(0, len(NAMES), NUM_IMAGES)]
IMAGE, CLASSES = datasets.Image(), datasets.ClassLabel(names=list(NAMES))
TEXT, NUMBER = datasets.Value("string"), datasets.Value("int64")


def flat_picture(label):
    """An image that tells its label: all its pixels are 100 times that."""
    buffer = io.BytesIO()
    Image.new("L", (SIZE, SIZE), 100 * label).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def label_of(image):
    return image.flatten(1)[:, 0].long() // 100


def write_set(path, kind=CLASSES, labels=LABELS, **columns):
    """A parquet file of flat pictures with the column `kind` of labels, and others."""
    features = datasets.Features({"picture": IMAGE, "kind": kind, **dict.fromkeys(columns, TEXT)})
    rows = {"picture": [flat_picture(label) for label in LABELS], "kind": labels, **columns}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The tiny preset with labels, and its data set, whose column `shade` could hold labels too."""
    folder = tmp_path_factory.mktemp("inputs")
    parquet = write_set(folder / "tiny.parquet", shade=[str(label // 2) for label in LABELS])
    preset = folder / "tiny.yaml"
    conditional = {"class_conditional": True, "label_dropout": DROPOUT, "dataset_name": parquet}
    preset.write_text(yaml.safe_dump({**TINY, **conditional}))
    return SimpleNamespace(folder=folder, preset=str(preset), parquet=parquet)


@pytest.fixture(scope="module")
def whole_run(inputs, tmp_path_factory):
    """An uninterrupted run with a checkpoint after each step."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    AcceleratorState._reset_state(reset_partial_state=True)
    script.main([inputs.preset, "--output_dir", str(folder), "--checkpointing_steps", "1"])
    return folder


def load(path, **options):
    return data.load_data(TrainingConfig(dataset_name=path, class_conditional=True, **options), None, None)


# The column


@pytest.mark.parametrize(
    ("columns", "wanted", "found"),
    [
        ({"image": IMAGE, "label": CLASSES}, None, "label"),
        ({"image": IMAGE, "digit": CLASSES, "label": TEXT}, None, "digit"),  # named classes go first
        ({"label": NUMBER, "image": IMAGE}, None, "label"),
        ({"image": IMAGE, "labels": datasets.Value("large_string")}, None, "labels"),
        ({"image": IMAGE, "caption": TEXT, "class": TEXT}, None, "class"),
        ({"image": IMAGE, "classes": datasets.Value("int8")}, None, "classes"),
        ({"image": IMAGE, "label": datasets.Value("float32"), "category": TEXT}, None, "category"),
        ({"image": IMAGE, "label": datasets.List(CLASSES), "target": datasets.Value("uint8")}, None, "target"),
        ({"img": IMAGE, "fine_label": CLASSES, "coarse_label": CLASSES}, "coarse_label", "coarse_label"),
        ({"image": IMAGE, "label": CLASSES, "shade": TEXT}, "shade", "shade"),
    ],
)
def test_label_column(columns, wanted, found):
    assert find_label_column(datasets.Features(columns), wanted) == found


@pytest.mark.parametrize(
    ("columns", "wanted", "message"),
    [
        (
            {"img": IMAGE, "fine_label": CLASSES, "coarse_label": CLASSES},  # CIFAR-100
            None,
            "fine_label, coarse_label all hold labels: choose one with --label_column",
        ),
        ({"image": IMAGE, "category": TEXT, "class": NUMBER}, None, "class, category all hold labels"),
        ({"image": IMAGE, "caption": TEXT}, None, "holds labels; its columns: image, caption. Name one with --label_c"),
        ({"image": IMAGE, "label": datasets.Value("float32")}, None, "no column of the data set holds labels"),
        ({"image": IMAGE, "fine_label": CLASSES}, "fine_labl", "'fine_labl'; did you mean 'fine_label'?; its columns"),
        ({"image": IMAGE, "label": CLASSES}, "image", "must hold classes, strings or whole numbers, got Image"),
        ({"image": IMAGE, "size": datasets.Value("float32")}, "size", "got Value('float32')"),
    ],
)
def test_label_columns_that_are_refused(columns, wanted, message):
    with pytest.raises(ValueError) as raised:
        find_label_column(datasets.Features(columns), wanted)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "values", "names", "labels"),
    [
        (CLASSES, [2, 0, 2, 0], NAMES, [2, 0, 2, 0]),  # one class has no image
        (TEXT, ["shoe", "Bag", "shoe", "coat"], ("Bag", "coat", "shoe"), [2, 0, 2, 1]),
        (NUMBER, [3, 0, 0, 1], ("0", "1", "2", "3"), [3, 0, 0, 1]),
        (datasets.Value("uint8"), [1, 0, 0, 1], ("0", "1"), [1, 0, 0, 1]),
    ],
)
def test_labels_and_names(kind, values, names, labels):
    read = read_labels(kind, "kind", values)
    assert (read.column, read.names, read.of_images.tolist()) == ("kind", names, labels)
    assert read.of_images.dtype == torch.long
    assert (read.null, read.num_class_embeds) == (len(names), len(names) + 1)
    shuffled = read_labels(kind, "kind", [values[i] for i in (3, 1, 0, 2)])
    assert shuffled.of_images.tolist() == [labels[i] for i in (3, 1, 0, 2)]


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (CLASSES, [0, 1, -1, 2], "row 2 of the data set has no label: kind is -1"),  # as `datasets` marks test sets
        (CLASSES, [0, None], "row 1 of the data set has no label: kind is None"),
        (TEXT, [None, "shoe"], "row 0 of the data set has no label: kind is None"),
        (NUMBER, [1, 0, -7], "row 2 of the data set has no label: kind is -7"),
        (NUMBER, [0, 1999, 1, 2], "row 1 of the data set has the label 1999 in column 'kind', which is too large"),
    ],
)
def test_labels_that_are_refused(kind, values, message):
    with pytest.raises(ValueError, match=message):
        read_labels(kind, "kind", values)


def test_a_label_beyond_the_named_classes_is_refused():
    with pytest.raises(ValueError, match=r"row 1 .* the label 3 in column 'kind', which is too large: .* at most 3"):
        read_labels(CLASSES, "kind", [0, 3])


def test_subfolders_are_classes(tmp_path):
    for name, seeds in {"shoes": (0, 1), "bags": (2, 3, 4)}.items():
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for seed in seeds:
            picture(seed=seed).save(tmp_path / "pictures" / name / f"{seed}.png")
    options = {"class_conditional": True, "cache_dir": str(tmp_path / "cache")}
    loaded = data.load_data(TrainingConfig(train_data_dir=str(tmp_path / "pictures"), **options), None, None)
    assert loaded.labels.names == ("bags", "shoes") and len(loaded.images) == 5
    for image, label in zip(loaded.images, loaded.labels.of_images.tolist(), strict=True):
        bags = [np.array_equal(image[0], np.asarray(picture(seed=seed))) for seed in (2, 3, 4)]
        assert any(bags) == (label == 0)
    with pytest.raises(ValueError, match=r"its columns: image.*a subfolder for each class"):
        data.load_data(TrainingConfig(train_data_dir=str(tmp_path / "pictures" / "bags"), **options), None, None)


def test_fingerprint_covers_the_labels_where_they_are_used(tmp_path):
    one = write_set(tmp_path / "one.parquet")
    other = write_set(tmp_path / "other.parquet", labels=LABELS[::-1])
    assert load(one).fingerprint != load(other).fingerprint
    numbers = write_set(tmp_path / "numbers.parquet", kind=NUMBER)
    assert load(one).fingerprint == load(numbers, label_column="kind").fingerprint
    unconditional = [data.load_data(TrainingConfig(dataset_name=path), None, None) for path in (one, other)]
    assert unconditional[0].fingerprint == unconditional[1].fingerprint != load(one).fingerprint
    assert unconditional[0].labels is None


# Label dropout


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_labels_are_dropped_at_their_rate(rate):
    count = 10_000
    dropped = draws.dropped_labels(GENERATOR, 0, torch.arange(count), rate)
    assert abs(int(dropped.sum()) - rate * count) < 4.5 * (rate * (1 - rate) * count) ** 0.5
    both = int((dropped[1:] & dropped[:-1]).sum())  # neighbours are independent
    assert abs(both - rate**2 * count) < 6 * (rate**2 * count) ** 0.5
    augment = torch.stack([torch.rand(3, generator=draws.generator(0, "augment", p)) for p in range(count)]) < rate
    both = (dropped[:, None] & augment).sum(0)  # so are label, crop and flip
    assert ((both - rate**2 * count).abs() < 6 * (rate**2 * count) ** 0.5).all()


def test_whether_a_label_is_dropped_follows_from_seed_and_position():
    dropped = draws.dropped_labels(GENERATOR, 0, torch.arange(200), 0.5)
    assert torch.equal(draws.dropped_labels(GENERATOR, 0, torch.tensor([150, 3, 77]), 0.5), dropped[[150, 3, 77]])
    assert not torch.equal(draws.dropped_labels(GENERATOR, 1, torch.arange(200), 0.5), dropped)
    assert not draws.dropped_labels(GENERATOR, 0, torch.arange(200), 0.0).any()
    assert (
        dropped | ~draws.dropped_labels(GENERATOR, 0, torch.arange(200), 0.3)
    ).all()  # a higher rate drops more, and these too


def test_stream_gives_the_labels_of_its_images(inputs):
    stream = data.ImageStream(load(inputs.parquet), 0, center_crop=False, random_flip=True, label_dropout=DROPOUT)
    count = 2000  # many epochs
    images, labels, *_ = stream.__getitems__(range(count))
    dropped = labels == NULL
    assert abs(int(dropped.sum()) - DROPOUT * count) < 4.5 * (DROPOUT * (1 - DROPOUT) * count) ** 0.5
    assert torch.equal(labels[~dropped], label_of(images)[~dropped])
    assert set(label_of(images)[dropped].tolist()) == set(range(NULL))  # every class loses its label at times
    stream = data.ImageStream(load(inputs.parquet), 0, center_crop=False, random_flip=True)
    undropped = stream.__getitems__(range(count)).labels
    assert torch.equal(undropped, label_of(images))


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (4, 2)])
def test_processes_together_see_the_rows_of_one(inputs, world_size, workers):
    stream = data.ImageStream(load(inputs.parquet), 0, center_crop=False, random_flip=True, label_dropout=DROPOUT)

    def batches(rank, processes):
        positions = data.StreamBatches(range(2, 8), rank, processes, 8 // processes)
        return list(data.build_loader(stream, positions, workers, False))

    for whole, *parts in zip(batches(0, 1), *(batches(r, world_size) for r in range(world_size)), strict=True):
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)


def test_network_is_told_the_labels_of_the_images_it_sees(inputs, tmp_path, monkeypatch):
    shown, told = [], []
    add_noise, forward = ScratchDDPMScheduler.add_noise, ScratchUNet2DModel.forward

    def spied_add_noise(self, x_0, noise, t):
        shown.append(((x_0 + 1) * 127.5).round())
        return add_noise(self, x_0, noise, t)

    def spied_forward(self, *args, class_labels=None, **kwargs):
        if self.training:
            told.append(class_labels)
        return forward(self, *args, class_labels=class_labels, **kwargs)

    monkeypatch.setattr(ScratchDDPMScheduler, "add_noise", spied_add_noise)
    monkeypatch.setattr(ScratchUNet2DModel, "forward", spied_forward)
    run_main(inputs, tmp_path / "model", "--train_batch_size", "2", "--gradient_accumulation_steps", "2")
    expected, told = label_of(torch.cat(shown)), torch.cat(told)
    expected[draws.dropped_labels(GENERATOR, 0, torch.arange(STEPS * BATCH), DROPOUT)] = NULL
    assert len(told) == STEPS * BATCH and torch.equal(told, expected)
    assert set(told.tolist()) == {*range(NULL), NULL}


# Resume


@pytest.mark.parametrize(("step", "workers"), [(1, 2), (7, 0)])
def test_resumed_run_equals_whole_run_bit_for_bit(inputs, whole_run, tmp_path, step, workers):
    start = whole_run / "checkpoints" / f"step_{step:08d}"
    flags = ("--resume_from_checkpoint", start, "--dataloader_num_workers", workers, "--checkpointing_steps", STEPS)
    resumed = run_main(inputs, tmp_path / "model", *flags)
    assert_equal(checkpoint_tensors(resumed), checkpoint_tensors(whole_run))


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (("--label_dropout", "0.2"), "label_dropout: 0.25 in the checkpoint, 0.2 now"),
        (("--label_column", "shade"), "label_column: 'kind' in the checkpoint, 'shade' now"),
        (("--class_conditional", "false"), "class_conditional: True in the checkpoint, None now"),
        (("--dataset_name", "renamed.parquet"), "class_names: ['bag', 'shoe', 'coat'] in the checkpoint, ['a', 'b',"),
        (("--dataset_name", "relabelled.parquet"), "fingerprint"),
    ],
)
def test_resume_refuses_other_labels(inputs, whole_run, tmp_path, monkeypatch, flags, field):
    monkeypatch.chdir(tmp_path)
    write_set("renamed.parquet", kind=datasets.ClassLabel(names=["a", "b", "c"]))
    write_set("relabelled.parquet", labels=LABELS[::-1])
    with pytest.raises(ValueError) as raised:
        run_main(inputs, "model", "--resume_from_checkpoint", whole_run / "checkpoints/step_00000004", *flags)
    assert field in str(raised.value)
    assert not Path("model").exists()


# Wrong calls

WRONG_CALLS = [
    (("--class_conditional", "false", "--label_column", "kind"), "label_column 'kind' needs --class_conditional"),
    (("--label_dropout", "1"), "label_dropout must be in [0, 1), got 1"),
    (("--label_dropout", "0"), "label_dropout 0 would leave the null label untrained"),
    (("--label_dropout", "-0.1"), "label_dropout must be in [0, 1), got -0.1"),
    (("--label_dropout", "nan"), "label_dropout"),
    (("--label_column", "kid"), "no label_column 'kid'; did you mean 'kind'?; its columns: picture, kind, shade"),
    (("--label_column", "picture"), "must hold classes, strings or whole numbers"),
    (("--model.num_class_embeds", "3"), "num_class_embeds 3, but the 3 classes in column 'kind' and the null label"),
    (("--model.num_class_embeds", "4", "--class_conditional", "false"), "train it with --class_conditional"),
    (("--model.class_embed_type", "timestep"), "class_embed_type must be left out, got 'timestep'"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG_CALLS, ids=[" ".join(flags) for flags, _ in WRONG_CALLS])
def test_wrong_calls_say_what_is_wrong_and_write_nothing(inputs, tmp_path, monkeypatch, capfd, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, SystemExit)) as raised:
        run_main(inputs, "model", *flags)
    explanation = capfd.readouterr().err if raised.type is SystemExit else str(raised.value)
    assert message in explanation
    assert list(tmp_path.iterdir()) == []


# A whole run


def test_model_folder_and_results_tell_the_classes(whole_run):
    pipeline = ScratchDDPMPipeline.from_pretrained(whole_run)
    assert pipeline.unet.config.num_class_embeds == NULL + 1
    assert pipeline.config.id2label == {0: "bag", 1: "shoe", 2: "coat"}
    told = json.loads((whole_run / "results.json").read_text())["dataset"]
    assert told["class_names"] == list(NAMES) and told["num_classes"] == 3
    assert told["label_column"] == "kind" and told["label_dropout"] == DROPOUT


@pytest.mark.full
def test_fashion_mnist_end_to_end(tmp_path):
    preset = tmp_path / "tiny.yaml"
    preset.write_text(yaml.safe_dump({**TINY, "max_train_steps": 2}))
    folder = script.main([str(preset), "--class_conditional", "--output_dir", str(tmp_path / "model")])
    pipeline = ScratchDDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config.id2label == dict(enumerate(FASHION))

    def sample(class_labels, **options):
        generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        options = {"generator": generator, "num_inference_steps": 2, "output_type": "pt", **options}
        return pipeline(class_labels=class_labels, **options).images

    by_name = sample(["Sandal", "Bag"])
    assert by_name.shape == (2, 1, 28, 28)
    assert torch.equal(by_name, sample([5, 8]))
    assert not torch.equal(by_name, sample(["Bag", "Sandal"]))
    assert torch.equal(sample(None, batch_size=2), sample([10, 10]))  # the null label is the last
    assert not torch.equal(by_name, sample(["Sandal", "Bag"], guidance_scale=3.0))


@pytest.mark.full
def test_network_learns_what_the_labels_mean(inputs, tmp_path):
    """From noise alone it predicts the gray of the class that it is told, and of none the mean over all images."""
    flags = ("--prediction_type", "sample", "--max_train_steps", "120", "--train_batch_size", "16")
    more = ("--learning_rate", "1e-2", "--use_ema", "false", "--model.dropout", "0", "--label_dropout", "0.4")
    folder = run_main(inputs, tmp_path / "model", *flags, *more)
    unet = ScratchUNet2DModel.from_pretrained(folder / "unet")
    noise = torch.randn(32, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        grays = [unet(noise, 999, class_labels=torch.full((32,), label)).sample.mean().item() for label in range(4)]
    expected = [100 * label / 127.5 - 1 for label in (0, 1, 2, np.mean(LABELS))]
    assert grays == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize(("conditional", "labels"), [("true", [0, 1, 2, 0, 1, 2, 0]), ("false", None)])
def test_grids_go_through_the_classes_in_turn(inputs, tmp_path, monkeypatch, conditional, labels):
    asked = []
    call = ScratchDDPMPipeline.__call__

    def spied_call(self, *args, **kwargs):
        asked.append(kwargs.get("class_labels"))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(ScratchDDPMPipeline, "__call__", spied_call)
    flags = ("--eval_batch_size", "7", "--sample_steps", "1", "--max_train_steps", "1")
    run_main(inputs, tmp_path / "model", *flags, "--class_conditional", conditional)
    assert asked == [labels, labels]  # during the run, and at its end


def test_dry_run_tells_the_classes(inputs, tmp_path, capsys):
    facts = ("label_column: kind", "label_dropout: 0.25", "num_classes: 3", "class_names: ['bag', 'shoe', 'coat']")
    run_main(inputs, tmp_path / "model", "--dry_run")
    told = capsys.readouterr().out.split("training images:")[1]
    assert all(fact in told for fact in facts)
    run_main(inputs, tmp_path / "model", "--dry_run", "--class_conditional", "false")
    told = capsys.readouterr().out.split("training images:")[1]
    assert "label" not in told and "class" not in told


def test_unconditional_run_is_algorithm_1_without_labels(inputs, tmp_path):
    """The weights of a loop by hand that knows of no labels, bit for bit."""
    flags = ("--class_conditional", "false", "--use_ema", "false", "--max_train_steps", "3", "--model.dropout", "0")
    folder = run_main(inputs, tmp_path / "model", *flags, "--lr_scheduler", "constant")
    torch.manual_seed(draws.derived_seed(0, "weights"))
    form = {"in_channels": 1, "out_channels": 1, "sample_size": SIZE}
    unet = ScratchUNet2DModel(**{**TINY["model"], **form, "dropout": 0.0})
    unet.to(memory_format=torch.channels_last)  # the order in which sums over weights run
    optimizer = torch.optim.AdamW(unet.parameters(), lr=TINY["learning_rate"], weight_decay=0.0, fused=True)
    scheduler = ScratchDDPMScheduler()
    for step in range(3):
        positions = range(step * BATCH, (step + 1) * BATCH)
        labels = [LABELS[draws.image_index(0, position, NUM_IMAGES)] for position in positions]
        x_0 = (100 * torch.tensor(labels).float() / 127.5 - 1).reshape(-1, 1, 1, 1).expand(-1, -1, SIZE, SIZE)
        noise = draws.noise_rows(0, torch.tensor(positions), (1, SIZE, SIZE))
        t = stratified_timesteps(0, step, BATCH, 1000)
        output = unet(scheduler.add_noise(x_0, noise, t), t).sample
        scheduler.simple_loss(output, x_0, noise, t).mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert_equal(load_file(folder / WEIGHTS), unet.state_dict())
    assert "id2label" not in json.loads((folder / "model_index.json").read_text())


# Fine-tuning


@pytest.mark.parametrize("part", [".", "unet", "unet/config.json"])
def test_fine_tuning_keeps_the_classes(inputs, whole_run, tmp_path, part):
    flags = ("--model_config_name_or_path", whole_run / part, "--learning_rate", "1e-30", "--max_train_steps", "1")
    tuned = run_main(inputs, tmp_path / "tuned", *flags)
    assert ScratchDDPMPipeline.from_pretrained(tuned).config.id2label == dict(enumerate(NAMES))
    if part == "unet/config.json":  # a new network of this form
        assert load_file(tuned / WEIGHTS).keys() == load_file(whole_run / WEIGHTS).keys()
    else:
        assert_equal(load_file(tuned / WEIGHTS), load_file(whole_run / WEIGHTS))


@pytest.mark.parametrize(
    ("part", "flags", "message"),
    [
        (".", ("--class_conditional", "false"), "is class-conditional: fine-tune it with --class_conditional"),
        ("unet", ("--class_conditional", "false"), "is class-conditional: fine-tune it with --class_conditional"),
        ("unet/config.json", ("--class_conditional", "false"), "train it with --class_conditional"),
        (".", ("--label_column", "shade"), "num_class_embeds 4, but the 2 classes in column 'shade'"),
        ("unet/config.json", ("--label_column", "shade"), "num_class_embeds 4, but the 2 classes in column 'shade'"),
        (".", ("--dataset_name", "renamed.parquet"), "1 is 'shoe' in the model and 'boot' in column 'kind'"),
    ],
)
def test_fine_tuning_refuses_other_classes(inputs, whole_run, tmp_path, monkeypatch, part, flags, message):
    monkeypatch.chdir(tmp_path)
    write_set("renamed.parquet", kind=datasets.ClassLabel(names=["bag", "boot", "coat"]))
    with pytest.raises(ValueError, match=message):
        run_main(inputs, "model", "--model_config_name_or_path", whole_run / part, *flags)
    assert not Path("model").exists()
