"""Noise schedule, targets, DDIM and guidance against diffusers' DDIMScheduler and their own definitions."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from tinydb.config import InputError, ScheduleConfig
from tinydb.diffusion import (SAMPLERS, Estimate, FreshNoise, NoiseSchedule, Sampler, ddim_step, ddim_timesteps,
                              dpm_timesteps, guided, sample, sampler_timesteps)

STABLE_DIFFUSION = ScheduleConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
V_PREDICTION = replace(STABLE_DIFFUSION, prediction_type="v_prediction")
LINEAR = ScheduleConfig(beta_schedule="linear")
SHAPE = (3, 4, 8, 8)

each_prediction = pytest.mark.parametrize("config", [STABLE_DIFFUSION, V_PREDICTION],
                                          ids=lambda config: config.prediction_type)


def reference(config: ScheduleConfig, steps: int = 20) -> DDIMScheduler:
    """diffusers' scheduler, set as Stable Diffusion folders set it."""
    scheduler = DDIMScheduler(beta_start=config.beta_start, beta_end=config.beta_end, set_alpha_to_one=False,
                              beta_schedule=config.beta_schedule, prediction_type=config.prediction_type,
                              clip_sample=False, steps_offset=1)
    scheduler.set_timesteps(steps)
    return scheduler


def draw(schedule: NoiseSchedule, denoiser: Callable, latents: Tensor, steps: int, sampler: str = "ddim",
         eta: float = 0.0, skip: int = 0) -> list[tuple[Tensor, Tensor]]:
    """All that `sample` yields, each picture's noise from a generator of its own."""
    timesteps = sampler_timesteps(schedule, sampler, steps)[skip:]
    return list(sample(schedule, denoiser, latents, sampler, timesteps, FreshNoise(eta, seeds(0, 1, 2))))


def normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


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
    timesteps = torch.tensor([0, 500, 999])
    ours = NoiseSchedule(STABLE_DIFFUSION).add_noise(normal(0), normal(1), timesteps)
    torch.testing.assert_close(ours, reference(STABLE_DIFFUSION).add_noise(normal(0), normal(1), timesteps))


def test_target():
    timesteps = torch.tensor([0, 500, 999])
    velocity = reference(V_PREDICTION).get_velocity(normal(0), normal(1), timesteps)
    torch.testing.assert_close(NoiseSchedule(V_PREDICTION).target(normal(0), normal(1), timesteps), velocity)
    assert torch.equal(NoiseSchedule(STABLE_DIFFUSION).target(normal(0), normal(1), timesteps), normal(1))


@each_prediction
def test_clean_and_noise_inverts_target(config):
    """The prediction that the network is taught says exactly what the latents and the noise were."""
    schedule, timesteps = NoiseSchedule(config), torch.tensor([0, 500, 999])
    noisy = schedule.add_noise(normal(0), normal(1), timesteps)
    clean, noise = schedule.clean_and_noise(schedule.target(normal(0), normal(1), timesteps), noisy, timesteps)
    torch.testing.assert_close(clean, normal(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(noise, normal(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 30, 50, 333, 999])
def test_ddim_timesteps(steps):
    expected = reference(STABLE_DIFFUSION, steps).timesteps.tolist()
    assert ddim_timesteps(NoiseSchedule(STABLE_DIFFUSION), steps) == expected


@pytest.mark.parametrize("steps", [0, -1, 1000])
def test_impossible_step_counts(steps):
    schedule = NoiseSchedule(STABLE_DIFFUSION)
    with pytest.raises(InputError, match=f"steps {steps}: expected 1 to 999"):
        sampler_timesteps(schedule, "ddim", steps)


@each_prediction
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("timestep", [951, 501, 1], ids=["first", "middle", "last"])
def test_ddim_step(config, eta, timestep):
    """Noise comes from one generator per picture, so a picture does not depend on the others of its batch."""
    noise = torch.stack([torch.randn(SHAPE[1:], generator=generator) for generator in seeds(5, 6, 7)])
    expected = reference(config).step(normal(0), timestep, normal(1), eta=eta, variance_noise=noise)
    schedule = NoiseSchedule(config)
    clean, noise = schedule.clean_and_noise(normal(0), normal(1), torch.tensor([timestep]))
    now, fresh = Estimate(timestep, clean, noise), FreshNoise(eta, seeds(5, 6, 7))
    ours = ddim_step(schedule, now, max(timestep - 50, 0), None, fresh)
    torch.testing.assert_close(ours, expected.prev_sample, rtol=1e-4, atol=1e-4)


@each_prediction
def test_ddim_with_the_true_noise_arrives_at_the_clean_latents(config):
    """The last step lands on timestep 0, whose little noise stays, as in Stable Diffusion."""
    schedule, clean, noise = NoiseSchedule(config), normal(0), normal(1)

    def oracle(latents: Tensor, timesteps: Tensor) -> Tensor:
        return schedule.target(clean, noise, timesteps)

    first = torch.full((len(clean),), ddim_timesteps(schedule, 20)[0])
    *_, (latents, _) = draw(schedule, oracle, schedule.add_noise(clean, noise, first), 20)
    zero = torch.zeros(len(clean), dtype=torch.long)
    torch.testing.assert_close(latents, schedule.add_noise(clean, noise, zero), rtol=0, atol=1e-4)
    assert (latents - clean).std() < 0.03


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_leaves_the_starting_latents_alone(eta):
    schedule, start = NoiseSchedule(STABLE_DIFFUSION), normal(0)
    latents = draw(schedule, lambda x, t: 0.1 * x, start, 3, "ddim", eta)
    assert len(latents) == 3 and torch.equal(start, normal(0))


def reference_dpm(config: ScheduleConfig, steps: int) -> DPMSolverMultistepScheduler:
    """What users of diffusers put in DDIM's place."""
    scheduler = DPMSolverMultistepScheduler.from_config(reference(config).config)
    scheduler.set_timesteps(steps)
    return scheduler


def stand_in(latents: Tensor, timesteps: Tensor) -> Tensor:
    """A network of one line: its predictions bend with the latents and with time."""
    return torch.tanh(latents) * (0.5 + timesteps.view(-1, 1, 1, 1) / 1000)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50, 333, 999])
