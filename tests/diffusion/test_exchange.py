"""Configurations exchanged with diffusers' schedulers, in memory and through folders, in both directions."""

import json
import logging

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from ddpm_from_scratch.diffusion.scheduler import ScratchDDPMScheduler
from ddpm_from_scratch.diffusion.scheduler_config import OWN_KEYS
from helpers import oracles

# Stock's own conversion of tensors by np.array, under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

OTHERS = [
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
]
SETTINGS = {
    "defaults": {},
    "v_cosine": {
        "num_train_timesteps": 500,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "variance_type": "fixed_large",
        "clip_sample": False,
        "timestep_spacing": "linspace",
    },
    "trained_betas": {"num_train_timesteps": 40, "trained_betas": oracles.linear_betas(40).tolist(), "steps_offset": 1},
}
CHAIN = oracles.Chain(oracles.linear_betas())


def public(config):
    """The configuration without the names of classes, versions and files, and our own keys where they are not used."""
    return {k: v for k, v in config.items() if not k.startswith("_") and not (k in OWN_KEYS and v == OWN_KEYS[k])}


def sample(scheduler, count=5, seed=0):
    alpha_bar = scheduler.alphas_cumprod.double().numpy()
    scheduler.set_timesteps(count)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    doubled = scheduler.config.variance_type in ("learned", "learned_range")
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t)
        output = oracles.analytic_network(x_in, int(t), alpha_bar, scheduler.config.prediction_type, doubled)
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    return x


@pytest.fixture
def warnings_of_diffusers(caplog):
    """Records of diffusers' own logger, which does not propagate by itself."""
    diffusers.utils.logging.enable_propagation()
    caplog.set_level(logging.WARNING)
    yield caplog.records
    diffusers.utils.logging.disable_propagation()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("other", OTHERS)
def test_exchange_of_configurations_gives_what_stock_gives(other, settings):
    other_class = getattr(diffusers, other)
    stock = DDPMScheduler(**SETTINGS[settings])
    ours = ScratchDDPMScheduler.from_config(stock.config)
    assert public(ours.config) == public(stock.config)
    there_from_stock, there = other_class.from_config(stock.config), other_class.from_config(ours.config)
    assert type(there) is other_class
    assert public(there.config) == public(there_from_stock.config)
    back_from_stock, back = DDPMScheduler.from_config(there.config), ScratchDDPMScheduler.from_config(there.config)
    assert type(back) is ScratchDDPMScheduler
    assert public(back.config) == public(back_from_stock.config)
    # Nothing of ours was lost on the way.
    assert {key: back.config[key] for key in public(ours.config)} == public(ours.config)
    torch.testing.assert_close(sample(back), sample(back_from_stock), rtol=0, atol=1e-4)
    assert torch.equal(sample(back), sample(ours))


@pytest.mark.parametrize("other", OTHERS)
def test_a_scheduler_made_from_our_configuration_samples_as_one_made_from_stocks(other):
    options = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    other_class = getattr(diffusers, other)
    images = []
    for source in (DDPMScheduler(**options), ScratchDDPMScheduler(**options)):
        scheduler = other_class.from_config(source.config)
        scheduler.set_timesteps(6)
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
        generator = torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            output = oracles.analytic_network(
                scheduler.scale_model_input(x, t), int(t), CHAIN.alpha_bar, "v_prediction"
            )
            drawn = {"generator": generator} if other == "DDPMScheduler" else {}
            x = scheduler.step(output, t, x, **drawn).prev_sample
        images.append(x)
    assert torch.equal(*images)


@pytest.mark.parametrize("other", OTHERS)
def test_a_folder_of_another_scheduler_loads(other, tmp_path):
    getattr(diffusers, other)().save_pretrained(tmp_path)
    stock, ours = DDPMScheduler.from_pretrained(tmp_path), ScratchDDPMScheduler.from_pretrained(tmp_path)
    assert public(ours.config) == public(stock.config)
    torch.testing.assert_close(sample(ours), sample(stock), rtol=0, atol=1e-4)


