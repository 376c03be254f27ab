"""Write the tables and the figure of docs/speed.md from docs/results/speed_cpu.json and time_to_quality.json.

    python docs/make_speed.py

`make bench ARGS="--full --results docs/results/speed_cpu.json"` and `python benchmarks/time_to_quality.py` measure; on
a CPU without bfloat16 instructions `python benchmarks/cores.py` and `make bench ARGS="--networks fashion_mnist_quick
--precisions no --kinds training --results docs/results/speed_cpu_float32.json"`; on a GPU `python benchmarks/gpu.py
--results docs/results/gpu.jsonl`; `python benchmarks/host_work.py` anywhere.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import gpu_tables
import matplotlib.figure
import matplotlib.ticker

from pages import bullets, load_script, made_from, replace_parts, table, versions

DOCS = Path(__file__).parent
figures = load_script(DOCS.parent / "benchmarks" / "figures.py")
faster_format, images_per_second, median = figures.faster_format, figures.images_per_second, figures.median
peak_share, ratio, round_ratios = figures.peak_share, figures.ratio, figures.round_ratios

SPEED = DOCS / "results" / "speed_cpu.json"
QUALITY = DOCS / "results" / "time_to_quality.json"
FLOAT32 = DOCS / "results" / "speed_cpu_float32.json"
HOST = DOCS / "results" / "host_work.json"
CORES = DOCS / "results" / "cores.json"
PAGE = DOCS / "speed.md"
FIGURE = DOCS / "figures" / "time_to_quality.png"

STOCK, OURS, COMPILED = "diffusers fp32, NCHW", "ours, default", "ours, default compiled"
PEER = "denoising-diffusion-pytorch"
KINDS = {"fp32": "float32", "bf16": "bfloat16"}
TITLES = {"small": "2.7M network, 28x28, batch 64", "cifar10": "the paper's CIFAR-10 network, 35.7M, batch 16"}
MISSING = "–"

Numbers = dict[str, Any]


def times_as_fast(rows: Numbers, of: str, to: str) -> str:
    """Median, and range, of the ratios of each round."""
    if of not in rows or to not in rows:
        return MISSING
    found = round_ratios(rows[of], rows[to])
    return f"**{ratio(rows[of], rows[to]):.2f}** ({min(found):.2f} to {max(found):.2f})"


def ratio_table(speed: Numbers, _: Numbers) -> str:
    """Ours beside the others, as ratios."""
    measured = [
        (f"Training, {title}", speed["networks"][name]["training"])
        for name, title in TITLES.items()
        if name in speed["networks"]
    ]
    measured.append(
        (
            f"Sampling, {speed['chain']} steps, batch {speed['samples']}, 2.7M network",
            speed["networks"]["small"]["sampling"],
        )
    )
    rows = [
        (
            title,
            *(times_as_fast(found, f"ours {kind}", faster_format(found, kind)) for kind in KINDS),
            times_as_fast(found, OURS, STOCK),
            times_as_fast(found, COMPILED, STOCK),
            times_as_fast(found, OURS, PEER),
        )
        for title, found in measured
    ]
    at = [f"{name}, against diffusers' better memory format" for name in KINDS.values()]
    titles = ("times as fast", *at, "default against default", "default compiled against default", f"against {PEER}")
    return table(titles, rows)


def system_table(speed: Numbers, _: Numbers) -> str:
    """Every system's rate, share of the peak, memory and set-up."""
    rows = []
    for network, title in TITLES.items():
        found = speed["networks"].get(network, {"training": {}})
        for name, row in found["training"].items():
            rate = images_per_second(found, row)
            low, high = (found["batch"] / extreme(row["seconds"]) for extreme in (max, min))
            peak = speed["peak_flops"][speed["systems"][name]["precision"]]
            share = MISSING if name == PEER else f"{peak_share(found, row, peak):.0%}"
            rates = f"{rate:.1f} ({low:.1f} to {high:.1f})"
            memory = f"{row['peak_memory'] / 1e9:.2f} GB" if "peak_memory" in row else MISSING
            rows.append((title, name, rates, share, memory, f"{row['set_up']:.0f} s"))
    return table(("network", "system", "images/s", "of the peak", "peak memory", "set-up"), rows)


def sampling_table(speed: Numbers, _: Numbers) -> str:
    """Seconds of a chain."""
    rows = [
        (name, f"{median(row):.2f} s ({min(row['seconds']):.2f} to {max(row['seconds']):.2f})")
        for name, row in speed["networks"]["small"]["sampling"].items()
    ]
    return table(("system", f"{speed['samples']} images in {speed['chain']} steps"), rows)


