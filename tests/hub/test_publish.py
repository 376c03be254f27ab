"""The model's page: every number from the results, nothing empty, nothing broken, nothing invented; and the command."""

import copy
import json
import math
import re
from html.parser import HTMLParser

import pytest
import yaml
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel, UniPCMultistepScheduler
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.diffusion.pipeline import _sources, one_file
from ddpm_from_scratch.hub import model_card, publish, space
from ddpm_from_scratch.hub.model_card import eval_results, model_page, rounded
from ddpm_from_scratch.training.config import TrainingConfig
from helpers.networks import TINY_NETWORK
from helpers.paths import ROOT

SHIPPED = ROOT / "models" / "ddpm-fashion-mnist"
RESULTS = json.loads((SHIPPED / "results.json").read_text())
RESULTS = {name: value for name, value in RESULTS.items() if name != "comparison"}
RESULTS["evaluation"] = {name: value for name, value in RESULTS["evaluation"].items() if name != "classes"}
RESULTS["evaluation"]["samples"] = RESULTS["evaluation"]["samples"][:1]
RESULTS["evaluation"]["samples"][0] |= {"num_generated": 1000, "num_inference_steps": 50}
DATASET = "zalando-datasets/fashion_mnist"
NAMES = dict(enumerate(["T-shirt/top", "Sneaker", "Bag", "Dress"]))
PICTURES = ("samples.png", "usage.png", "neighbors.png", "bound.png", "loss.png")
SECTIONS = ["Use", "Training data", "Training", "Evaluation", "Limits and bias", "Hardware and energy"]
SECTIONS += ["Train it again", "Citation"]


def save(folder, classes=None, **network):
    unet = UNet2DModel(**{**TINY_NETWORK, **network}, num_class_embeds=5 if classes else None)
    ScratchDDPMPipeline(unet, DDPMScheduler(), id2label=classes).save_pretrained(folder)
    return folder


def document(folder, results=RESULTS, pictures=PICTURES, **config):
    """Put beside a model what a run and its evaluation leave."""
    (folder / "results.json").write_text(json.dumps(results))
    values = TrainingConfig(**{"dataset_name": DATASET, **config}).to_dict()
    (folder / "training_config.yaml").write_text("# versions\n" + yaml.safe_dump(values))
    for picture in pictures:
        Image.new("L", (8, 8)).save(folder / picture)
    return folder


def page_of(folder, repository="user/clothes", datasets=(DATASET,), **options):
    pipeline = ScratchDDPMPipeline.from_pretrained(folder)
    return model_page(pipeline, folder, repository, publish.TEMPLATE, datasets=datasets, **options)


class Parts(HTMLParser):
    """Headings, each with whether anything follows before the next of its rank; pictures, links and tables."""

    def __init__(self, markdown):
        super().__init__()
        self.headings, self.pictures, self.links, self.cells, self.content, self.tags = [], [], [], [], {}, []
        self.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        if tag == "img":
            self.pictures.append(values["src"])
            self.content[self.headings[-1]] = True
        if tag == "a":
            self.links.append(values["href"])
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        self.tags.pop()

    def handle_data(self, data):
        if not data.strip():
            return
        inside = self.tags[-1] if self.tags else ""
        if re.fullmatch("h[1-6]", inside):
            self.headings.append((inside, data))
            self.content.setdefault((inside, data), False)
        elif self.headings:
            self.content[self.headings[-1]] = True
        if "td" in self.tags:
            self.cells[-1] += data

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.tags.pop()


def sections(card):
    return [text for rank, text in Parts(card.content.split("---", 2)[2]).headings if rank == "h2"]


ODD_NAMES = dict(enumerate(['a "quoted" | name', "*cat* <b>", "back\\slash", "😀"]))
MODELS = {  # number of labels, their names, the scheduler
    "unconditional": (None, None, DDPMScheduler()),
    "named": (5, NAMES, DDPMScheduler()),
    "unnamed": (4, None, DDPMScheduler()),
    "no null label": (4, NAMES, DDPMScheduler()),
    "odd names": (5, ODD_NAMES, DDPMScheduler()),
    "few steps": (None, None, DDPMScheduler(num_train_timesteps=10)),
    "another scheduler": (None, None, DPMSolverMultistepScheduler()),
    "one without a generator": (None, None, UniPCMultistepScheduler()),
}


