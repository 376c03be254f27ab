"""The model card: a template filled from the files in the model's folder. Sections without data are left out."""

import inspect
import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..diffusion.pipeline import PICTURE_CHANNELS
from ..diffusion.scheduler import ScratchDDPMScheduler
from ..diffusion.unet_config import sides
from ..runtime.results import code_address

TASK = "unconditional-image-generation"
TAGS = ("ddpm", "image-generation", "ddpm-from-scratch")
# Pictures in the Hub's gallery, with the line below each; a picture that the folder lacks is left out.
GALLERY = {"samples.png": "Samples, not chosen"}
SHOWN_LABELS = 8  # in the code of the page
TINY = 64  # pixels; smaller images are enlarged
CHANNELS = {1: "grey", 3: "RGB"}  # in words
# Measures in the metadata; all others stand in the tables of the page.
METRICS = {"kernel_distance": "Kernel distance", "recall": "Recall"}
SHARES = {"recall": "num_reference"}  # measures that are shares, and of how many images
SAMPLE_UNITS = {"num_generated": "{:,} images", "num_inference_steps": "{} steps", "extractor": "{}", "size": "{} px"}


def model_page(
    pipeline: DiffusionPipeline,
    folder: Path,
    repository: str,
    template: str | os.PathLike[str],
    *,
    license: str | None = None,
    datasets: Sequence[str] = (),
    base_model: str | None = None,
    usage_output: str | None = None,
    unfinished: tuple[int, int] | None = None,
) -> ModelCard:
    """Fill the template with the facts about a model.

    Args:
        pipeline: the model.
        folder: where its `results.json`, `training_config.yaml` and pictures are, as far as there are any.
        repository: `owner/name` on the Hub.
        template: a Jinja file, whose variables are those of `page_facts`, and `card_data`.
        license: of the weights, as the Hub names it; the page says nothing about it if left out.
        datasets: Hub names of the data that it was trained on.
        base_model: Hub name of the model that it was fine-tuned from, if it was.
        usage_output: what the page's first block of code printed when it was run.
        unfinished: optimiser steps done and to do, of a model that is still being trained.

    Returns:
        The page; its `data` are the metadata, the measured results among them.
    """
    facts = page_facts(pipeline, folder, repository)
    data = ModelCardData(
        license=license,
        base_model=base_model,
        library_name="diffusers",
        pipeline_tag=TASK,
        datasets=list(datasets) or None,
        tags=[*TAGS, *(["class-conditional"] if facts["conditional"] else [])],
        model_name=facts["name"],
        eval_results=eval_results(facts["evaluation"], datasets if _measured_on_its_own_data(facts) else ()) or None,
        widget=[
            {"text": text, "output": {"url": picture}} for picture, text in GALLERY.items() if picture in facts["files"]
        ]
        or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(template),
        **facts,
        license=license,
        datasets=datasets,
        base_model=base_model,
        usage_output=usage_output,
        unfinished=unfinished,
    )


def page_facts(pipeline: DiffusionPipeline, folder: Path, repository: str) -> dict[str, Any]:
    """The variables of the template, from the model's configuration and the files beside it.

    Returns:
        - `repository` and its `name`
        - of the network: `size` and `channels` (in words), `pictures` (whether PIL has such), `tiny`, `parameters`,
          `conditional` and `classes` (in words)
        - of its use: `labels` (code for some of them), `guided` (whether there is a null label), `stock` (whether
          diffusers' own pipeline runs it), `ddpm` (whether its scheduler is that of DDPM), `num_steps`, T, and
          `own_steps`, those that a model for few steps draws in, or None
        - `scheduler`: its configuration
        - `training`, `comparison` and `evaluation` from results.json, and `config` from training_config.yaml; empty if
          there is none
        - `measures`: the rows of the evaluation's table; `by_class`: the accuracies of its classes in words
        - `code`: the address of this project's code, or None
        - `files`: the names of those in the folder

    Raises:
        ValueError: the network's configuration does not tell the size of its images.
    """
    network, scheduler = pipeline.unet.config, pipeline.scheduler
    if network["sample_size"] is None:
        raise ValueError("The network's configuration has no sample_size: set it to the side of the images.")
    height, width = sides(network["sample_size"])
    names = {int(number): name for number, name in (pipeline.config.get("id2label") or {}).items()}
    count = network.get("num_class_embeds") or 0
    labels = [names[number] for number in sorted(names)] or list(range(count - 1))
    results = _read(folder / "results.json", json.loads)
    return {
        "repository": repository,
        "name": repository.rpartition("/")[2],
        "size": f"{height} × {width}",
        "tiny": max(height, width) < TINY and height == width,  # diffusers' grid enlarges to squares
        "pictures": network["in_channels"] in PICTURE_CHANNELS,
        "channels": CHANNELS.get(network["in_channels"], f"{network['in_channels']}-channel"),
        "parameters": pipeline.unet.num_parameters(),
        "conditional": count > 0,
        "classes": f"{len(labels)} classes" + (f" ({_plain(', '.join(map(str, labels)))})" if names else ""),
        "labels": json.dumps(labels[:SHOWN_LABELS], ensure_ascii=False),  # valid Python too
        "guided": count > 0 and count - 1 not in names,
        "stock": count == 0 and "generator" in inspect.signature(scheduler.step).parameters,
        "ddpm": isinstance(scheduler, ScratchDDPMScheduler),
        "num_steps": scheduler.config.get("num_train_timesteps", 1000),
        "own_steps": pipeline.config.get("num_inference_steps"),
        "scheduler": dict(scheduler.config),
        "measures": measures(results.get("evaluation", {}), results.get("teacher", {})),
        "by_class": _shares(results.get("evaluation", {}).get("classes", {}).get("by_class", {})),
        "evaluation": results.pop("evaluation", {}),
        "comparison": _with_ends(results.pop("comparison", {})),
        "training": results,
        "config": _read(folder / "training_config.yaml", yaml.safe_load) or {},
        "code": code_address(),
        "files": sorted(path.name for path in folder.iterdir() if path.is_file()),
    }