def form_table(speed: Numbers, _: Numbers) -> str:
    """Training by batch, resolution and width, at the defaults."""
    rows = []
    for name, found in speed["networks"].items():
        if name not in TITLES or name == "small":
            ours, stock = (images_per_second(found, found["training"][system]) for system in (OURS, STOCK))
            form = f"{found['batch']} of {found['size']}x{found['size']}"
            times = times_as_fast(found["training"], OURS, STOCK)
            rows.append((f"{found['parameters'] / 1e6:.1f}M", form, f"{ours:.1f}", f"{stock:.1f}", times))
    return table(("network", "batch", "ours, images/s", "diffusers, images/s", "times as fast"), rows)


def other_table(speed: Numbers, _: Numbers) -> str:
    """What surrounds training and sampling."""
    titles = {
        "scheduler_step": ("one step of the scheduler", 1e6, "µs"),
        "import": ("import", 1, "s"),
        "first_image": ("a process until its first image in 10 steps", 1, "s"),
    }
    rows = []
    for key, (title, scale, unit) in titles.items():
        ours, stock = (scale * statistics.median(speed[key][name]) for name in ("ours", "diffusers"))
        rows.append((title, f"{ours:.3g} {unit}", f"{stock:.3g} {unit}", f"{ours - stock:+.2g} {unit}"))
    return table(("", "ours", "diffusers", "difference"), rows)


def facts(speed: Numbers, _: Numbers) -> str:
    """Machine, rounds, data loading."""
    peaks = " and ".join(
        f"{speed['peak_flops'][key] / 1e9:,.0f} GFLOP/s in {title}"
        for key, title in (("no", "float32"), ("bf16", "bfloat16"))
    )
    loading = ", ".join(f"{rate:,.0f} images/s with {count} processes" for count, rate in speed["loading"].items())
    found = {
        "Figures": f"medians of {speed['rounds']} rounds (lowest to highest); a ratio is taken within each round",
        "Peak": f"of a matrix product: {peaks}",
        "Data loading": f"decoded images with their noise: {loading}",
        "Device": f"{speed['device']}; {versions(speed)}",
    }
    return bullets(found)


def profile_table(speed: Numbers, _: Numbers) -> str:
    """Shares of a training step of our default."""
    kinds = list(next(iter(speed["profile"].values())))
    rows = [(TITLES[name], *(f"{shares[kind]:.0%}" for kind in kinds)) for name, shares in speed["profile"].items()]
    return table(("network", *kinds), rows)


def precision_facts(speed: Numbers, _: Numbers) -> str:
    """The effect of bfloat16 on samples."""
    found = speed["precision"]
    cells = [
        (
            title,
            f"{found[key]['kernel_distance']:.4f} ± {found[key]['kernel_distance_error']:.4f}",
            f"{found[key]['seconds']:.0f} s",
        )
        for key, title in (("no", "float32"), ("bf16", "bfloat16"))
    ]
    sentence = (
        f"{found['num_images']:,} images of {found['model']}, {found['steps']} steps of DPM-Solver++, from the same "
        f"noise. They differ by {found['rms_difference']:.2f} of 255 (root mean square)."
    )
    return table(("network in", "kernel distance", "drawn in"), cells) + "\n\n" + sentence


def quality_table(_: Numbers, quality: Numbers) -> str:
    """Kernel distances at each recipe's marks."""
    rows = [
        (
            point["recipe"],
            f"{point['seconds'] / 60:.1f} min",
            f"{point['steps']:,}",
            f"{point['kernel_distance']:.3f} ± {point['kernel_distance_error']:.3f}",
        )
        for point in quality["points"]
    ]
    return table(("recipe", "trained for", "steps", "kernel distance"), rows)


def quality_facts(_: Numbers, quality: Numbers) -> str:
    """What was measured and with what."""
    floor = f"{quality['floor']['kernel_distance']:.3f} ± {quality['floor']['kernel_distance_error']:.3f}"
    count, steps = quality["num_images"], quality["sampler_steps"]
    found = {
        "N": f"{count:,} samples, {steps} steps of DPM-Solver++, against as many training images; features of "
        "EfficientNet-Lite0 at 112 pixels",
        "Floor": f"as many test images in the place of samples: {floor}",
        "Network": f"{quality['parameters'] / 1e6:.1f}M parameters, that of the quick preset. One run each",
        "Device": f"{quality['device']}; {versions(quality)}",
    }
    return bullets(found)