def save_one(folder, kind):
    count, names, scheduler = MODELS[kind]
    unet = UNet2DModel(**TINY_NETWORK, num_class_embeds=count)
    ScratchDDPMPipeline(unet, scheduler, id2label=names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["unconditional", "named", "unnamed"])
def full(request, tmp_path_factory):
    return document(save_one(tmp_path_factory.mktemp("full"), request.param))


def check_whole(card, folder):
    """No section is empty, no picture or local link leads nowhere, nothing was left to be filled in."""
    text = card.content
    parts = Parts(text.split("---", 2)[2])
    assert [heading for heading, filled in parts.content.items() if not filled and heading[0] != "h1"] == []
    local = [target for target in [*parts.pictures, *parts.links] if "://" not in target]
    assert [target for target in local if not (folder / target).is_file()] == []
    for leftover in ("None", "nan", "undefined", "Undefined", "{{", "}}", "{%", "%}"):
        assert leftover not in text.replace("nanometre", ""), leftover
    assert "\n\n\n" not in text.split("---", 2)[2]
    assert len(parts.pictures) == len(set(parts.pictures))
    return parts


# The page


def test_the_page_of_a_measured_model_has_every_section(full):
    card = page_of(full, usage_output="8 images", license="mit")
    parts = check_whole(card, full)
    assert sections(card) == SECTIONS
    assert sorted(parts.pictures) == sorted(PICTURES)
    assert '"user/clothes"' in card.content and "```text\n8 images\n```" in card.content
    for block in re.findall(r"```python\n(.*?)```", card.content, re.DOTALL):
        compile(block, "page", "exec")


def test_every_hyper_parameter_is_on_the_page(full):
    parts = Parts(page_of(full).content.split("---", 2)[2].split("## Evaluation")[0])
    config = yaml.safe_load((full / "training_config.yaml").read_text())
    for name, value in config.items():
        assert (name in parts.cells) == (value is not None), name
    assert "hub_token" not in config


def test_the_metadata_survive(full):
    card = page_of(full, license="mit")
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "unconditional-image-generation"
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    assert again.data.license == "mit" and again.data.datasets == [DATASET] and "ddpm" in again.data.tags
    results = eval_results(RESULTS["evaluation"], [DATASET])
    assert again.data.eval_results == results
    assert [entry["output"]["url"] for entry in again.data.widget] == ["samples.png"]


def test_each_number_of_the_metadata_is_rounded_and_has_its_own_error():
    """Written by hand from the numbers below; the error of a share of N images is √(p (1 - p) / N)."""
    sample = {"kernel_distance": 0.012658706, "kernel_distance_error": 0.001043126, "frechet_distance": 29.03}
    sample |= {"precision": 0.79, "recall": 0.2, "num_generated": 5000, "num_reference": 1600, "size": 112}
    bound = {"bits_per_dim": 3.20512, "error": 0.04567, "num_images": 10000}
    found = eval_results({"samples": [sample, {**sample, "size": 224}], "bound": bound}, [DATASET])
    assert [(one.metric_type, one.metric_value, one.metric_args) for one in found] == [
        ("kernel_distance", 0.0127, {"error": 0.001}),
        ("recall", 0.2, {"error": 0.01}),
        ("bits_per_dim", 3.205, {"error": 0.046}),
    ]
    assert all("112 px" in one.metric_name for one in found[:2])


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (1234.5, 67.8, (1234.0, 68.0)),
        (1234.5, 678.0, (1230.0, 680.0)),
        (0.98763, 0.00996, (0.9876, 0.01)),
        (-0.00063, 0.00302, (-0.0006, 0.003)),
        (0.123456, None, (0.123, None)),
        (0.123456, float("nan"), (0.123, None)),
        (0.123456, 0.0, (0.123, None)),
    ],
)
def test_a_number_is_rounded_by_its_error(value, error, expected):
    assert rounded(value, error) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("google/ddpm-cifar10-32", "google/ddpm-cifar10-32"),
        (None, None),
        ("unet.json", None),
        ("/models/mine", None),
        ("mine", None),  # what a published configuration says of a folder
    ],
)
def test_the_model_that_was_fine_tuned(tmp_path, name, expected):
    folder = document(save(tmp_path / "model"))
    base = publish.hub_base_model({"model_config_name_or_path": name})
    card = page_of(folder, base_model=base)
    assert base == card.data.base_model == expected
    check_whole(card, folder)
    assert (f"https://huggingface.co/{expected}" in card.content) == (expected is not None)