def test_dpm_timesteps(steps):
    expected = reference_dpm(STABLE_DIFFUSION, steps).timesteps.tolist()
    assert dpm_timesteps(NoiseSchedule(STABLE_DIFFUSION), steps) == expected


@each_prediction
@pytest.mark.parametrize("steps", [1, 2, 3, 9, 14, 15, 20, 31])
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


def test_dpm_needs_fewer_steps():
    """It comes closer than DDIM to where a thousand steps lead, from the same noise with as many calls."""
    schedule, start = NoiseSchedule(STABLE_DIFFUSION), normal(0)
    end, ddim, dpm = (draw(schedule, stand_in, start, steps, sampler)[-1][0]
                      for steps, sampler in ((999, "dpm"), (20, "ddim"), (20, "dpm")))
    assert (dpm - end).std() < (ddim - end).std() / 3


def test_predictions_of_the_clean_latents():
    """An oracle's are the truth from the first step on, whatever the sampler."""
    schedule, clean, noise = NoiseSchedule(STABLE_DIFFUSION), normal(0), normal(1)
    for sampler, first in (("ddim", 751), ("dpm", 999)):
        start = schedule.add_noise(clean, noise, torch.full((len(clean),), first))
        predictions = [p for _, p in draw(schedule, lambda latents, timesteps: noise, start, 4, sampler)]
        torch.testing.assert_close(torch.stack(predictions), clean.expand(4, *SHAPE), rtol=0, atol=1e-4)


def test_another_sampler_is_one_entry(monkeypatch):
    """Euler's method on the probability flow, whose x / alpha moves along the noise: one function, one entry."""
    def euler_step(schedule: NoiseSchedule, now: Estimate, next_timestep: int, earlier: Estimate | None,
                   fresh: FreshNoise) -> Tensor:
        abar, abar_next = (schedule.alphas_cumprod[t] for t in (now.timestep, next_timestep))
        scaled = now.clean + ((1 - abar) / abar) ** 0.5 * now.noise
        scaled = scaled + (((1 - abar_next) / abar_next) ** 0.5 - ((1 - abar) / abar) ** 0.5) * now.noise
        return abar_next**0.5 * scaled

    monkeypatch.setitem(SAMPLERS, "euler", Sampler(ddim_timesteps, euler_step))
    schedule = NoiseSchedule(STABLE_DIFFUSION)
    ours = draw(schedule, stand_in, normal(0), 10, "euler")[-1][0]
    torch.testing.assert_close(ours, draw(schedule, stand_in, normal(0), 10)[-1][0], rtol=1e-3, atol=1e-3)  # is DDIM


class Recorder:
    """A model that answers with its text, and remembers how many pictures each call was for."""

    def __init__(self):
        self.calls = []

    def __call__(self, latents: Tensor, timesteps: Tensor, text_embeds: Tensor) -> Tensor:
        self.calls.append((len(latents), len(timesteps), len(text_embeds)))
        return latents * text_embeds.mean(dim=(1, 2)).view(-1, 1, 1, 1) + timesteps.view(-1, 1, 1, 1)


@pytest.mark.parametrize("scale, forwards_of", [(7.5, 6), (0.0, 6), (1.0, 3)])
def test_guidance(scale, forwards_of):
    """uncond + scale * (cond - uncond) from one forward; at scale 1 of the conditional half only."""
    latents, timesteps = normal(0), torch.tensor([1, 2, 3])
    cond, uncond = torch.tensor([2.0, 3.0, 4.0]), torch.tensor([-1.0, 0.0, 5.0])
    model = Recorder()
    found = guided(model, cond.view(-1, 1, 1), uncond.view(-1, 1, 1), scale)(latents, timesteps)
    factor = (uncond + scale * (cond - uncond)).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, latents * factor + timesteps.view(-1, 1, 1, 1))
    assert model.calls == [(forwards_of,) * 3]
