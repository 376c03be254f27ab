"""Nothing in the sampling loop makes the host wait for the device.

The device is "meta" here, whose values cannot be read at all: what would wait for a GPU raises an error there.
"""

import contextlib

import pytest
import torch
from diffusers import UNet2DModel
from torch.profiler import ProfilerActivity, profile

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler, ScratchUNet2DModel
from helpers.networks import TINY_NETWORK, randomised

# Operators by which the host reads a value: on a GPU each of them waits for it.
READS = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}
GUIDED = {"class_labels": [1, 2], "guidance_scale": 2.0, "guidance_rescale": 0.5, "guidance_interval": (0.2, 0.8)}
# Options of the network, of the scheduler and of the call.
SETTINGS = {
    "plain": ({}, {}, {}),
    "eta_0": ({}, {}, {"eta": 0.0}),
    "learned_variance": ({"out_channels": 2}, {"variance_type": "learned_range"}, {}),
    "dynamic_thresholding": ({}, {"thresholding": True, "sample_max_value": 1.5}, {}),
    "optimal_variance": ({}, {"x_0_mse": [(0, 0.01), (999, 0.3)]}, {}),
    "guidance": ({"num_class_embeds": 5}, {}, GUIDED),
    "trajectory": ({}, {}, {"return_trajectory": 3}),
}


def make(setting, device="cpu", **network):
    """A pipeline, and a function that samples 2 images with it in 5 steps."""
    network_options, scheduler_options, call_options = SETTINGS[setting]
    unet = randomised(UNet2DModel(**{**TINY_NETWORK, **network_options, **network})).eval()
    pipeline = ScratchDDPMPipeline(unet, ScratchDDPMScheduler(**scheduler_options)).to(device)
    pipeline.set_progress_bar_config(disable=True)

    def images(generator=None, **more):
        generator = generator or torch.Generator().manual_seed(0)
        arguments = {"num_inference_steps": 5, "output_type": "pt", **call_options, **more}
        return pipeline(2, generator, **arguments).images

    return pipeline, images


def within_the_loop(pipeline, context):
    """Enter context with the first step and leave it after the last."""

    def steps(timesteps):
        with context:
            yield from timesteps

    pipeline.progress_bar = steps


# --- timesteps whose values cannot be read ---------------------------------------------------------------------------


def schedulers_on_host_and_meta(**options):
    host, meta = ScratchDDPMScheduler(**options), ScratchDDPMScheduler(**options)
    host.set_timesteps(5)
    meta.set_timesteps(5, device="meta")
    assert meta.timesteps.device.type == "meta"
    return host, meta