@pytest.mark.parametrize("again", [False, True])
def test_a_model_for_few_steps_names_its_teacher(tmp_path, again):
    unet = UNet2DModel(**TINY_NETWORK, num_class_embeds=5)
    scheduler = ScratchDDPMScheduler(prediction_type="v_prediction", eta=math.inf)
    ScratchDDPMPipeline(unet, scheduler, id2label=NAMES, num_inference_steps=2).save_pretrained(tmp_path)
    results = copy.deepcopy(RESULTS)
    (sample,) = results["evaluation"]["samples"]
    taught = [{**sample, "kernel_distance": 0.4321}, {**sample, "size": 224, "kernel_distance": 0.8765}]
    sample["num_inference_steps"] = 2
    results["teacher"] = {"name": "shoes", "samples": taught}
    if again:
        run = {"images_seen": 1234567, "seconds": 8, "device": "an abacus"}
        results["earlier_tunings"] = [run, {**run, "device": "another"}]
        results["weights"] = "the best of three"
    card = page_of(document(tmp_path, results, loss="consistency", model_config_name_or_path="models/shoes"))
    parts = check_whole(card, tmp_path)
    assert "draws in few steps, 2 by default" in card.content and "from shoes" in card.content
    runs = "in 3 runs, first with 1,234,567 images in 8 s on an abacus, then with 1,234,567 images in 8 s on another; "
    assert (f"from shoes {runs}" in card.content) == again
    assert ("Its weights are the best of three." in card.content) == again
    code = "".join(re.findall(r"```python\n(.*?)```", card.content, re.DOTALL))
    assert code.count("num_inference_steps=2,") == 2 and "guidance_scale" not in code and "eta" not in code
    row = parts.cells.index("shoes")
    assert parts.cells[row + 1 : row + 5] == ["50", "1,000", "efficientnet-lite0, 112 px", "0.4321 ± 0.0010"]
    assert not any("0.8765" in cell for cell in parts.cells)  # of another size than the model's own


def test_the_page_names_the_commit_of_the_run(tmp_path, monkeypatch):
    folder, commit = save(tmp_path / "model"), "0123abc" * 5
    assert commit not in page_of(document(folder)).content
    monkeypatch.setattr(model_card, "code_address", lambda: "https://example.org/code")
    again = page_of(document(folder, {**RESULTS, "commit": commit}))
    how = again.content.split("## Train it again")[1]
    assert commit in how and "(https://example.org/code)" in how


def test_another_measurement_is_another_page(tmp_path):
    """The figures of the page are those of the file, at their places."""
    folder, results = document(save(tmp_path / "model")), copy.deepcopy(RESULTS)
    sample = results["evaluation"]["samples"][0]
    sample.update(kernel_distance=0.7654, kernel_distance_error=0.0123, num_generated=4321, extractor="dinov2", size=99)
    sample["floor"].update(kernel_distance=-0.0456, kernel_distance_error=0.0043, precision=0.111)
    sample["memorization"].update(share_nearer=0.123, num_training=7777)
    results["evaluation"]["bound"].update(bits_per_dim=9.8765, error=0.4321, num_images=77, num_terms=55)
    results.update(seconds=7200.0, device="Abacus", steps=34567, images_seen=1234567)
    document(folder, results)
    card = page_of(folder)
    cells = Parts(card.content.split("---", 2)[2]).cells
    row = cells.index("0.7654 ± 0.0123")
    assert cells[row - 2 : row] == ["4,321", "dinov2, 99 px"] and "-0.0456 ± 0.0043" in cells and "0.111" in cells
    for text in (
        "9.877 ± 0.432 bits per dimension** on 77 held-out images of fashion_mnist_test.parquet, estimated",
        "estimated without bias from 55 of its 1000 terms for each image",
        "12.3 % of the images are nearer to one of 7,777 training images",
        "Trained on Abacus (1 process) for 2.00 hours",
        "| 34,567 |",
        "1,234,567",
    ):
        assert text in card.content, text
    before = RESULTS["evaluation"]
    for value in (before["samples"][0]["kernel_distance"], before["bound"]["bits_per_dim"]):
        assert f"{value:.3f}" not in card.content.split("## Evaluation")[1]


