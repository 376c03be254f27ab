"""The sampling loop, and the folder that the pipeline saves, in one process."""

import ast
import filecmp
import inspect
import json
import logging
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler, ScratchUNet2DModel
from ddpm_from_scratch.diffusion.pipeline import one_file
from helpers.networks import TINY_NETWORK, randomised, rewrite_weights, with_old_attention_names


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, seed=0, **arguments):
    arguments = {"batch_size": 2, "num_inference_steps": 5, "output_type": "np"} | arguments
    return quiet(pipeline)(generator=torch.Generator().manual_seed(seed), **arguments).images


@pytest.fixture
def pipeline(stock_unet):
    return quiet(ScratchDDPMPipeline(stock_unet, DDPMScheduler()))


@pytest.fixture
def conditional(conditional_stock_unet):
    return quiet(ScratchDDPMPipeline(conditional_stock_unet, DDPMScheduler()))


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_images_equal_those_of_the_stock_pipeline(stock_unet, variance_type):
    scheduler = DDPMScheduler(variance_type=variance_type)
    expected = generate(DDPMPipeline(stock_unet, scheduler), num_inference_steps=50)
    got = generate(ScratchDDPMPipeline(stock_unet, scheduler), num_inference_steps=50)
    assert expected.std() > 0.1
    np.testing.assert_allclose(got, expected, atol=2e-4)


def test_learned_variance_equals_the_stock_pipeline(learned_variance_stock_unet):
    scheduler = DDPMScheduler(variance_type="learned_range")
    expected = generate(DDPMPipeline(learned_variance_stock_unet, scheduler), num_inference_steps=50)
    got = generate(ScratchDDPMPipeline(learned_variance_stock_unet, scheduler), num_inference_steps=50)
    np.testing.assert_allclose(got, expected, atol=2e-4)


def test_stock_parts_become_ours_around_the_same_tensors(stock_unet, pipeline):
    assert type(pipeline.unet) is ScratchUNet2DModel
    assert type(pipeline.scheduler) is ScratchDDPMScheduler
    assert pipeline.unet.conv_in.weight is stock_unet.conv_in.weight


SCHEDULERS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "PNDMScheduler",
    "DEISMultistepScheduler",
    "LMSDiscreteScheduler",
)


