"""Every wrong call raises a ValueError that names the value and says what is allowed."""

import numpy as np
import pytest
import torch

from ddpm_from_scratch.diffusion.scheduler import ScratchDDPMScheduler as Scheduler

X = torch.zeros(2, 3, 4, 4)
OTHER = torch.zeros(1, 3, 4, 4)
NAN_BETAS = [0.1, float("nan"), 0.2]

CONFIGURATIONS = [
    # Misspelt options: all that is allowed, and the nearest.
    ({"beta_schedule": "liner"}, ["beta_schedule='liner'", "squaredcos_cap_v2", "did you mean 'linear'?"]),
    ({"beta_schedule": "cosine"}, ["beta_schedule='cosine'", "squaredcos_cap_v2"]),
    ({"prediction_type": "eps"}, ["prediction_type='eps'", "epsilon, sample, v_prediction", "did you mean 'epsilon'?"]),
    ({"prediction_type": "v-prediction"}, ["'v-prediction'", "did you mean 'v_prediction'?"]),
    ({"prediction_type": None}, ["prediction_type=None", "epsilon, sample, v_prediction"]),
    ({"variance_type": "fixed_smal"}, ["variance_type='fixed_smal'", "learned_range", "did you mean 'fixed_small'?"]),
    ({"variance_type": "learned-range"}, ["'learned-range'", "did you mean 'learned_range'?"]),
    ({"timestep_spacing": "trailling"}, ["'trailling'", "leading, linspace, trailing", "did you mean 'trailing'?"]),
    # Numbers.
    ({"num_train_timesteps": 0}, ["num_train_timesteps=0", "at least 1"]),
    ({"num_train_timesteps": -5}, ["num_train_timesteps=-5", "at least 1"]),
    ({"num_train_timesteps": 10.0}, ["num_train_timesteps=10.0", "whole number"]),
    ({"num_train_timesteps": "1000"}, ["num_train_timesteps='1000'", "whole number"]),
    ({"steps_offset": -1}, ["steps_offset=-1", "at least 0"]),
    ({"steps_offset": True}, ["steps_offset=True", "whole number"]),
    ({"beta_start": 0.0}, ["beta_start=0.0", "between 0 and 1"]),
    ({"beta_start": "0.1"}, ["beta_start='0.1'", "a number", "between 0 and 1"]),
    ({"beta_end": 1.5}, ["beta_end=1.5", "between 0 and 1"]),
    ({"beta_end": float("nan")}, ["beta_end=nan", "between 0 and 1"]),
    ({"clip_sample_range": 0}, ["clip_sample_range=0", "positive"]),
    ({"clip_sample_range": None}, ["clip_sample_range=None", "positive"]),
    ({"dynamic_thresholding_ratio": 1.5}, ["dynamic_thresholding_ratio=1.5", "(0, 1]"]),
    ({"sample_max_value": 0}, ["sample_max_value=0", "positive"]),
    # Betas.
    ({"trained_betas": [0.1, 0.2]}, ["trained_betas", "(2,)", "(1000,)"]),
    ({"num_train_timesteps": 3, "trained_betas": NAN_BETAS}, ["trained_betas", "(0, 1)"]),
    (
        {"num_train_timesteps": 3, "trained_betas": [0.1, 1.2, 0.3]},
        ["trained_betas", "(0, 1)", "only the last may be 1"],
    ),
    ({"num_train_timesteps": 3, "trained_betas": [0.1, 0.0, 0.3]}, ["trained_betas", "(0, 1)"]),
    ({"num_train_timesteps": 3, "trained_betas": [0.1, 1.0, 0.3]}, ["only the last may be 1"]),
    ({"num_train_timesteps": 3, "trained_betas": [[0.1, 0.2, 0.3]]}, ["(1, 3)", "(3,)"]),
    ({"num_train_timesteps": 3, "trained_betas": [1e-20, 0.1, 0.2]}, ["trained_betas", "ᾱ must fall at every step"]),
    ({"num_train_timesteps": 400, "trained_betas": [0.99] * 400}, ["trained_betas", "ᾱ must fall at every step"]),
    # Zero terminal SNR.
    (
        {"rescale_betas_zero_snr": True},
        ["prediction_type='epsilon'", "zero terminal SNR", "'v_prediction' or 'sample'"],
    ),
    ({"num_train_timesteps": 2, "trained_betas": [0.1, 1.0]}, ["prediction_type='epsilon'", "zero terminal SNR"]),
    (
        {"num_train_timesteps": 1, "rescale_betas_zero_snr": True, "prediction_type": "sample"},
        ["num_train_timesteps", "at least 2"],
    ),
]