def test_several_numbers_of_steps_share_their_floor(tmp_path):
    """By size and number of images; in the Hub's metadata are the figures of the first number of steps alone."""
    results = copy.deepcopy(RESULTS)
    (sample,) = results["evaluation"]["samples"]
    kinds = [(50, 224, 900), (50, 112, 900), (1000, 112, 300), (10, 112, 900), (10, 224, 900)]
    results["evaluation"]["samples"] = [
        {**copy.deepcopy(sample), "num_inference_steps": steps, "size": size, "num_generated": count}
        for steps, size, count in kinds
    ]
    results["evaluation"]["samples"][2]["floor"]["recall"] = 0.123
    card = page_of(document(save(tmp_path / "model"), results))
    table = [
        line.split("|")[1:5]
        for line in card.content.splitlines()
        if line.startswith("|") and "efficientnet-lite0, " in line
    ]
    floor = f"floor ({sample['floor_of']})"
    assert [[cell.strip() for cell in line] for line in table] == [
        ["model", "10", "900", "efficientnet-lite0, 112 px"],
        ["model", "50", "900", "efficientnet-lite0, 112 px"],
        [floor, "", "900", "efficientnet-lite0, 112 px"],
        ["model", "1000", "300", "efficientnet-lite0, 112 px"],
        [floor, "", "300", "efficientnet-lite0, 112 px"],
        ["model", "10", "900", "efficientnet-lite0, 224 px"],
        ["model", "50", "900", "efficientnet-lite0, 224 px"],
        [floor, "", "900", "efficientnet-lite0, 224 px"],
    ]
    assert card.content.count("0.123") == 1
    names = [result.metric_name for result in card.data.eval_results if result.metric_type == "recall"]
    assert names == ["Recall, 900 images, 50 steps, efficientnet-lite0, 224 px"]


def test_classes_and_recipes(tmp_path):
    results = copy.deepcopy(RESULTS)
    results["evaluation"]["classes"] = {
        "num_inference_steps": 17,
        "num_generated": 1234,
        "accuracy": 0.8767,
        "accuracy_error": 0.0123,
        "by_class": {"a*b": 0.5, "coat": 1.0},
        "classifier": {"num_training": 5678, "num_held_out": 910, "accuracy": 0.9321, "accuracy_error": 0.0046},
    }
    results["comparison"] = {
        "device": "Abacus",
        "num_images": 345,
        "parameters": 6789012,
        "sampler_steps": 13,
        "floor": {"kernel_distance": 0.0015, "kernel_distance_error": 0.0044},
        "points": [
            {"recipe": name, "seconds": seconds, "steps": 987, "kernel_distance": value, "kernel_distance_error": 0.011}
            for name, seconds, value in (("ours", 10, 0.9), ("usual", 10, 1.9), ("ours", 61, 0.3), ("usual", 62, 1.3))
        ],
    }
    folder = document(save(tmp_path / "model"), results)
    card = page_of(folder)
    parts = check_whole(card, folder)
    for text in (
        "trained on the 5,678 training images",
        "**87.7 ± 1.2 %** of 1,234 images",
        "in 17 steps, without guidance; of 910 held-out images, in 93.2 ± 0.5 %.",
        r"By class: a\*b 50 %, coat 100 %.",
        "6,789,012 parameters, trained for equal times on Abacus",
        "345 images of each in 13 steps",
    ):
        assert text in card.content, text
    row = parts.cells.index("ours")
    assert parts.cells[row : row + 8] == [
        "ours",
        "61 s",
        "987",
        "0.300 ± 0.011",
        "usual",
        "62 s",
        "987",
        "1.300 ± 0.011",
    ]
    del results["evaluation"]["classes"]["classifier"]["accuracy"]  # no held-out images
    assert "in 17 steps, without guidance.\n" in page_of(document(folder, results)).content
    assert "coat 100 %.\n\n### Copies" in card.content


