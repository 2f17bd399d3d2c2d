"""The mathematics of diffusion: noise schedule, forward process, training target, DDIM and DPM-Solver++, guidance.

Nothing here knows a network: sampling takes any callable that predicts what the schedule's `prediction_type` says.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from tinydb.config import InputError, ScheduleConfig


class NoiseSchedule:
    """q(x_t | x_0) = N(sqrt(alphas_cumprod_t) x_0, (1 - alphas_cumprod_t) I)  (arXiv 2006.11239, equation 4)."""

    def __init__(self, config: ScheduleConfig):
        self.config = config
        if config.beta_schedule == "linear":
            betas = np.linspace(config.beta_start, config.beta_end, config.num_train_timesteps)
        else:  # scaled_linear: the square roots are evenly spaced
            betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps) ** 2
        self.alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas)).float()  # the product itself in float64

    def coefficients(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alphas_cumprod_t) and sqrt(1 - alphas_cumprod_t), (B,) -> (B, 1, 1, 1) each, placed like `like`."""
        alphas_cumprod = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return alphas_cumprod.sqrt().to(like), (1 - alphas_cumprod).sqrt().to(like)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The forward process in one jump: x_t = sqrt(alphas_cumprod_t) x_0 + sqrt(1 - alphas_cumprod_t) noise."""
        alpha, sigma = self.coefficients(timesteps, latents)
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network learns to predict: the noise, or v = alpha noise - sigma x_0 (arXiv 2202.00512, app. D)."""
        if self.config.prediction_type == "epsilon":
            return noise
        alpha, sigma = self.coefficients(timesteps, latents)
        return alpha * noise - sigma * latents

    def split(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """What a prediction says of `noisy`: the clean latents x_0 and the noise in it."""
        alpha, sigma = self.coefficients(timesteps, noisy)
        if self.config.prediction_type == "epsilon":
            return (noisy - sigma * prediction) / alpha, prediction
        return alpha * noisy - sigma * prediction, alpha * prediction + sigma * noisy


def timesteps_of(schedule: NoiseSchedule, sampler: str, steps: int) -> list[int]:
    """`steps` evenly spaced timesteps from noisy to clean. For 20 of "ddim" 951, 901 ... 1, shifted by one as in Stable
    Diffusion; of "dpm" 999, 949 ... 50, since its last step goes on to no noise at all."""
    last = schedule.config.num_train_timesteps - 1
    if not 1 <= steps <= last:
        raise InputError(f"steps {steps}: expected 1 to {last}, the timesteps that the model was trained on")
    if sampler == "dpm":
        return [round(i * last / steps) for i in range(steps, 0, -1)]
    stride = schedule.config.num_train_timesteps // steps
    return [i * stride + 1 for i in reversed(range(steps))]


def ddim_step(schedule: NoiseSchedule, prediction: Tensor, latents: Tensor, timestep: int, previous: int,
              eta: float = 0.0, generators: list[torch.Generator] | None = None) -> Tensor:
    """One step x_t -> x_previous of DDIM (arXiv 2010.02502, equation 12).

    `eta` 0 is deterministic; 1 is DDPM's variance, its noise drawn from one generator per picture. The last step's
    `previous` lies before 0, where alphas_cumprod stays that of timestep 0.
    """
    clean, noise = schedule.split(prediction, latents, torch.tensor([timestep]))
    alpha_t, alpha_prev = (schedule.alphas_cumprod[max(t, 0)].item() for t in (timestep, previous))
    sigma = eta * ((1 - alpha_prev) / (1 - alpha_t) * (1 - alpha_t / alpha_prev)) ** 0.5  # equation 16
    latents = alpha_prev**0.5 * clean + (1 - alpha_prev - sigma**2) ** 0.5 * noise
    if eta > 0:
        fresh = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
        latents = latents + sigma * fresh.to(latents)
    return latents


def dpm_step(schedule: NoiseSchedule, prediction: Tensor, latents: Tensor, timestep: int, previous: int | None,
             before: tuple[int, Tensor] | None) -> tuple[Tensor, tuple[int, Tensor]]:
    """One step x_t -> x_previous of DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2).

    It is DDIM's step towards a better guess of x_0. DDIM keeps the guess of this timestep; here it moves on along the
    line through this one and the one `before`, half a step of log(alpha / sigma) ahead. Returns the latents, and what
    to give as `before` next time. The first step has None there; the last one, `previous` None, ends at the guess.
    """
    def alpha_sigma(t: int) -> tuple[float, float]:
        alphas_cumprod = schedule.alphas_cumprod[t].item()
        return alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5

    def log_snr(t: int) -> float:
        alpha, sigma = alpha_sigma(t)
        return math.log(alpha / sigma)

    clean, _ = schedule.split(prediction, latents, torch.tensor([timestep]))
    if previous is None:
        return clean, (timestep, clean)
    guess = clean
    if before is not None:
        timestep_before, clean_before = before
        ratio = (log_snr(previous) - log_snr(timestep)) / (log_snr(timestep) - log_snr(timestep_before))
        guess = clean + ratio / 2 * (clean - clean_before)
    (alpha, sigma), (alpha_prev, sigma_prev) = alpha_sigma(timestep), alpha_sigma(previous)
    return alpha_prev * guess + sigma_prev * (latents - alpha * guess) / sigma, (timestep, clean)


def guided(model: Callable[[Tensor, Tensor, Tensor], Tensor], text_embeds: Tensor, negative_embeds: Tensor,
           guidance_scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Classifier-free guidance (arXiv 2207.12598, equation 6): uncond + guidance_scale * (cond - uncond).

    `text_embeds` and `negative_embeds` are (B, T, C). Both predictions come from one forward of twice the batch;
    at scale 1 the formula leaves only the conditional one, and only that is computed.
    """
    def conditional(latents: Tensor, timesteps: Tensor) -> Tensor:
        return model(latents, timesteps, text_embeds)

    def both(latents: Tensor, timesteps: Tensor) -> Tensor:
        prediction = model(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), embeds)
        uncond, cond = prediction.chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    embeds = torch.cat([negative_embeds, text_embeds])
    return conditional if guidance_scale == 1 else both


def sample(schedule: NoiseSchedule, denoiser: Callable[[Tensor, Tensor], Tensor], latents: Tensor, steps: int,
           sampler: str = "ddim", eta: float = 0.0, generators: list[torch.Generator] | None = None,
           first: int = 0) -> Iterator[Tensor]:
    """From pure noise `latents` (B, C, h, w) by "ddim", or by "dpm", which needs fewer steps and knows no `eta`; yields
    the latents after each step, the last ones the result. Step `first` is the first one, for latents less noisy."""
    timesteps, before = timesteps_of(schedule, sampler, steps), None
    stride = schedule.config.num_train_timesteps // steps
    for i, timestep in enumerate(timesteps[first:], first):
        prediction = denoiser(latents, torch.full((len(latents),), timestep, device=latents.device))
        if sampler == "dpm":
            previous = timesteps[i + 1] if i + 1 < steps else None
            latents, before = dpm_step(schedule, prediction, latents, timestep, previous, before)
        else:
            latents = ddim_step(schedule, prediction, latents, timestep, timestep - stride, eta, generators)
        yield latents
