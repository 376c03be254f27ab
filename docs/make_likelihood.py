"""Write the tables of docs/likelihood.md from docs/results/{evaluation_quick,learned_variance}.json.

    python docs/make_likelihood.py

`ddpm evaluate MODEL` and `python benchmarks/learned_variance.py FIXED LEARNED` measure.
"""

import json
from pathlib import Path
from typing import Any

from pages import bullets, replace_parts, table, versions

DOCS = Path(__file__).parent
EVALUATION = DOCS / "results" / "evaluation_quick.json"
LEARNED = DOCS / "results" / "learned_variance.json"
PAGE = DOCS / "likelihood.md"

MEASURES = {
    "kernel_distance": "kernel distance",
    "frechet_distance": "Fréchet distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
}
DIGITS = {"kernel_distance": 3, "frechet_distance": 1}
VARIANCES = {
    "fixed_small": "`fixed_small`",
    "fixed_large": "`fixed_large`",
    "optimal": "optimal, after calibration",
    "learned_range": "`learned_range`",
}
Numbers = dict[str, Any]


def shown(figures: Numbers, name: str) -> str:
    """A figure, the kernel distance with its standard error."""
    error = f" ± {figures['kernel_distance_error']:.3f}" if name == "kernel_distance" else ""
    return f"{figures[name]:z.{DIGITS.get(name, 2)}f}{error}"


def evaluation_table(results: Numbers) -> str:
    """Measures of the first chain, each with its floor, in Markdown."""
    sample = results["evaluation"]["samples"][0]
    rows = [(title, shown(sample, name), shown(sample["floor"], name)) for name, title in MEASURES.items()]
    return table(("measure", "generated", "real (floor)"), rows)


def evaluation_facts(results: Numbers) -> str:
    """What was measured and with what."""
    found = results["evaluation"]
    sample, bound = found["samples"][0], found["bound"]
    terms, near = bound["terms"], sample["memorization"]
    facts = {
        "Images": f"N = {sample['num_generated']:,}, generated in {sample['num_inference_steps']} steps, against "
        f"{sample['num_reference']:,} training images; floor: as many {sample['floor_of']}",
        "Features": f"{sample['extractor']}, which sees the images at {sample['size']}x{sample['size']} pixels",
        "Memorisation, in pixels": f"{near['share_nearer']:.1%} of the generated images are nearer to one of the "
        f"{near['num_training']:,} training images than {near['quantile']:.0%} of held-out images are; their median "
        f"distance is {near['median_ratio']:.2f} times that of held-out images",
        "Bound": f"{bound['bits_per_dim']:.2f} ± {bound['error']:.2f} bits per dimension, all {bound['num_terms']:,} "
        f"terms for {bound['num_images']} held-out images, `{bound['variance_type']}`; L_0 {terms[0]:.2f}, "
        f"the ten above it {sum(terms[1:11]):.2f}, the others {sum(terms[11:]):.2f}, L_T {bound['prior']:.0e}",
        "Device": f"{found['device']}, the network in {found['precision']}; {sum(found['seconds'].values()):.0f} s "
        f"besides loading; {versions(found)}",
    }
    return bullets(facts)


def learned_table(results: Numbers) -> str:
    """Bits per dimension and kernel distances by variance, in Markdown."""
    bound_steps = [bound["steps"] for bound in results["rows"][0]["bounds"]]
    sample_steps = [sample["steps"] for sample in results["rows"][0]["samples"]]
    titles = [f"bits/dim, {steps} steps" for steps in bound_steps]
    titles += [f"kernel distance, {steps} steps" for steps in sample_steps]
    rows = []
    for row in results["rows"]:
        cells = [f"{bound['bits_per_dim']:.3f} ± {bound['error']:.3f}" for bound in row["bounds"]]
        cells += [shown(sample, "kernel_distance") for sample in row["samples"]]
        rows.append([VARIANCES[row["variance"]], *cells])
    return table(["variance", *titles], rows)


def learned_facts(results: Numbers) -> str:
    """What was measured and with what."""
    fixed, learned = results["models"]["fixed"], results["models"]["learned"]
    features = results["features"]
    facts = {
        "Models": f"{fixed['parameters']:,} and {learned['parameters']:,} parameters, {fixed['training_steps']:,} and "
        f"{learned['training_steps']:,} training steps of L_simple and of L_hybrid, alike in everything else: "
        f"{fixed['images_seen']:,} of {fixed['training_images']:,} images, {fixed['device']}",
        "Bound": f"{results['num_bound_images']} held-out images",
        "Kernel distance": f"N = {results['num_images']:,}, floor {shown(results['floor'], 'kernel_distance')}, "
        f"features of {features['network']} at {features['size']} pixels",
        "Device": f"{results['device']}, the network in {results['precision']}; {versions(results)}",
    }
    return bullets(facts)


PARTS = {
    "evaluation": (EVALUATION, evaluation_table),
    "evaluation facts": (EVALUATION, evaluation_facts),
    "learned variance": (LEARNED, learned_table),
    "learned variance facts": (LEARNED, learned_facts),
}


def fill(page: str) -> str:
    """The page with what stands between its markers replaced."""
    parts = {name: make(json.loads(path.read_text(encoding="utf-8"))) for name, (path, make) in PARTS.items()}
    return replace_parts(page, parts)


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