@pytest.mark.parametrize(
    ("missing", "sections_missing"),
    [
        ("evaluation", ["Evaluation"]),
        ("results", ["Training", "Evaluation", "Hardware and energy"]),
        ("config", ["Train it again"]),
        ("everything", ["Training data", "Training", "Evaluation", "Hardware and energy", "Train it again"]),
        ("pictures", []),
    ],
)
def test_what_is_missing_leaves_its_section_out(tmp_path, missing, sections_missing):
    folder = save(tmp_path / "model")
    if missing != "everything":
        results = {key: value for key, value in RESULTS.items() if key != "evaluation"}
        document(folder, results if missing == "evaluation" else RESULTS, () if missing == "pictures" else PICTURES)
    for name in {"results": ["results.json"], "config": ["training_config.yaml"]}.get(missing, []):
        (folder / name).unlink()
    card = page_of(folder, datasets=() if missing == "everything" else (DATASET,))
    check_whole(card, folder)
    assert sections(card) == [section for section in SECTIONS if section not in sections_missing]
    measured = missing not in ("evaluation", "results", "everything")
    assert (card.data.eval_results is not None) == measured
    assert ("was not measured" in card.content.split("## Limits and bias")[1].split("##")[0]) != measured


@pytest.mark.parametrize("entry", ["bound", "memorization"])
def test_a_part_of_an_evaluation_that_is_missing_is_left_out(tmp_path, entry):
    results = copy.deepcopy(RESULTS)
    evaluation = results["evaluation"]
    if entry == "bound":
        evaluation["bound"] = {"left_out": "there are no held-out images"}
    else:
        del evaluation["samples"][0][entry]
    pictures = [picture for picture in PICTURES if picture != "bound.png" or entry != "bound"]
    folder = document(save(tmp_path / "model"), results, pictures)
    text = check_whole(page_of(folder), folder)
    headings = [heading for _, heading in text.headings]
    assert ("Likelihood" in headings) == (entry != "bound")
    assert ("Copies of training images" in headings) == (entry != "memorization")


def test_an_unfinished_model_says_so(tmp_path):
    folder = save(tmp_path / "model")
    results = {key: value for key, value in RESULTS.items() if key != "evaluation"}
    card = page_of(document(folder, results, ()), unfinished=(1200, 34000))
    check_whole(card, folder)
    assert "1,200 of 34,000 optimiser steps" in card.content and "Train it again" not in sections(card)


def test_images_that_are_not_square(tmp_path):
    folder = save(tmp_path / "model", sample_size=(8, 16), in_channels=3, out_channels=3)
    assert "of 8 × 16 RGB images" in page_of(folder).content


@pytest.mark.parametrize("classes", [None, NAMES])
def test_code_of_the_page_for_images_that_are_no_pictures(tmp_path, monkeypatch, classes):
    folder = save(tmp_path / "model", classes, in_channels=5, out_channels=5, sample_size=(8, 12))
    page = page_of(folder, str(folder))
    assert "of 8 × 12 5-channel images" in page.content
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", page.content, re.DOTALL):
        if "google/" not in block and "images" in block:
            exec(compile(block, "page", "exec"), found := {})
            assert found["images"].shape[1:] == (8, 12, 5)
    with Image.open("usage.png") as picture:
        assert picture.size == (5 * 12, (len(classes) if classes else 8) * 8)


@pytest.mark.full
@pytest.mark.parametrize("kind", MODELS)
def test_all_code_of_the_page_runs(tmp_path, monkeypatch, kind):
    """Each block as it stands, on the folder in place of the repository, without what it loads from elsewhere."""
    folder = save_one(tmp_path / "model", kind)
    page = page_of(folder, str(folder))
    blocks = re.findall(r"```python\n(.*?)```", page.content, re.DOTALL)
    assert len(blocks) == (4 if kind in ("unconditional", "few steps", "another scheduler") else 3)
    assert "run by the publishing command" not in page.content  # nobody did yet
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        if "google/" not in block:
            exec(compile(block, kind, "exec"), found := {})
            assert len(found.get("images", [1])) in (1, 2, 3, 4, 8)
            assert block != blocks[0] or len(found["images"]) == {"unnamed": 3}.get(kind, 4 if MODELS[kind][0] else 8)


def test_names_of_classes_are_not_taken_for_markup(tmp_path):
    page = page_of(save_one(tmp_path / "model", "odd names")).content
    assert r'in 4 classes (a "quoted" \| name, \*cat\* \<b\>, back\\slash, 😀)' in page
    assert '["a \\"quoted\\" | name", "*cat* <b>", "back\\\\slash", "😀"]' in page


