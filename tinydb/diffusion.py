"""The mathematics of diffusion: noise schedule, forward process, training target, samplers, guidance.

Everywhere, abar_t is the schedule's alphas_cumprod at timestep t, alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t)
(so alpha_t is not the 1 - beta_t of the DDPM paper):

    x_t = alpha_t x_0 + sigma_t noise

Nothing here knows a network: sampling takes any callable that predicts what the schedule's `prediction_type` says.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tinydb.config import InputError, ScheduleConfig


class NoiseSchedule:
    """q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I)  (arXiv 2006.11239, equation 4).

    beta_t is the variance of the noise that step t of the forward process adds, and abar_t the share of x_0's variance
    that is left after it.
    """

    def __init__(self, config: ScheduleConfig):
        self.config = config
        if config.beta_schedule == "linear":
            betas = np.linspace(config.beta_start, config.beta_end, config.num_train_timesteps)
        else:  # scaled_linear: the square roots are evenly spaced
            betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps) ** 2
        self.alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas)).float()  # the product itself in float64
        self.by_device = {}  # a copy on each device: making one in each step would make a GPU wait

    def alpha_sigma(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t for timesteps (B,), (B, 1, 1, 1) each, with the device and dtype of `like`."""
        device = timesteps.device
        if device not in self.by_device:
            self.by_device[device] = self.alphas_cumprod.to(device)
        abar = self.by_device[device][timesteps].view(-1, 1, 1, 1)
        return abar.sqrt().to(like), (1 - abar).sqrt().to(like)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The forward process in one jump: x_t = alpha_t x_0 + sigma_t noise; latents (B, C, h, w), timesteps (B,)."""
        alpha, sigma = self.alpha_sigma(timesteps, latents)
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network learns to predict: the noise, or v = alpha noise - sigma x_0 (arXiv 2202.00512, app. D)."""
        if self.config.prediction_type == "epsilon":
            return noise
        alpha, sigma = self.alpha_sigma(timesteps, latents)
        return alpha * noise - sigma * latents

    def clean_and_noise(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """What a prediction says about x_t = `noisy`: the clean latents x_0 and the noise in it. Inverts `target`."""
        alpha, sigma = self.alpha_sigma(timesteps, noisy)
        if self.config.prediction_type == "epsilon":
            return (noisy - sigma * prediction) / alpha, prediction
        return alpha * noisy - sigma * prediction, alpha * prediction + sigma * noisy


# ------------------------------------------------------------------------------------------------ samplers


@dataclass(frozen=True)
class Estimate:
    """What the network believes at one timestep: x_t = alpha_t clean + sigma_t noise, both (B, C, h, w)."""

    timestep: int
    clean: Tensor
    noise: Tensor


def ddim_timesteps(schedule: NoiseSchedule, steps: int) -> list[int]:
    """Evenly spaced timesteps from noisy to clean, shifted by one as in Stable Diffusion; 50 are 981, 961 ... 1."""
    stride = schedule.config.num_train_timesteps // steps
    return [i * stride + 1 for i in reversed(range(steps))]


def ddim_step(schedule: NoiseSchedule, now: Estimate, next_timestep: int, earlier: Estimate | None) -> Tensor:
    """One step x_t -> x_t' of DDIM (arXiv 2010.02502, equation 12 without fresh noise): the same clean latents and the
    same noise, mixed as at t'.

        x_t' = alpha_t' clean + sigma_t' noise

    `earlier`, the estimate of the step before, is not needed here: it is for multistep samplers.
    """
    abar_next = schedule.alphas_cumprod[next_timestep].item()
    return abar_next**0.5 * now.clean + (1 - abar_next) ** 0.5 * now.noise


def dpm_timesteps(schedule: NoiseSchedule, steps: int) -> list[int]:
    """Evenly spaced timesteps from the noisiest on; 20 are 999, 949 ... 50, and the last step goes from 50 to 0.

    DDIM never asks at timestep 999 and spends its last step on 1 -> 0; with few steps that matters. This is diffusers'
    timestep_spacing="linspace", the default of its DPMSolverMultistepScheduler.
    """
    from_clean = np.linspace(0, schedule.config.num_train_timesteps - 1, steps + 1).round().astype(int)
    return from_clean[1:][::-1].tolist()


def dpm_step(schedule: NoiseSchedule, now: Estimate, next_timestep: int, earlier: Estimate | None) -> Tensor:
    """One step x_t -> x_t' of DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2). The last step, to timestep 0, leaves no
    noise at all; DDIM's leaves that of abar_0, as Stable Diffusion always did.

    DDIM holds the estimate of the clean latents fixed over a step. It really moves, about linearly in
    lambda = log(alpha / sigma), and the `earlier` estimate tells how fast. So extrapolate it to the middle of this
    step, and choose the noise such that alpha_t clean + sigma_t noise is still x_t.
    """
    if next_timestep == 0:
        return now.clean
    if earlier is not None:
        abar = [schedule.alphas_cumprod[t].item() for t in (earlier.timestep, now.timestep, next_timestep)]
        lambda_earlier, lambda_now, lambda_next = [0.5 * math.log(a / (1 - a)) for a in abar]
        change = (now.clean - earlier.clean) * (lambda_next - lambda_now) / (lambda_now - lambda_earlier) / 2
        now = replace(now, clean=now.clean + change, noise=now.noise - math.exp(lambda_now) * change)
    return ddim_step(schedule, now, next_timestep, None)


@dataclass(frozen=True)
class Sampler:
    """The timesteps at which a sampler asks the network, from noisy to clean, how it steps from one to the next, and
    what other programs call it."""

    timesteps: Callable[[NoiseSchedule, int], list[int]]
    step: Callable[[NoiseSchedule, Estimate, int, Estimate | None], Tensor]
    name: str


SAMPLERS = {"ddim": Sampler(ddim_timesteps, ddim_step, "DDIM"), "dpm": Sampler(dpm_timesteps, dpm_step, "DPM++ 2M")}


def sampler_timesteps(schedule: NoiseSchedule, sampler: str, steps: int) -> list[int]:
    """The `steps` timesteps of the sampler of that name; InputError where the model was not trained on as many."""
    limit = schedule.config.num_train_timesteps - 1
    if not 1 <= steps <= limit:
        raise InputError(f"steps {steps}: expected 1 to {limit}, fewer than the model's timesteps")
    return SAMPLERS[sampler].timesteps(schedule, steps)


def guided(model: Callable[[Tensor, int, Tensor], Tensor], text_embeds: Tensor, negative_embeds: Tensor,
           guidance_scale: float, stop_timestep: int = 0) -> Callable[[Tensor, int], Tensor]:
    """Classifier-free guidance (arXiv 2207.12598, equation 6): uncond + guidance_scale * (cond - uncond).

    `text_embeds` and `negative_embeds`, of the empty prompt as a rule, are (B, T, C): pretraining left out the caption
    of some pictures, so the model knows pictures without one. Both predictions come from one forward of twice the
    batch. At scale 1 the formula leaves only the conditional one, and only that is computed. The same holds at
    `stop_timestep` and below: with little noise left, guidance overdoes details that are right already (arXiv
    2404.07724).
    """
    both_embeds = torch.cat([negative_embeds, text_embeds])

    def denoiser(latents: Tensor, timestep: int) -> Tensor:
        if guidance_scale == 1 or timestep <= stop_timestep:
            return model(latents, timestep, text_embeds)
        uncond, cond = model(latents.repeat(2, 1, 1, 1), timestep, both_embeds).chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    return denoiser


def sample(schedule: NoiseSchedule, denoiser: Callable[[Tensor, int], Tensor], latents: Tensor, sampler: str,
           timesteps: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Take all steps: from `latents` (B, C, h, w), as noisy as `timesteps[0]`, to clean ones.

    Yields, after each step, the latents and the clean latents that the network predicted in it: the last latents are
    the result, and the predictions a preview.
    """
    earlier = None
    for timestep, next_timestep in zip(timesteps, [*timesteps[1:], 0]):  # each sampler's step says how it ends at 0
        here = torch.full((len(latents),), timestep, device=latents.device)  # (B,)
        clean, noise = schedule.clean_and_noise(denoiser(latents, timestep), latents, here)
        now = Estimate(timestep, clean, noise)
        latents = SAMPLERS[sampler].step(schedule, now, next_timestep, earlier)
        earlier = now
        yield latents, clean