def float32_table(results: Numbers) -> str:
    """Training on a CPU without bfloat16: every system's rate, and its share of the machine's peak."""
    ((_, found),) = results["networks"].items()
    rows = []
    for name, row in found["training"].items():
        if "bf16" not in name:
            share = f"{peak_share(found, row, results['peak_flops']['no']):.0%}"
            times = times_as_fast(found["training"], name, STOCK)
            rows.append((name, f"{images_per_second(found, row):.1f}", share, times))
    return table(("system", "images/s", "of the peak", f"against {STOCK}"), rows)


def float32_facts(results: Numbers) -> str:
    """Machine and rounds."""
    ((_, found),) = results["networks"].items()
    facts = {
        "Network": f"that of the quick preset, {found['parameters'] / 1e6:.1f}M, batches of {found['batch']}",
        "Peak": f"of a matrix product: {results['peak_flops']['no'] / 1e9:,.0f} GFLOP/s in float32",
        "Figures": f"medians of {results['rounds']} rounds (lowest to highest); a ratio is taken within each round",
        "Device": f"{results['device']}, {json.loads(CORES.read_text(encoding='utf-8'))['processor']}; "
        f"{versions(results)}",
    }
    return bullets(facts)


def cores_table(results: Numbers) -> str:
    """`ddpm train` with one process and with a process for each core, alone and beside a busy one."""
    rows = [
        (way, f"{rates['alone']:.0f}", f"{rates['beside']:.0f}", f"{rates['beside'] / rates['alone']:.0%}")
        for way, rates in results["images_per_second"].items()
    ]
    return table(("`ddpm train`", "images/s, alone", "beside a busy process", "keeps"), rows)


def cores_facts(results: Numbers) -> str:
    """Machine and rounds."""
    rounds = len(next(iter(results["rounds"].values()))["alone"])
    return bullets(
        {
            "Figures": f"of the quick preset, as its plan tells them after twelve steps; runs for each: {rounds}",
            "Device": f"{results['device']}, {results['processor']}; {versions(results)}",
        }
    )


def host_table(results: Numbers) -> str:
    """What a step costs the host besides the network, before and now."""
    rows = [
        (name, f"{row['host']:.1f}", f"{row['host'] / results['before']['host']:.2f}") for name, row in results.items()
    ]
    return table(("host work of a step", "ms", "of what it was"), rows)


def host_facts(results: Numbers) -> str:
    """Machine and rounds."""
    now = results["now"]
    shown = f"medians of {now['rounds']} rounds of {now['steps']} steps, {now['tensors']} weights, one image a step"
    return bullets({"Figures": shown, "Device": f"{now['device']}; {versions(now)}"})


PARTS = {
    "ratios": ratio_table,
    "systems": system_table,
    "sampling": sampling_table,
    "forms": form_table,
    "others": other_table,
    "facts": facts,
    "profile": profile_table,
    "precision": precision_facts,
    "quality": quality_table,
    "quality facts": quality_facts,
}
OWN_RESULTS = {
    "float32": (FLOAT32, float32_table),
    "float32 facts": (FLOAT32, float32_facts),
    "cores": (CORES, cores_table),
    "cores facts": (CORES, cores_facts),
    "host work": (HOST, host_table),
    "host facts": (HOST, host_facts),
}


def read() -> tuple[Numbers, Numbers]:
    """Both results."""
    return json.loads(SPEED.read_text(encoding="utf-8")), json.loads(QUALITY.read_text(encoding="utf-8"))


def fill(page: str) -> str:
    """The page with what stands between its markers replaced."""
    results = read()
    parts = {name: make(*results) for name, make in PARTS.items()}
    return replace_parts(page, parts | made_from(OWN_RESULTS) | gpu_tables.parts())


def draw(quality: Numbers) -> matplotlib.figure.Figure:
    """Kernel distance against time."""
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")  # draws without a display
    axis = figure.subplots()
    for name in dict.fromkeys(point["recipe"] for point in quality["points"]):
        points = [point for point in quality["points"] if point["recipe"] == name]
        axis.errorbar(
            [point["seconds"] / 60 for point in points],
            [point["kernel_distance"] for point in points],
            yerr=[point["kernel_distance_error"] for point in points],
            label=name,
            marker="o",
            linestyle="-" if name.startswith("ours") else "--",
            capsize=3,
        )
    axis.set(xscale="log", yscale="log", xlabel="minutes of training", ylabel="kernel distance (lower is better)")
    axis.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axis.set_xticks([0.5, 1, 2, 5, 10])
    axis.grid(visible=True, alpha=0.3)
    axis.legend()
    return figure


def main() -> None:
    """Write the page and the figure."""
    draw(read()[1]).savefig(FIGURE, dpi=100)
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