def test_the_fid_takes_the_place_of_the_frechet_distance(tmp_path):
    results = copy.deepcopy(RESULTS)
    sample = results["evaluation"]["samples"][0]
    for figures, value in ((sample, 12.34), (sample["floor"], 5.67)):
        del figures["frechet_distance"]
        figures["fid"] = value
    sample["extractor"] = "inception"
    folder = document(save(tmp_path / "model"), results)
    card = page_of(folder)
    cells = check_whole(card, folder).cells
    assert "12.3" in cells and "5.7" in cells and "| FID |" in card.content


def test_images_that_came_from_a_file(tmp_path):
    """`evaluate.py --images` does not know of steps."""
    results = copy.deepcopy(RESULTS)
    for key in ("num_inference_steps", "labels", "scheduler", "seed"):
        del results["evaluation"]["samples"][0][key]
    folder = document(save(tmp_path / "model"), results)
    card = page_of(folder)
    check_whole(card, folder)
    assert "*The first of 1,000 images; not chosen.*" in card.content


def test_figures_against_other_images_are_no_metadata_of_the_training_data(tmp_path):
    results = copy.deepcopy(RESULTS)
    results["evaluation"]["images"]["training"]["name"] = "another/set"
    card = page_of(document(save(tmp_path / "model"), results))
    assert card.data.eval_results is None and "compared with those of another/set" in card.content


def test_a_figure_that_is_no_number_is_left_out():
    evaluation = copy.deepcopy(RESULTS["evaluation"])
    evaluation["samples"][0]["recall"] = float("nan")
    assert "recall" not in {result.metric_type for result in eval_results(evaluation, [DATASET])}