CALLS = {
    # set_timesteps
    "neither": (lambda s: s.set_timesteps(), ["num_inference_steps or timesteps"]),
    "both": (lambda s: s.set_timesteps(5, timesteps=[3, 1]), ["num_inference_steps or timesteps"]),
    "no steps": (lambda s: s.set_timesteps(0), ["num_inference_steps=0", "1 to 1000"]),
    "negative steps": (lambda s: s.set_timesteps(-3), ["num_inference_steps=-3", "1 to 1000"]),
    "too many steps": (lambda s: s.set_timesteps(1001), ["num_inference_steps=1001", "1 to 1000"]),
    "fractional steps": (lambda s: s.set_timesteps(10.0), ["num_inference_steps=10.0", "whole number"]),
    "boolean steps": (lambda s: s.set_timesteps(True), ["num_inference_steps=True", "whole number"]),
    "ascending list": (lambda s: s.set_timesteps(timesteps=[1, 2]), ["[1, 2]", "descend strictly", "999..0"]),
    "repeated timestep": (lambda s: s.set_timesteps(timesteps=[5, 5, 1]), ["[5, 5, 1]", "descend strictly"]),
    "listed beyond T": (lambda s: s.set_timesteps(timesteps=[1000, 1]), ["[1000, 1]", "999..0"]),
    "listed negative": (lambda s: s.set_timesteps(timesteps=[5, -1]), ["[5, -1]", "999..0"]),
    "empty list": (lambda s: s.set_timesteps(timesteps=[]), ["[]", "non-empty list"]),
    "list of floats": (lambda s: s.set_timesteps(timesteps=[5.0, 1.0]), ["[5.0, 1.0]", "whole numbers"]),
    # timesteps of a step
    "step not in the chain": (
        lambda s: chosen(s, [9, 5]).step(X, 7, X),
        ["timestep 7", "one of the 2", "set_timesteps"],
    ),
    "previous of one not there": (lambda s: chosen(s, [9, 5]).previous_timestep(6), ["timestep 6", "one of the 2"]),
    "step at T": (lambda s: s.step(X, 1000, X), ["1000", "0 to 999"]),
    "step at -1": (lambda s: s.step(X, -1, X), ["-1", "0 to 999"]),
    "step at a float": (lambda s: s.step(X, 5.0, X), ["5.0", "whole numbers"]),
    "step at a float tensor": (lambda s: s.step(X, torch.tensor(5.0), X), ["5.", "whole numbers"]),
    "step at a boolean": (lambda s: s.step(X, True, X), ["True", "whole numbers"]),
    "step at a batch": (lambda s: s.step(X, torch.tensor([5, 6]), X), ["one timestep", "not 2"]),
    "no timesteps": (lambda s: s.add_noise(X, X, torch.tensor([], dtype=torch.long)), ["whole numbers from 0 to 999"]),
    "timesteps of another batch": (lambda s: s.add_noise(X, X, torch.tensor([1, 2, 3])), ["3 timesteps", "batch of 2"]),
    "float timesteps": (lambda s: s.add_noise(X, X, torch.tensor([0.5, 1.0])), ["0.5", "whole numbers"]),
    "timesteps beyond T": (lambda s: s.get_velocity(X, X, torch.tensor([1, 1000])), ["1000", "0 to 999"]),
    "negative timesteps": (lambda s: s.q_marginal(X, torch.tensor([1, -1])), ["-1", "0 to 999"]),
    "s = t": (lambda s: s.q_posterior(X, X, 5, 5), ["s=5", "smaller than t=5"]),
    "s > t": (lambda s: s.p_reverse(X, X, 5, 6), ["s=6", "smaller than t=5"]),
    "s < -1": (lambda s: s.p_reverse(X, X, 5, -2), ["-2", "-1 to 999"]),
    "one s >= t": (lambda s: s.p_reverse(X, X, torch.tensor([5, 6]), torch.tensor([4, 6])), ["smaller than t"]),
    # shapes
    "wrong channels": (lambda s: s.step(torch.zeros(2, 4, 4, 4), 5, X), ["(2, 4, 4, 4)", "(2, 3, 4, 4)", "twice"]),
    "thrice the channels": (lambda s: s.predict(torch.zeros(2, 9, 4, 4), X, 5), ["(2, 9, 4, 4)", "twice its channels"]),
    "wrong size": (lambda s: s.step(torch.zeros(2, 3, 8, 8), 5, X), ["(2, 3, 8, 8)", "(2, 3, 4, 4)"]),
    "wrong batch": (lambda s: s.step(OTHER, 5, X), ["(1, 3, 4, 4)", "(2, 3, 4, 4)"]),
    "output for the loss": (lambda s: s.simple_loss(OTHER, X, X, 5), ["(1, 3, 4, 4)", "(2, 3, 4, 4)"]),
    "noise for add_noise": (lambda s: s.add_noise(X, OTHER, 5), ["noise", "(1, 3, 4, 4)", "(2, 3, 4, 4)"]),
    "noise for get_velocity": (lambda s: s.get_velocity(X, OTHER, 5), ["noise", "(1, 3, 4, 4)"]),
    "noise for the loss": (lambda s: s.simple_loss(X, X, OTHER, 5), ["noise", "(1, 3, 4, 4)"]),
    "x_0 for the posterior": (lambda s: s.q_posterior(OTHER, X, 5), ["x_0", "(1, 3, 4, 4)"]),
    "x_0 for the bound": (lambda s: s.vlb_term(X, OTHER, X, 5), ["x_0", "(1, 3, 4, 4)"]),
    # learned variances without the network for them
    "learned, C channels": (
        lambda s: Scheduler(variance_type="learned").step(X, 5, X),
        ["'learned'", "twice the channels"],
    ),
    "learned_range, C channels": (
        lambda s: Scheduler(variance_type="learned_range").vlb_term(X, X, X, 5),
        ["'learned_range'", "twice the channels", "'fixed_small' or 'fixed_large'"],
    ),
    # dtypes
    "images of bytes": (lambda s: s.add_noise(X.byte(), X, 5), ["torch.uint8", "floats"]),
    "noise of integers": (lambda s: s.add_noise(X, X.long(), 5), ["torch.int64", "floats"]),
    "sample of integers": (lambda s: s.step(X, 5, X.int()), ["torch.int32", "floats"]),
    "complex output": (lambda s: s.step(X + 0j, 5, X), ["torch.complex64", "floats"]),
    # generators
    "too few generators": (lambda s: s.step(X, 5, X, [torch.Generator()]), ["1 generators", "batch of 2"]),
    "too many generators": (lambda s: s.step(X, 5, X, [torch.Generator()] * 3), ["3 generators", "batch of 2"]),
}


