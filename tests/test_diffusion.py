"""Noise schedule, targets, samplers and guidance against diffusers' schedulers and their own definitions."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import refusal
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from tinydb.config import ScheduleConfig
from tinydb.diffusion import (SAMPLERS, Estimate, NoiseSchedule, Sampler, ddim_step, ddim_timesteps,
                              dpm_timesteps, guided, sample, sampler_timesteps)

STABLE_DIFFUSION = ScheduleConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
V_PREDICTION = replace(STABLE_DIFFUSION, prediction_type="v_prediction")
LINEAR = ScheduleConfig(beta_schedule="linear")
SHAPE = (3, 4, 8, 8)
TIMESTEPS = torch.tensor([0, 500, 999])

each_prediction = pytest.mark.parametrize("config", [STABLE_DIFFUSION, V_PREDICTION],
                                          ids=lambda config: config.prediction_type)


def reference(config: ScheduleConfig, steps: int = 20) -> DDIMScheduler:
    """diffusers' scheduler, set as Stable Diffusion folders set it."""
    scheduler = DDIMScheduler(beta_start=config.beta_start, beta_end=config.beta_end, set_alpha_to_one=False,
                              beta_schedule=config.beta_schedule, prediction_type=config.prediction_type,
                              clip_sample=False, steps_offset=1)
    scheduler.set_timesteps(steps)
    return scheduler


def reference_dpm(config: ScheduleConfig, steps: int) -> DPMSolverMultistepScheduler:
    """What users of diffusers put in DDIM's place."""
    scheduler = DPMSolverMultistepScheduler.from_config(reference(config).config)
    scheduler.set_timesteps(steps)
    return scheduler


def normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def stand_in(latents: Tensor, timestep: int) -> Tensor:
    """A network of one line: its predictions bend with the latents and with time."""
    return torch.tanh(latents) * (0.5 + timestep / 1000)


def draw(schedule: NoiseSchedule, denoiser: Callable, latents: Tensor, steps: int, sampler: str = "ddim",
         skip: int = 0) -> list[tuple[Tensor, Tensor]]:
    """All that `sample` yields, from the first timestep on or without the first `skip`."""
    timesteps = sampler_timesteps(schedule, sampler, steps)[skip:]
    return list(sample(schedule, denoiser, latents, sampler, timesteps))


# ------------------------------------------------------------------------------------- the forward process


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, LINEAR], ids=["scaled_linear", "linear"])
def test_alphas_cumprod(config):
    ours = NoiseSchedule(config).alphas_cumprod
    torch.testing.assert_close(ours, reference(config).alphas_cumprod, rtol=2e-5, atol=0)
    assert ours.shape == (1000,) and ours.dtype == torch.float32


def test_alphas_cumprod_of_stable_diffusion():
    """The product is taken in float64: the last value has all the digits that float32 can hold."""
    assert NoiseSchedule(STABLE_DIFFUSION).alphas_cumprod[[0, -1]].tolist() == pytest.approx(
        [0.99915, 0.004660099], rel=1e-6)


def test_add_noise():
    ours = NoiseSchedule(STABLE_DIFFUSION).add_noise(normal(0), normal(1), TIMESTEPS)
    torch.testing.assert_close(ours, reference(STABLE_DIFFUSION).add_noise(normal(0), normal(1), TIMESTEPS))


def test_target():
    velocity = reference(V_PREDICTION).get_velocity(normal(0), normal(1), TIMESTEPS)
    torch.testing.assert_close(NoiseSchedule(V_PREDICTION).target(normal(0), normal(1), TIMESTEPS), velocity)
    assert torch.equal(NoiseSchedule(STABLE_DIFFUSION).target(normal(0), normal(1), TIMESTEPS), normal(1))


