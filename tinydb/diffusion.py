"""The mathematics of diffusion: noise schedule, forward process, training target, two samplers, guidance.

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

    def log_alpha_by_sigma(self, timestep: int) -> float:
        """lambda_t = log(alpha_t / sigma_t), half the logarithm of the signal-to-noise ratio."""
        alpha_cumprod = self.alphas_cumprod[timestep].item()
        return 0.5 * math.log(alpha_cumprod / (1 - alpha_cumprod))

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


def ddim_timesteps(schedule: NoiseSchedule, steps: int) -> list[int]:
    """`steps` evenly spaced timesteps from noisy to clean, shifted by one as in Stable Diffusion: 981, 961 ... 1."""
    stride = schedule.config.num_train_timesteps // steps
    return [i * stride + 1 for i in reversed(range(steps))]


def dpm_timesteps(schedule: NoiseSchedule, steps: int) -> list[int]:
    """`steps` evenly spaced timesteps from the noisiest on, 0 being left for the end: 999, 949 ... 50.

    DDIM keeps off timestep 999 and spends its last step on 1 -> 0; with few steps that matters. This is diffusers'
    "linspace", that is what `DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)` takes in our folders.
    """
    return np.linspace(0, schedule.config.num_train_timesteps - 1, steps + 1).round().astype(int)[:0:-1].tolist()


SAMPLERS = {"ddim": ddim_timesteps, "dpm": dpm_timesteps}


def sampler_timesteps(schedule: NoiseSchedule, steps: int, sampler: str) -> list[int]:
    """The timesteps at which the sampler "ddim" or "dpm" asks the network, from noisy to clean."""
    limit = schedule.config.num_train_timesteps - 1
    if not 1 <= steps <= limit:
        raise InputError(f"steps {steps}: expected 1 to {limit}, the timesteps that the model was trained on")
    if sampler not in SAMPLERS:
        raise InputError(f"sampler {sampler!r}: expected one of {', '.join(SAMPLERS)}")
    return SAMPLERS[sampler](schedule, steps)


def ddim_step(schedule: NoiseSchedule, clean: Tensor, noise: Tensor, timestep: int, previous: int,
              eta: float = 0.0, generators: list[torch.Generator] | None = None) -> Tensor:
    """One step x_t -> x_previous of DDIM (arXiv 2010.02502, equation 12), from the two that x_t is said to be made of.

    `eta` 0 is deterministic; 1 is DDPM's variance, its noise drawn from one generator per picture.
    """
    alpha_t, alpha_prev = (schedule.alphas_cumprod[t].item() for t in (timestep, previous))
    sigma = eta * ((1 - alpha_prev) / (1 - alpha_t) * (1 - alpha_t / alpha_prev)) ** 0.5  # equation 16
    latents = alpha_prev**0.5 * clean + (1 - alpha_prev - sigma**2) ** 0.5 * noise
    if eta > 0:
        fresh = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
        latents = latents + sigma * fresh.to(latents)
    return latents


def dpm_step(schedule: NoiseSchedule, clean: Tensor, noise: Tensor, timestep: int, previous: int,
             earlier: tuple[Tensor, int] | None) -> Tensor:
    """One step x_t -> x_previous of DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2); 0 is the end, without any noise.

    DDIM's step is exact if the network would say the same `clean` all the way to `previous`. But it changes, and
    `earlier`, the clean latents and timestep of the step before, tells how: about linearly in lambda. So take `clean`
    from the middle of this step, and `noise` so that alpha_t clean + sigma_t noise still are the same latents.
    """
    if previous == 0:
        return clean
    if earlier is not None:
        earlier_clean, earlier_timestep = earlier
        lambda_earlier, lambda_t, lambda_prev = map(schedule.log_alpha_by_sigma, (earlier_timestep, timestep, previous))
        change = (clean - earlier_clean) * (lambda_prev - lambda_t) / (lambda_t - lambda_earlier) / 2
        clean, noise = clean + change, noise - math.exp(lambda_t) * change
    return ddim_step(schedule, clean, noise, timestep, previous)


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
           skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """From pure noise to clean latents (B, C, h, w) in `steps` steps of the sampler "ddim" or "dpm" (DPM-Solver++ 2M).

    Yields, after each step, the latents and the clean latents that the network predicted in it: the last latents are
    the result, and the predictions a preview. `eta` and `generators` are for `ddim_step`. With `skip` the sampler
    starts that many steps later, from latents that carry the noise of its timestep there.
    """
    timesteps = sampler_timesteps(schedule, steps, sampler)
    if sampler == "dpm" and eta > 0:
        raise InputError(f"eta {eta}: the sampler dpm adds no noise; expected 0, or the sampler ddim")
    earlier = None
    for timestep, previous in zip(timesteps[skip:], [*timesteps[skip + 1 :], 0]):
        prediction = denoiser(latents, torch.full((len(latents),), timestep, device=latents.device))
        clean, noise = schedule.split(prediction, latents, torch.tensor([timestep]))
        if sampler == "ddim":
            latents = ddim_step(schedule, clean, noise, timestep, previous, eta, generators)
        else:
            latents = dpm_step(schedule, clean, noise, timestep, previous, earlier)
        earlier = clean, timestep
        yield latents, clean