def chosen(scheduler, timesteps):
    scheduler.set_timesteps(timesteps=timesteps)
    return scheduler


@pytest.mark.parametrize(("options", "fragments"), CONFIGURATIONS, ids=[str(options) for options, _ in CONFIGURATIONS])
def test_wrong_configuration(options, fragments):
    with pytest.raises(ValueError) as caught:
        Scheduler(**options)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(("call", "fragments"), CALLS.values(), ids=CALLS)
def test_wrong_call(call, fragments):
    with pytest.raises(ValueError) as caught:
        call(Scheduler())
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_refused_set_timesteps_leaves_the_chain_as_it_was():
    scheduler = chosen(Scheduler(), [9, 5])
    for wrong in ({"num_inference_steps": 0}, {"timesteps": [1, 2]}):
        with pytest.raises(ValueError):
            scheduler.set_timesteps(**wrong)
    assert scheduler.timesteps.tolist() == [9, 5]
    assert scheduler.previous_timestep(9) == 5
    assert scheduler.num_inference_steps == 2
    assert scheduler.custom_timesteps


@pytest.mark.parametrize(
    "t", [5, np.int64(5), np.array(5), np.array([5]), torch.tensor(5), torch.tensor([5]), torch.tensor(5.0).int()]
)
def test_right_timesteps_of_every_kind(t):
    scheduler = Scheduler()
    x = torch.ones(2, 3)
    assert torch.equal(scheduler.add_noise(x, x, t), scheduler.add_noise(x, x, 5))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    steps = [
        scheduler.step(x, timestep, x, generator).prev_sample
        for timestep, generator in zip((t, 5), generators, strict=True)
    ]
    assert torch.equal(*steps)