@each_prediction
def test_clean_and_noise_inverts_target(config):
    """The prediction that the network is taught says exactly what the latents and the noise were."""
    schedule = NoiseSchedule(config)
    noisy = schedule.add_noise(normal(0), normal(1), TIMESTEPS)
    clean, noise = schedule.clean_and_noise(schedule.target(normal(0), normal(1), TIMESTEPS), noisy, TIMESTEPS)
    torch.testing.assert_close(clean, normal(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(noise, normal(1), rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50, 333, 999])
def test_timesteps(steps):
    schedule = NoiseSchedule(STABLE_DIFFUSION)
    assert ddim_timesteps(schedule, steps) == reference(STABLE_DIFFUSION, steps).timesteps.tolist()
    assert dpm_timesteps(schedule, steps) == reference_dpm(STABLE_DIFFUSION, steps).timesteps.tolist()


def test_steps_that_the_model_was_not_trained_on():
    for steps in (0, 1000):
        assert f"steps {steps}: expected 1 to 999" in refusal(
            sampler_timesteps, NoiseSchedule(STABLE_DIFFUSION), "dpm", steps)


@each_prediction
@pytest.mark.parametrize("timestep", [951, 501, 1])  # 1 goes on to 0
def test_ddim_step(config, timestep):
    expected = reference(config).step(normal(0), timestep, normal(1))
    schedule = NoiseSchedule(config)
    now = Estimate(timestep, *schedule.clean_and_noise(normal(0), normal(1), torch.tensor([timestep])))
    ours = ddim_step(schedule, now, max(timestep - 50, 0), None)
    torch.testing.assert_close(ours, expected.prev_sample, rtol=1e-4, atol=1e-4)


@each_prediction
def test_ddim_with_the_true_noise_arrives_at_the_clean_latents(config):
    """The last step lands on timestep 0, whose little noise stays, as in Stable Diffusion."""
    schedule, clean, noise = NoiseSchedule(config), normal(0), normal(1)

    def oracle(latents: Tensor, timestep: int) -> Tensor:
        return schedule.target(clean, noise, torch.full((len(clean),), timestep))

    first = torch.full((len(clean),), ddim_timesteps(schedule, 20)[0])
    start = schedule.add_noise(clean, noise, first)
    steps = draw(schedule, oracle, start, 20)
    zero = torch.zeros(len(clean), dtype=torch.long)
    torch.testing.assert_close(steps[-1][0], schedule.add_noise(clean, noise, zero), rtol=0, atol=1e-4)
    for _, predicted in steps:
        torch.testing.assert_close(predicted, clean, rtol=0, atol=1e-4)
    assert torch.equal(start, schedule.add_noise(clean, noise, first))  # nobody wrote into it


@each_prediction
@pytest.mark.parametrize("steps", [1, 2, 3, 14, 15, 31])  # from 15 on diffusers treats the last step differently
@pytest.mark.parametrize("skip", [0, 1])
def test_dpm(config, steps, skip):
    """Every step of DPM-Solver++ 2M, from pure noise or from part way, is diffusers'."""
    scheduler, latents = reference_dpm(config, steps), normal(0)
    scheduler.set_begin_index(skip)
    ours = draw(NoiseSchedule(config), stand_in, latents, steps, "dpm", skip=skip)
    assert len(ours) == steps - skip
    for (found, clean), timestep in zip(ours, scheduler.timesteps[skip:]):
        latents = scheduler.step(stand_in(latents, timestep), timestep, latents).prev_sample
        torch.testing.assert_close(found, latents, rtol=1e-4, atol=2e-5)
    if ours:
        assert torch.equal(found, clean)  # no noise is left


def plms_step(schedule: NoiseSchedule, now: Estimate, next_timestep: int, earlier: Estimate | None) -> Tensor:
    """A third sampler: DDIM with the noise extrapolated from two estimates (PNDM's second order, arXiv 2202.09778)."""
    abar, abar_next = (schedule.alphas_cumprod[t].item() for t in (now.timestep, next_timestep))
    latents = math.sqrt(abar) * now.clean + math.sqrt(1 - abar) * now.noise
    noise = now.noise if earlier is None else 1.5 * now.noise - 0.5 * earlier.noise
    clean = (latents - math.sqrt(1 - abar) * noise) / math.sqrt(abar)
    return math.sqrt(abar_next) * clean + math.sqrt(1 - abar_next) * noise


@pytest.mark.parametrize("sampler", ["ddim", "dpm", "plms"])
def test_sampler_goes_where_the_equation_leads(monkeypatch, sampler):
    """For clean latents from N(0, s^2) the best prediction is known, and so is where a sampler should arrive:

        noise in x_t = sigma_t x_t / v_t,  v_t = alpha_t^2 s^2 + sigma_t^2,  and x_t / sqrt(v_t) never changes.

    A sampler of one's own is one function and one entry in SAMPLERS.
    """
    monkeypatch.setitem(SAMPLERS, "plms", Sampler(ddim_timesteps, plms_step, "PLMS"))
    schedule, s = NoiseSchedule(STABLE_DIFFUSION), 0.5

    def spread(timestep: int) -> float:
        abar = schedule.alphas_cumprod[timestep].item()
        return math.sqrt(abar * s**2 + 1 - abar)

    def best_prediction(latents: Tensor, timestep: int) -> Tensor:
        return latents * math.sqrt(1 - schedule.alphas_cumprod[timestep].item()) / spread(timestep) ** 2

    latents = draw(schedule, best_prediction, normal(0), 100, sampler)[-1][0]
    expected = normal(0) * spread(0) / spread(SAMPLERS[sampler].timesteps(schedule, 100)[0])
    assert (latents - expected).norm() < 0.03 * expected.norm()


# ----------------------------------------------------------------------------------------------- guidance


class Recorder:
    """A model that answers with its text, and remembers how many pictures each call was for."""

    def __init__(self):
        self.calls = []

    def __call__(self, latents: Tensor, timestep: int, text_embeds: Tensor) -> Tensor:
        self.calls.append((len(latents), timestep, len(text_embeds)))
        return latents * text_embeds.mean(dim=(1, 2)).view(-1, 1, 1, 1) + timestep


COND, UNCOND = torch.tensor([2.0, 3.0, 4.0]).view(-1, 1, 1), torch.tensor([-1.0, 0.0, 5.0]).view(-1, 1, 1)


@pytest.mark.parametrize("scale, forwards_of", [(7.5, 6), (0.0, 6), (1.0, 3)])
def test_guidance(scale, forwards_of):
    """uncond + scale * (cond - uncond) from one forward; at scale 1 of the conditional half only."""
    model = Recorder()
    found = guided(model, COND, UNCOND, scale)(normal(0), 500)
    torch.testing.assert_close(found, normal(0) * (UNCOND + scale * (COND - UNCOND)).unsqueeze(1) + 500)
    assert model.calls == [(forwards_of, 500, forwards_of)]


def test_guidance_stops():
    """At `stop_timestep` and below, the conditional prediction alone."""
    model = Recorder()
    denoiser = guided(model, COND, UNCOND, 3.0, stop_timestep=500)
    before, after = denoiser(normal(0), 501), denoiser(normal(0), 500)
    assert [pictures for pictures, _, _ in model.calls] == [6, 3]
    torch.testing.assert_close(before, normal(0) * (UNCOND + 3 * (COND - UNCOND)).unsqueeze(1) + 501)
    torch.testing.assert_close(after, normal(0) * COND.unsqueeze(1) + 500)