# The command


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A class-conditional model with secrets of this machine around it."""
    monkeypatch.chdir(tmp_path)
    folder = document(save(tmp_path / "runs" / "clothes", NAMES), output_dir=str(tmp_path / "runs" / "clothes"))
    config = yaml.safe_load((folder / "training_config.yaml").read_text())
    config |= {"cache_dir": str(tmp_path / "cache"), "hub_license": "mit", "dataset_name": None}
    config |= {"hub_token": "hf_secret", "resume_from_checkpoint": str(tmp_path / "step_1"), "test_set": "C:\\me\\set"}
    network = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(network | {"_name_or_path": str(tmp_path)}))
    (folder / "training_config.yaml").write_text("# torch 2.13.0\n" + yaml.safe_dump(config))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "optimizer.safetensors").write_text("state")
    return folder


@pytest.mark.full
def test_the_page_alone(run_folder, tmp_path, capsys):
    (run_folder / "pipeline.py").write_text("raise SystemExit('code of the folder was executed')")
    publish.main([str(run_folder), "--page_only", "--hub_model_id", "user/clothes"])
    assert capsys.readouterr().out.strip() == str(run_folder / "README.md")
    card = ModelCard.load(run_folder / "README.md")
    check_whole(card, run_folder)
    assert card.data.license == "mit" and card.data.datasets == [DATASET]
    assert "```text\n4 images of (8, 8) pixels\n```" in card.content
    with Image.open(run_folder / "usage.png") as drawn:
        assert drawn.size == (4 * 112, 112)
    assert str(tmp_path) not in card.content
    assert "class ScratchDDPMPipeline" in (run_folder / "pipeline.py").read_text()  # the package's, not what was there
    assert str(tmp_path) in (run_folder / "training_config.yaml").read_text()  # at home it stays as it is


@pytest.mark.full
def test_without_a_name_the_folder_is_the_repository(run_folder, tmp_path):
    publish.main(["runs/clothes", "--page_only", "--license", "apache-2.0"])
    card = ModelCard.load(run_folder / "README.md")
    assert 'from_pretrained("runs/clothes"' in card.content and card.data.license == "apache-2.0"


def test_what_is_pushed_holds_no_path_of_this_machine(run_folder, tmp_path):
    with publish.staged(run_folder) as stage:
        files = sorted(str(path.relative_to(stage)) for path in stage.rglob("*") if path.is_file())
        assert not [file for file in files if "checkpoints" in file] and "unet/config.json" in files
        for file in files:
            content = (stage / file).read_bytes()
            assert str(tmp_path).encode() not in content and b"hf_secret" not in content, file
        text = (stage / "training_config.yaml").read_text()
    assert text.startswith("# torch 2.13.0\n")
    config = yaml.safe_load(text)
    assert config["output_dir"] == "clothes" and config["test_set"] == "set" and "hub_token" not in config
    assert config["cache_dir"] is config["resume_from_checkpoint"] is None
    assert not stage.exists()


def test_a_broken_model_is_not_published(run_folder):
    (run_folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="no weights in safetensors"):
        publish.main([str(run_folder), "--page_only"])
    assert not (run_folder / "README.md").exists()


@pytest.mark.full
def test_code_that_fails_is_not_published(run_folder, tmp_path, monkeypatch):
    template = tmp_path / "template.md"
    template.write_text(publish.TEMPLATE.read_text().replace("guidance_scale=2.0", "guidance_scale=-2.0"))
    monkeypatch.setattr(publish, "TEMPLATE", template)
    with pytest.raises(RuntimeError, match=r"the code of the page failed(.|\n)*guidance_scale=-2.0"):
        publish.main([str(run_folder), "--page_only"])
    assert not (run_folder / "README.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_folder"], "no_such_folder has no model_index.json"),
        (["MODEL", "--page_only", "--space"], "--page_only pushes nothing"),
        (["MODEL", "--space_id", "user/demo"], "needs --space"),
        (["MODEL", "--hub_model_id", "a/b/c"], "Repo id"),
        (["MODEL", "--space", "--space_id", "a b"], "Repo id"),
    ],
)
def test_wrong_calls(run_folder, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        publish.main([str(run_folder) if argument == "MODEL" else argument for argument in arguments])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, []),
        ({"seed": 0}, []),
        ({"dataset_name": None}, [DATASET]),
        ({"dataset_name": "user/set"}, ["user/set"]),
        ({"dataset_name": "/data/set.parquet"}, []),
        ({"dataset_name": "set.parquet"}, []),
        ({"dataset_name": "cifar10"}, []),
        ({"dataset_name": None, "train_data_dir": "images"}, []),
    ],
)
def test_data_sets_of_the_hub(config, expected):
    assert publish.hub_datasets(config) == expected


# The model of this repository, and a Space


def test_the_page_of_the_shipped_model_is_what_the_command_writes():
    """`ddpm publish models/ddpm-fashion-mnist --page_only --license apache-2.0` writes it."""
    card = page_of(
        SHIPPED, "models/ddpm-fashion-mnist", license="apache-2.0", usage_output="8 images of (28, 28) pixels"
    )
    check_whole(card, SHIPPED)
    assert sections(card) == SECTIONS and "3,832,897 parameters" in card.content
    assert (SHIPPED / "README.md").read_text(encoding="utf-8") == str(card)


def test_the_head_of_the_shipped_page_is_short():
    text = (SHIPPED / "README.md").read_text(encoding="utf-8")
    head = text.split("---\n")[1]
    assert len(head.splitlines()) + 2 <= 40
    (results,) = (model["results"] for model in yaml.safe_load(head)["model-index"])
    metrics = [metric for result in results for metric in result["metrics"]]
    assert [metric["type"] for metric in metrics] == ["kernel_distance", "recall", "bits_per_dim"]
    for metric in metrics:
        assert 0 < metric["args"]["error"] < abs(metric["value"])
        assert max(len(repr(number)) for number in (metric["value"], metric["args"]["error"])) <= 6


def test_what_a_space_needs_is_what_the_package_needs(tmp_path):
    space.write_space(tmp_path, "user/clothes")
    needed = (tmp_path / "requirements.txt").read_text().split("\n")
    assert any(line.startswith("torch>=") for line in needed) and any(line.startswith("diffusers") for line in needed)
    assert not [line for line in needed if re.match("gradio|pytest|datasets", line)]
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() | {"sdk": "gradio", "app_file": "app.py", "models": ["user/clothes"]} == (
        card.data.to_dict()
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+", str(card.data.to_dict()["sdk_version"]))
    pushed = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert "ddpm_from_scratch/hub/repository.py" in pushed and not [path for path in pushed if "__pycache__" in path]


@pytest.mark.parametrize("name", ["ddpm-fashion-mnist", "ddpm-fashion-mnist-few-steps"])
def test_the_shipped_code_is_this_package(name):
    """The same command writes it, and has to be given again when the package changes."""
    assert (ROOT / "models" / name / "pipeline.py").read_text() == one_file(_sources())