def test_dpm_solvers_variance_type_null_means_fixed_small(tmp_path):
    DPMSolverMultistepScheduler().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["variance_type"] is None
    ours = ScratchDDPMScheduler.from_pretrained(tmp_path)
    assert ours.config.variance_type is None
    assert ours.variance_type == "fixed_small"
    explicit = ScratchDDPMScheduler.from_config(ours.config, variance_type="fixed_small")
    assert torch.equal(sample(ours), sample(explicit))
    # What it came from reads it back unchanged.
    assert DPMSolverMultistepScheduler.from_config(ours.config).config.variance_type is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        SETTINGS["v_cosine"],
        {"num_train_timesteps": 30, "trained_betas": oracles.cosine_betas(30)},
        {"num_train_timesteps": 30, "trained_betas": oracles.linear_betas(30).astype(np.float32)},
        {"variance_type": "learned_range", "thresholding": True, "sample_max_value": 1.5, "beta_schedule": "sigmoid"},
        {"rescale_betas_zero_snr": True, "prediction_type": "sample", "timestep_spacing": "linspace"},
    ],
)
def test_saved_and_loaded_it_samples_bitwise_the_same(options, tmp_path, warnings_of_diffusers):
    ours = ScratchDDPMScheduler(**options)
    ours.save_pretrained(tmp_path)
    again = ScratchDDPMScheduler.from_pretrained(tmp_path)
    stock = DDPMScheduler.from_pretrained(tmp_path)
    assert not warnings_of_diffusers
    assert torch.equal(sample(again), sample(ours))
    assert public(stock.config) == public(again.config)
    # Saved again, the same file.
    again.save_pretrained(tmp_path / "again")
    texts = [(folder / "scheduler_config.json").read_text() for folder in (tmp_path, tmp_path / "again")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("other", OTHERS)
def test_a_loaded_configuration_is_handed_on_in_silence(other, tmp_path, warnings_of_diffusers):
    """The keys that files leave out are marked as defaults, as other schedulers need it; all else is as it was."""
    ours = ScratchDDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    ours.save_pretrained(tmp_path)
    loaded = ScratchDDPMScheduler.from_pretrained(tmp_path)
    config, again = dict(ours.config), dict(loaded.config)
    config.pop("_use_default_values")
    assert set(again.pop("_use_default_values")) == set(OWN_KEYS)
    assert again == config
    getattr(diffusers, other).from_config(loaded.config)
    assert not warnings_of_diffusers


def test_our_folder_names_the_stock_class_and_stock_reads_it(tmp_path, warnings_of_diffusers):
    ours = ScratchDDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved.pop("_class_name") == "DDPMScheduler"
    stock = DDPMScheduler.from_pretrained(tmp_path)
    assert not warnings_of_diffusers
    assert saved.keys() == json.loads(stock.to_json_string()).keys() - {"_class_name"}
    torch.testing.assert_close(sample(stock), sample(ours), rtol=0, atol=5e-4)


def test_stocks_folder_is_ours_to_read(tmp_path, warnings_of_diffusers):
    stock = DDPMScheduler(beta_schedule="scaled_linear", variance_type="fixed_large", clip_sample_range=2.0)
    stock.save_pretrained(tmp_path)
    ours = ScratchDDPMScheduler.from_pretrained(tmp_path)
    assert not warnings_of_diffusers
    assert public(ours.config) == public(stock.config)
    torch.testing.assert_close(sample(ours), sample(stock), rtol=0, atol=5e-4)


def test_defaults_are_those_of_stock():
    assert public(ScratchDDPMScheduler().config) == public(DDPMScheduler().config)


def test_public_surface_is_that_of_stock():
    def names(value):
        return {name for name in dir(value) if not name.startswith("_")}

    # `one`, a tensor that holds 1, is a helper of stock's own formulas.
    assert names(DDPMScheduler()) - names(ScratchDDPMScheduler()) == {"one"}


def test_compatible_schedulers_are_those_of_stock():
    ours = {kind.__name__ for kind in ScratchDDPMScheduler().compatibles}
    assert {kind.__name__ for kind in DDPMScheduler().compatibles} <= ours | {"ScratchDDPMScheduler"}


def test_a_configuration_with_a_bad_value_is_refused_on_loading(tmp_path):
    # Stock takes an unknown variance_type for fixed_small without a word.
    DDPMScheduler(variance_type="fixed_smal").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"variance_type='fixed_smal' is not known.*did you mean 'fixed_small'"):
        ScratchDDPMScheduler.from_pretrained(tmp_path)