def measures(evaluation: Mapping[str, Any], teacher: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the evaluation's table: samples by number of steps, those of a teacher, and the floor they share."""
    samples = sorted(evaluation.get("samples", ()), key=_shared)
    rows = []
    for key, group in itertools.groupby(samples, _shared):
        members = sorted(group, key=_steps)
        last = members[-1]
        floor = {"of": f"floor ({last['floor_of']})", "num_generated": last["num_generated"], **last["floor"]}
        rows += [{"of": "model", **sample} for sample in members]
        taught = sorted((sample for sample in teacher.get("samples", ()) if _shared(sample) == key), key=_steps)
        rows += [{"of": _plain(teacher["name"]), **sample} for sample in taught]
        rows.append({"extractor": last["extractor"], "size": last["size"], **floor})
    return rows


def _steps(sample: Mapping[str, Any]) -> int:
    """Network calls for an image; 0 for images that were given."""
    return int(sample.get("num_inference_steps", 0))


def _with_ends(comparison: dict[str, Any]) -> dict[str, Any]:
    """Add the last point of each recipe, as "ends", to a comparison of recipes."""
    return comparison and {**comparison, "ends": list({one["recipe"]: one for one in comparison["points"]}.values())}


def _shared(sample: Mapping[str, Any]) -> tuple[Any, ...]:
    """The key that samples with the same floor share; it sorts the most images first."""
    return sample["extractor"], sample["size"], -sample["num_generated"]


def _shares(by_name: Mapping[str, float]) -> str:
    """Format shares by name, such as "Bag 97 %, Dress 88 %"."""
    return ", ".join(f"{_plain(name)} {100 * share:.0f} %" for name, share in by_name.items())


def _plain(text: str) -> str:
    """Escape what Markdown or HTML would interpret."""
    return re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", text)


def _measured_on_its_own_data(facts: Mapping[str, Any]) -> bool:
    """Whether the model was evaluated against the data set that it was trained on."""
    compared = facts["evaluation"].get("images", {}).get("training", {}).get("name")
    return compared is not None and compared == facts["training"].get("dataset", {}).get("name")


def eval_results(evaluation: Mapping[str, Any], datasets: Sequence[str]) -> list[EvalResult]:
    """At most three results in the form of the Hub's metadata, each rounded by its own standard error.

    Of several numbers of steps and sizes of the features, the first counts. None if the data set is not on the Hub.

    Args:
        evaluation: the entry "evaluation" of results.json.
        datasets: Hub names of the data; the first is the one that the images were compared with.
    """
    if not datasets:
        return []
    dataset = datasets[0]
    sample, bound = (evaluation.get("samples") or [{}])[0], evaluation.get("bound", {})
    how = ", ".join(unit.format(sample[key]) for key, unit in SAMPLE_UNITS.items() if key in sample)
    rows = [
        (key, value, f"{METRICS[key]}, {how}", standard_error(sample, key))
        for key, value in _known(sample, tuple(METRICS)).items()
    ]
    for value in _known(bound, ("bits_per_dim",)).values():
        name = f"Variational bound, bits per dimension, {bound['num_images']:,} images"
        rows.append(("bits_per_dim", value, name, bound.get("error")))
    result = partial(EvalResult, task_type=TASK, dataset_type=dataset, dataset_name=dataset.rpartition("/")[2])
    found = []
    for key, value, name, error in rows:
        value, error = rounded(value, error)
        args = {"error": error} if error is not None else None
        found.append(result(metric_type=key, metric_value=value, metric_name=name, metric_args=args))
    return found


def standard_error(figures: Mapping[str, Any], name: str) -> float | None:
    """The standard error of a measure: that which was measured, or that of a share of N images; None if unknown."""
    if name not in SHARES:
        return figures.get(f"{name}_error")
    share, count = figures[name], figures[SHARES[name]]
    return math.sqrt(share * (1 - share) / count)


def rounded(value: float, error: float | None) -> tuple[float, float | None]:
    """A value and its standard error to two digits of the error; the value to three of its own if that is unknown."""
    if error is None or not 0 < error < math.inf:
        return float(f"{value:.3g}"), None
    digits = 1 - math.floor(math.log10(error))
    return round(value, digits), round(error, digits)


def _known(values: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The entries of `values` under these keys that are neither None nor NaN."""
    return {key: value for key in keys if (value := values.get(key)) is not None and value == value}


def _read(path: Path, parse: Any) -> dict[str, Any]:  # noqa: ANN401
    """The parsed contents of a file; empty if there is none."""
    content: dict[str, Any] = parse(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content