def own_loop(unet, scheduler, seed, steps=5):
    """The loop of diffusers' documentation, with what each scheduler asks for."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 1, 8, 8, generator=generator) * scheduler.init_noise_sigma
    draws = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    for t in scheduler.timesteps:
        output = unet(scheduler.scale_model_input(x, t), t).sample[:, :1]
        x = scheduler.step(output, t, x, **draws).prev_sample
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).detach().numpy()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("network", ["stock_unet", "learned_variance_stock_unet"])
def test_any_scheduler_may_stand_in_place_of_ours(name, network, request):
    unet = request.getfixturevalue(network)
    learned = "learned_range" if unet.config.out_channels == 2 else "fixed_small"
    # v, of which samples of a random network are in range in part; those of epsilon would all be clipped.
    process = DDPMScheduler(variance_type=learned, prediction_type="v_prediction")
    pipeline = quiet(ScratchDDPMPipeline(unet, process))
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    fresh = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    expected = own_loop(pipeline.unet, fresh, seed=3)
    assert np.mean((expected > 0) & (expected < 1)) > 0.2
    np.testing.assert_allclose(generate(pipeline, seed=3), expected, atol=1e-5)


def test_swapping_there_and_back_gives_the_same_images(pipeline):
    before = generate(pipeline)
    original = pipeline.scheduler
    for name in SCHEDULERS:
        there = getattr(diffusers, name).from_config(original.config)
        pipeline.scheduler = ScratchDDPMScheduler.from_config(there.config)
        np.testing.assert_array_equal(generate(pipeline), before)


def test_with_a_list_of_generators_an_image_does_not_depend_on_the_batch(pipeline):
    def images(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(len(seeds), generators, num_inference_steps=20, output_type="np").images

    together = images([4, 5, 6])
    np.testing.assert_allclose(together[1], images([5])[0], atol=1e-5)
    np.testing.assert_allclose(together[[2, 0]], images([6, 4]), atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.1


@pytest.mark.parametrize(("channels", "mode", "size"), [(1, "L", 8), (3, "RGB", (8, 12))])
def test_output_types(channels, mode, size):
    config = {**TINY_NETWORK, "in_channels": channels, "out_channels": channels, "sample_size": size}
    pipeline = quiet(ScratchDDPMPipeline(randomised(UNet2DModel(**config)), DDPMScheduler()))
    height, width = size if isinstance(size, tuple) else (size, size)
    array = generate(pipeline)
    tensor = generate(pipeline, output_type="pt")
    pictures = generate(pipeline, output_type="pil")
    assert array.shape == (2, height, width, channels)
    assert array.min() >= 0
    assert array.max() <= 1
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert all(isinstance(p, Image.Image) and p.mode == mode and p.size == (width, height) for p in pictures)
    pixels = np.stack([np.asarray(p).reshape(height, width, channels) for p in pictures])
    np.testing.assert_array_equal(pixels, (array * 255).round().astype("uint8"))


def test_return_dict_and_defaults(stock_unet):
    pipeline = quiet(ScratchDDPMPipeline(stock_unet, ScratchDDPMScheduler(num_train_timesteps=10)))
    (images,) = pipeline(generator=torch.Generator().manual_seed(0), output_type="np", return_dict=False)
    assert images.shape == (1, 8, 8, 1)
    assert len(pipeline.scheduler.timesteps) == 10


def test_the_callback_sees_and_may_replace_the_sample(pipeline):
    seen = []

    def callback(pipe, step, t, tensors):
        assert pipe is pipeline
        seen.append((step, int(t), sorted(tensors)))
        return {"sample": torch.zeros_like(tensors["sample"])}

    images = generate(
        pipeline,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["sample", "pred_original_sample"],
    )
    assert seen == [(i, t, ["pred_original_sample", "sample"]) for i, t in enumerate((800, 600, 400, 200, 0))]
    assert (images == 0.5).all()


def test_a_callback_that_returns_nothing_changes_nothing(pipeline):
    np.testing.assert_array_equal(generate(pipeline, callback_on_step_end=lambda *_: None), generate(pipeline))


def test_the_progress_bar_shows_and_can_be_switched_off(pipeline, capsys):
    pipeline.set_progress_bar_config(disable=False)
    pipeline(num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err
    generate(pipeline)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_latents_are_the_end_of_the_chain(stock_unet, dtype):
    """As stock's images, before they are cut off at 0 and 1 and turned to arrays of float32."""
    scheduler = DDPMScheduler(clip_sample=False)
    pipeline = ScratchDDPMPipeline(ScratchUNet2DModel.from_stock(stock_unet).to(dtype), scheduler)
    latents = generate(pipeline, output_type="latent")
    assert latents.dtype == dtype
    assert latents.abs().max() > 1
    images = generate(pipeline, output_type="np")
    np.testing.assert_array_equal((latents / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy(), images)
    expected = generate(DDPMPipeline(stock_unet.to(dtype), scheduler), output_type="np")
    np.testing.assert_allclose(images, expected, atol=1e-4)
    frames = pipeline(num_inference_steps=3, output_type="latent", return_trajectory=3).trajectory
    assert all(isinstance(frame.sample, torch.Tensor) for frame in frames)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_networks_give_nearly_the_same_images(pipeline, dtype):
    expected = generate(pipeline, num_inference_steps=10)
    got = generate(pipeline.to(dtype), num_inference_steps=10)
    assert pipeline.unet.dtype == dtype
    assert np.abs(got - expected).mean() < 0.02


def test_model_cpu_offload(pipeline):
    expected = generate(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")  # the device of execution; the hooks are those for a GPU
    assert hasattr(pipeline.unet, "_hf_hook")
    np.testing.assert_array_equal(generate(pipeline), expected)


def test_class_labels_reach_the_network(conditional):
    by_list = generate(conditional, batch_size=None, class_labels=[1, 4])
    by_tensor = generate(conditional, class_labels=torch.tensor([1, 4]))
    other = generate(conditional, class_labels=[1, 3])
    np.testing.assert_array_equal(by_list, by_tensor)
    np.testing.assert_array_equal(by_list[0], other[0])
    assert np.abs(by_list[1] - other[1]).max() > 1e-3


@pytest.mark.full
def test_a_compiled_network_samples(pipeline):
    expected = generate(pipeline)
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    np.testing.assert_allclose(generate(pipeline), expected, atol=1e-5)


# --- saving and loading ---------------------------------------------------------------------------------------------


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_saving_again_gives_the_same_folder(pipeline, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    pipeline.save_pretrained(first)
    loaded = ScratchDDPMPipeline.from_pretrained(first)
    np.testing.assert_array_equal(generate(loaded), generate(pipeline))
    loaded.save_pretrained(second)
    assert files(first) == [
        "model_index.json",
        "pipeline.py",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    assert filecmp.cmpfiles(first, second, files(first), shallow=False) == (files(first), [], [])


def test_stock_diffusers_loads_the_folder_without_a_warning(pipeline, tmp_path, caplog):
    pipeline.save_pretrained(tmp_path)
    stock = DDPMPipeline.from_pretrained(tmp_path)
    assert type(stock.unet) is UNet2DModel
    assert type(stock.scheduler) is DDPMScheduler
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    np.testing.assert_allclose(generate(stock), generate(pipeline), atol=1e-5)


def test_another_scheduler_is_saved_as_itself(pipeline, tmp_path):
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert type(ScratchDDPMPipeline.from_pretrained(tmp_path).scheduler) is diffusers.DDIMScheduler


def test_a_class_conditional_folder_names_our_pipeline_and_loads_without_its_code(conditional, tmp_path):
    conditional.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == ["pipeline", "ScratchDDPMPipeline"]
    (tmp_path / "pipeline.py").write_text("raise SystemExit('code of the folder was executed')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    loaded = ScratchDDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded) is ScratchDDPMPipeline
    np.testing.assert_array_equal(generate(loaded, class_labels=[0, 1]), generate(conditional, class_labels=[0, 1]))


def test_the_old_flat_layout_with_old_attention_names(stock_unet, tmp_path):
    stock_unet.save_pretrained(tmp_path)
    DDPMScheduler().save_pretrained(tmp_path)
    rewrite_weights(tmp_path, with_old_attention_names)
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = ScratchDDPMPipeline.from_pretrained(tmp_path)
    np.testing.assert_allclose(generate(loaded), generate(DDPMPipeline(stock_unet, DDPMScheduler())), atol=1e-5)


def test_an_incomplete_checkpoint_is_refused(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    rewrite_weights(tmp_path / "unet", lambda weights: {n: w for n, w in weights.items() if n != "conv_out.weight"})
    with pytest.raises(ValueError, match=r"1 weights of the network are not loaded \(conv_out.weight"):
        ScratchDDPMPipeline.from_pretrained(tmp_path)


def test_from_pipe_shares_the_parts(pipeline):
    other = ScratchDDPMPipeline.from_pipe(pipeline)
    assert other.unet is pipeline.unet
    from_stock = ScratchDDPMPipeline.from_pipe(DDPMPipeline(pipeline.unet, DDPMScheduler()))
    np.testing.assert_array_equal(generate(from_stock), generate(pipeline))


def test_the_saved_module_is_self_contained(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    source = (tmp_path / "pipeline.py").read_text()
    tree = ast.parse(source)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    roots = {
        name.split(".")[0]
        for node in imports
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in imports)
    assert roots - set(sys.stdlib_module_names) == {"torch", "numpy", "diffusers"}
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    defined += [t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    assert len(defined) == len(set(defined))  # no module hides a name of another
    assert one_file([source]) == source
    for node in tree.body:  # the package's sources, whole and in order
        if isinstance(node, ast.ClassDef) and node.name == "ScratchUNet2DModel":
            assert ast.unparse(node) == ast.unparse(ast.parse(inspect.getsource(ScratchUNet2DModel)))


# --- wrong calls ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"batch_size": True}, "batch_size=True"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 .* from 1 to 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5"),
        ({"generator": 0}, "generator=0 must be a torch.Generator"),
        ({"generator": [torch.Generator()], "batch_size": 2}, "1 entries for 2 images"),
        ({"generator": [1, 2], "batch_size": 2}, "must be a torch.Generator"),
        ({"output_type": "numpy"}, "output_type='numpy' is not known; allowed: pil, np, pt, latent"),
        ({"class_labels": [1]}, "not class-conditional"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, "from sample, pred_original_sample"),
        ({"callback_on_step_end_tensor_inputs": "sample"}, "must be a list"),
    ],
)
def test_wrong_calls(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [5]}, "from 0 to 4"),
        ({"class_labels": [-1]}, "from 0 to 4"),
        ({"class_labels": [0.5]}, "whole numbers"),
        ({"class_labels": []}, "whole numbers"),
        ({"class_labels": 3}, "must be a list"),
        ({"class_labels": [[1]]}, "must be a list"),
        ({"class_labels": [1, 2], "batch_size": 3}, "batch_size=3 differs from the number of class_labels, 2"),
    ],
)
def test_wrong_class_labels(conditional, arguments, message):
    with pytest.raises(ValueError, match=message):
        conditional(**arguments)


def test_a_network_without_sample_size():
    pipeline = ScratchDDPMPipeline(UNet2DModel(**{**TINY_NETWORK, "sample_size": None}), DDPMScheduler())
    with pytest.raises(ValueError, match="no sample_size"):
        pipeline()


def test_a_stock_network_that_we_refuse():
    with pytest.raises(ValueError, match="time_embedding_type='fourier'"):
        ScratchDDPMPipeline(UNet2DModel(**TINY_NETWORK, time_embedding_type="fourier"), DDPMScheduler())


def test_missing_folders_and_files(tmp_path):
    with pytest.raises(OSError, match=r"model_index\.json"):
        ScratchDDPMPipeline.from_pretrained(tmp_path)
    with pytest.raises(OSError):
        ScratchUNet2DModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(OSError):
        ScratchDDPMScheduler.from_pretrained(tmp_path)
    assert list(Path(tmp_path).iterdir()) == []
