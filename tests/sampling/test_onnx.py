"""`ddpm export --format onnx`: the network, run by onnxruntime, against our own."""

import sys

import numpy as np
import pytest
import torch

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler, ScratchUNet2DModel
from ddpm_from_scratch.sampling.onnx import export_onnx
from ddpm_from_scratch.training import export
from helpers.networks import TINY_NETWORK, randomised

ADM = {
    **TINY_NETWORK,
    "sample_size": (8, 12),
    "out_channels": 2,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
}
NEEDED = "needs the extra onnx: pip install 'ddpm-from-scratch[onnx]'"
NETWORKS = {"plain": TINY_NETWORK, "ADM, classes": {**ADM, "num_class_embeds": 5}}


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request, tmp_path_factory):
    """A pipeline, the folder of it that the command makes, and onnxruntime's session."""
    pytest.importorskip("onnxscript", reason=NEEDED)
    runtime = pytest.importorskip("onnxruntime", reason=NEEDED)
    unet = randomised(ScratchUNet2DModel(**NETWORKS[request.param]))
    variance = "learned_range" if unet.config.out_channels == 2 else "fixed_large"
    scheduler = ScratchDDPMScheduler(variance_type=variance, timestep_spacing="trailing")
    folder = tmp_path_factory.mktemp("onnx")
    ScratchDDPMPipeline(unet, scheduler).save_pretrained(folder / "model")
    export.main([str(folder / "model"), str(folder / "onnx"), "--format", "onnx"])
    session = runtime.InferenceSession(folder / "onnx" / "unet" / "model.onnx", providers=["CPUExecutionProvider"])
    pipeline = ScratchDDPMPipeline.from_pretrained(folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, folder / "onnx", session


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_outputs_are_ours_at_every_batch(exported, batch):
    pipeline, _, session = exported
    config, generator = pipeline.unet.config, torch.Generator().manual_seed(batch)
    size = np.broadcast_to(config.sample_size, 2)
    arguments = {
        "sample": torch.randn(batch, 1, *size, generator=generator),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
    }
    if classes := config.num_class_embeds:
        arguments["class_labels"] = torch.randint(0, classes, (batch,), generator=generator)
    with torch.no_grad():
        expected = pipeline.unet(**arguments).sample.numpy()
    assert {of.name for of in session.get_inputs()} == set(arguments)
    (found,) = session.run(["out_sample"], {name: value.numpy() for name, value in arguments.items()})
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_same_images_are_drawn(exported):
    """By onnxruntime and the scheduler of the exported folder: within one grey level in each pixel."""
    pipeline, folder, session = exported
    labels = [0, 2, 2, 3] if pipeline.unet.config.num_class_embeds else None
    options = {"num_inference_steps": 20, "output_type": "np", "class_labels": labels}
    expected = pipeline(batch_size=4, generator=torch.Generator().manual_seed(0), **options).images
    scheduler = ScratchDDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 1, *expected.shape[1:3], generator=generator)
    fixed = {} if labels is None else {"class_labels": np.array(labels)}
    for t in scheduler.timesteps:
        inputs = {"sample": x.numpy(), "timestep": np.full(4, t), **fixed}
        (output,) = session.run(["out_sample"], inputs)
        x = scheduler.step(torch.from_numpy(output), t, x, generator=generator).prev_sample
    found = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert expected.std() > 0.1
    assert np.abs(np.round(255 * found) - np.round(255 * expected)).max() <= 1


def test_what_is_refused(tmp_path, monkeypatch):
    def pipeline(**changes):
        return ScratchDDPMPipeline(ScratchUNet2DModel(**{**TINY_NETWORK, **changes}), ScratchDDPMScheduler())

    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists already"):
        export.main([str(tmp_path), str(tmp_path / "there"), "--format", "onnx"])
    with monkeypatch.context() as patched, pytest.raises(ImportError, match=r"ddpm-from-scratch\[onnx\]"):
        patched.setitem(sys.modules, "onnxscript", None)
        export_onnx(pipeline(), tmp_path / "onnx")
    pytest.importorskip("onnxscript", reason=NEEDED)
    with pytest.raises(ValueError, match="sample_size=None"):
        export_onnx(pipeline(sample_size=None), tmp_path / "onnx")
    with pytest.raises(ValueError, match="class_embed_type='timestep'"):
        export_onnx(pipeline(class_embed_type="timestep"), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