def chain(scheduler, timesteps):
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for t in timesteps:
        x = scheduler.step(torch.sin(3 * x), t, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("part", [slice(None), slice(2, None), slice(1, 4), slice(None, None, 2)], ids=str)
def test_entries_of_timesteps_are_known_without_their_values(part, eta):
    host, meta = schedulers_on_host_and_meta(eta=eta)
    assert torch.equal(chain(meta, meta.timesteps[part]), chain(host, host.timesteps[part]))
    assert [meta.previous_timestep(t) for t in meta.timesteps[part]] == [
        {800: 600, 600: 400, 400: 200, 200: 0, 0: -1}[int(t)] for t in host.timesteps[part]
    ]


def test_the_only_timestep_is_known_as_a_whole_too():
    scheduler = ScratchDDPMScheduler()
    scheduler.set_timesteps(timesteps=[7], device="meta")
    assert scheduler.previous_timestep(scheduler.timesteps) == -1


@pytest.mark.parametrize(
    "value",
    [
        lambda own: torch.arange(5, device="meta")[3],
        lambda own: torch.tensor(0, device="meta"),
        lambda own: own[1].clone(),
        lambda own: own[1] + 0,
        lambda own: own[1].int(),
        lambda own: own[1:3],
    ],
    ids=["entry_of_another", "another", "copy", "computed", "converted", "two_entries"],
)
def test_a_value_that_is_not_an_entry_of_timesteps_has_to_be_read(value):
    _, scheduler = schedulers_on_host_and_meta()
    with pytest.raises(NotImplementedError, match="no data"):
        scheduler.previous_timestep(value(scheduler.timesteps))


def test_an_entry_of_the_timesteps_before_has_to_be_read():
    _, scheduler = schedulers_on_host_and_meta()
    before = scheduler.timesteps
    scheduler.set_timesteps(4, device="meta")
    with pytest.raises(NotImplementedError, match="no data"):
        scheduler.previous_timestep(before[1])


# --- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_loop_runs_where_no_value_can_be_read(setting):
    _, images = make(setting, "meta")
    got = images()
    assert got.device.type == "meta"
    assert got.shape == (2, 1, 8, 8)


def read_in_every_way(pipeline, step, t, tensors):
    """A callback that makes the host wait."""
    x = tensors["sample"]
    x.sum().item()
    x[x > 0]
    bool((x > 0).any())
    torch.equal(x, x + 1)


def test_a_read_is_an_error_there():
    _, images = make("plain", "meta")
    with pytest.raises(RuntimeError, match="meta tensors"):
        images(callback_on_step_end=read_in_every_way)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_network_is_given_tensors_of_its_own_device(setting):
    pipeline, images = make(setting, "meta")
    given = []
    pipeline.unet.register_forward_pre_hook(
        lambda module, positional, named: given.append([*positional, *named.values()]), with_kwargs=True
    )
    images()
    assert len(given) == 5
    for values in given:
        assert len(values) == (3 if setting == "guidance" else 2)
        assert all(isinstance(value, torch.Tensor) and value.device.type == "meta" for value in values)


def reads_in_the_loop(pipeline, images, **arguments):
    """Of the operators in READS, those that the loop calls; and how many it calls of any kind."""
    trace = profile(activities=[ProfilerActivity.CPU])
    within_the_loop(pipeline, trace)
    images(num_inference_steps=3, **arguments)

    def callers(event):
        while event := event.cpu_parent:
            yield event.name

    events = trace.events()
    # On a CPU, and only there, quantile reads whether its ratio lies between 0 and 1.
    return {e.name for e in events if e.name in READS and "aten::quantile" not in callers(e)}, len(events)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_loop_calls_no_operator_that_reads_a_value(setting):
    reads, calls = reads_in_the_loop(*make(setting))
    assert reads == set()
    assert calls > 1000


def test_each_of_these_operators_would_be_seen():
    reads, _ = reads_in_the_loop(*make("plain"), callback_on_step_end=read_in_every_way)
    assert reads == READS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_loop_does_not_wait_for_a_gpu(setting):
    @contextlib.contextmanager
    def waiting_is_an_error():
        torch.cuda.set_sync_debug_mode("error")
        yield
        torch.cuda.set_sync_debug_mode("default")

    pipeline, images = make(setting, "cuda")
    generator = torch.Generator("cuda")
    expected = images(generator.manual_seed(0))
    try:
        within_the_loop(pipeline, waiting_is_an_error())
        torch.testing.assert_close(images(generator.manual_seed(0)), expected, rtol=0, atol=1e-3)
        within_the_loop(pipeline, waiting_is_an_error())
        with pytest.raises(RuntimeError, match="synchronizing"):
            images(generator, callback_on_step_end=read_in_every_way)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- compiled networks -----------------------------------------------------------------------------------------------

ONE_LEVEL = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}


@pytest.mark.full
@pytest.mark.parametrize(
    ("setting", "arguments", "graphs"),
    [
        ("plain", {}, 1),
        ("guidance", {"guidance_interval": (0.0, 1.0)}, 1),
        ("guidance", {}, 2),  # where guidance acts, the batch is twice as large
    ],
)
def test_a_network_is_compiled_once_for_a_chain(setting, arguments, graphs):
    pipeline, images = make(setting, **ONE_LEVEL)
    expected = images(**arguments)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    pipeline.unet.compile(fullgraph=True, backend=backend)
    for _ in range(2):
        torch.testing.assert_close(images(**arguments), expected, rtol=0, atol=1e-5)
        assert len(compiled) == graphs


@pytest.mark.full
@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_a_whole_step_is_compiled_once_for_each_timestep(variance):
    """Network and scheduler in one function. Of a fixed variance it is one graph, once coefficients are there."""
    channels = 2 if variance == "learned_range" else 1
    unet = randomised(ScratchUNet2DModel(**{**TINY_NETWORK, **ONE_LEVEL, "out_channels": channels})).eval()
    scheduler = ScratchDDPMScheduler(variance_type=variance)
    scheduler.set_timesteps(3)
    graphs = []

    def step(x, t):
        return scheduler.step(unet(x, t).sample, t, x).prev_sample

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def chain(one_step):
        torch.manual_seed(0)
        x = torch.randn(2, 1, 8, 8)
        with torch.no_grad():
            for t in scheduler.timesteps.tolist():
                x = one_step(x, t)
        return x

    expected = chain(step)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=variance == "fixed_large", backend=backend)
    for _ in range(2):
        torch.testing.assert_close(chain(compiled), expected, rtol=0, atol=1e-6)
    assert variance == "learned_range" or len(graphs) == 3
