"""DreamBooth (arXiv 2208.12242): teach Stable Diffusion one subject from 3 to 6 pictures of it.

    python train.py --images weights/subjects/rex --class dog            # the model in the box, on a laptop
    python train.py --images my_dog --class dog --weights weights/sd15   # Stable Diffusion, on a GPU; --resume goes on
    torchrun --nproc_per_node 4 train.py --images my_dog --class dog --weights weights/sd15

The idea: fine-tune UNet and text encoder on the pictures under "a photo of ohwx dog", where `ohwx` is a word that means
nothing yet. A few pictures alone would soon turn every dog into this one (language drift). So each batch also has class
images: pictures of "a photo of a dog" that the model drew before training, so that other dogs stay other dogs:

    loss = |prediction - target|^2 over instance pictures + prior_weight * the same over class images

A step of training is `DreamBoothLoss` and the loop in `main`; tinydb/run.py lists what a run writes into OUT.
"""

import copy
import math
import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

from tinydb import cli
from tinydb.class_images import ClassImages, plain_noun
from tinydb.cli import choose_device, choose_dtype, option, say
from tinydb.clip import EncoderLayer
from tinydb.config import Checked, Recipe, require, write_json
from tinydb.data import Examples, Latents, random_batch, read_pictures, to_device
from tinydb.layers import ResnetBlock2D
from tinydb.lora import attach, without_updates
from tinydb.lora_files import save_lora
from tinydb.pictures import no_picture_in, pictures_digest
from tinydb.pipeline import DEFAULT_IDENTIFIER, LAST_SEED, StableDiffusion, load
from tinydb.prompts import prompt_remarks, read_captions, subject_prompts
from tinydb.run import Run, StopSignal, check_finite, check_processes, earlier_options, memory_plan, usual_folder
from tinydb.scores import Scorer, choose_clip
from tinydb.storage import (LORA_FILE, TINY, WEIGHT_FILES, check_tensors, checkpoints, model_folder, read_tensors,
                            save_tensors, written_whole)
from tinydb.unet import Transformer2DModel


# ------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True)
class Settings(Checked):
    """The command line. None is the recipe's number, where the help says so. `free`: may differ on --resume.
    `noted=False`: not in config.json. `formerly`: the option's old name. `before`: its value in runs older than it."""

    images: str = option("", "folder with 3 to 6 pictures of your subject", free=True)
    class_noun: str = option("", "what it is, in a word the model knows: dog, teapot", flag="--class", metavar="NOUN")
    weights: str = option(str(TINY), "model folder to start from", free=True)
    out: str | None = option(None, "folder to write (default: runs/<name of IMAGES>)", free=True)
    identifier: str = option(DEFAULT_IDENTIFIER, "the word that will name your subject; a rare one without a meaning")
    steps: int | None = option(None, "training steps (default: the model's recipe)", least=1, free=True)
    batch: int | None = option(None, "pictures of your subject at once (default: recipe)", least=1, most=10**4)
    accumulate: int = option(1, "micro-steps per step: a larger batch in the same memory", least=1, most=10**4)
    freeze_text: bool = option(False, "train the UNet alone: less memory, less likeness")
    lora: int | None = option(None, "rank of low-rank updates, learnt beside a model that stays as it is; 0 trains the "
                                    "model itself (default: recipe)", metavar="RANK", least=0, most=1024)
    lora_conv: bool | None = option(None, "with --lora, also of the convolutions of blocks that have no "
                                          "transformer (default: recipe)", before=False)
    lr: float | None = option(None, "learning rate (default: recipe)", above=0)
    lr_text: float | None = option(None, "that of the text encoder (default: recipe, scaled as --lr is)", above=0)
    lr_decay: float | None = option(None, "share of the steps, at the end, over which the rates fall to 0; with 0 they "
                                          "stay constant (default: recipe)", least=0, most=1, before=0.0)
    prior_weight: float = option(1.0, "weight of the class images' loss; 0 trains without them", least=0)
    class_images: int | None = option(None, "class images to train with (default: recipe)", least=1, most=10**5,
                                      cure="; --prior-weight 0 does without them")
    class_dir: str | None = option(None, "class images of your own, or an earlier run's class_images", free=True)
    class_prompts: str | None = option(None, "file of prompts, see weights/class_prompts.txt; or: plain", free=True,
                                      before="plain")
    frozen_prior: bool | None = option(None, "keep the class better, by what the model predicted before training; "
                                             "takes a second model, except with --lora (default: recipe)", before=False)
    precision: str = option("auto", "of the computation; trained weights are always fp32. auto: bf16 or fp16 on a GPU",
                            choices=("auto", "fp32", "bf16", "fp16"), free=True)
    recompute: bool = option(False, "keep fewer activations and recompute them: less memory, slower", free=True,
                             formerly="checkpointing")
    offload: bool = option(False, "keep fp32 weights and optimizer on the CPU, low-precision weights on the GPU: the "
                                  "whole model in a third of its memory; slower")
    compile: bool = option(False, "torch.compile the UNet: minutes at the start, faster steps; for long runs")
    save_every: int | None = option(None, "steps between checkpoints; 0 is never (default: recipe)", least=0, free=True)
    sample_every: int = option(0, "steps between more previews; 0 is never", least=0, free=True)
    clip: str | None = option(None, "CLIP folder that scores each checkpoint, to see when to stop (default: "
                                    "weights/tiny-clip for the model in the box, else none)", free=True)
    keep: int = option(2, "checkpoints to keep, besides the best one", least=1, free=True)
    resume: bool = option(False, "continue the run in OUT from its newest checkpoint", noted=False)
    log: str | None = option(None, "also log to tensorboard or wandb", choices=("tensorboard", "wandb"), free=True)
    config: str | None = option(None, "JSON file with any of these options, as OUT/config.json has them", noted=False)
    seed: int = option(0, "decides everything random", least=0, most=LAST_SEED)
    device: str = option("auto", "cpu, cuda, mps, ... or auto", free=True)

    def resolve(self, recipe: Recipe) -> "Settings":
        """These settings with the recipe's numbers where nothing was given; InputError for what is missing."""
        require(bool(self.images), "--images is missing; expected a folder with 3 to 6 pictures of your subject")
        names = ("steps", "lr_decay", "batch", "save_every", "class_images", "frozen_prior", "lora", "lora_conv")
        from_recipe = {name: getattr(recipe, name) for name in names if getattr(self, name) is None}
        lora = from_recipe.get("lora", self.lora)
        unet_rate, text_rate = (recipe.lr_lora, recipe.lr_lora_text) if lora else (recipe.lr, recipe.lr_text)
        lr = self.lr or (recipe.lr_freeze_text if self.freeze_text and not lora else unet_rate)
        lr_text = self.lr_text or text_rate * (lr / unet_rate)  # --lr scales both rates
        return replace(self, **from_recipe, lr=lr, lr_text=None if self.freeze_text else lr_text,
                       class_noun=plain_noun(self.class_noun, self.identifier),
                       out=self.out or usual_folder(self.images))

    @property
    def examples_per_set(self) -> list[int]:
        """Pictures of each set in a micro-step. A frozen prior needs a third as many class images (DreamBoothLoss)."""
        class_images = math.ceil(self.batch / 3) if self.frozen_prior else self.batch
        return [self.batch, class_images] if self.prior_weight > 0 else [self.batch]


# ------------------------------------------------------------------------------------------------ the loss


class DreamBoothLoss(nn.Module):
    """Text encoder and UNet as one module, so that DDP synchronises both. Its forward gives the error of each set.

    `prompts[s][i]` is the prompt of picture i of set s: 0 is instance, and 1, where there is a prior, class.
    `frozen` predicts the target of class images: both networks as before training or, with `lora`, these very ones
    without the updates. It predicts about the mean of all noise (or v) that fits x_t, which varies less than one draw.
    """

    def __init__(self, sd: StableDiffusion, prompts: list[list[str]], freeze_text: bool,
                 lora: nn.ModuleDict | None = None, frozen: nn.ModuleDict | None = None):
        super().__init__()
        self.unet = sd.unet.requires_grad_(lora is None)
        self.text_encoder = sd.text_encoder.requires_grad_(lora is None and not freeze_text)
        self.lora = lora  # low-rank updates: where there are any, they alone are trained
        self.frozen = frozen
        self.schedule = sd.schedule
        distinct = list(dict.fromkeys(prompt for set_prompts in prompts for prompt in set_prompts))
        self.prompt_rows = [torch.tensor([distinct.index(prompt) for prompt in set_prompts]) for set_prompts in prompts]
        self.prompt_ids = sd.tokenizer.encode(distinct)  # (P, T)

    def forward(self, batch: list[Examples]) -> Tensor:
        """Examples from S sets, B in all -> the mean squared error of each set, (S,)."""
        counts = [len(examples.timesteps) for examples in batch]
        latents = torch.cat([examples.latents for examples in batch])  # (B, C, h, w)
        noise = torch.cat([examples.noise for examples in batch])  # (B, C, h, w)
        timesteps = torch.cat([examples.timesteps for examples in batch])  # (B,)
        # the text encoder sees each distinct prompt once; `inverse` says which one each example has
        rows = torch.cat([set_rows[examples.indices] for set_rows, examples in zip(self.prompt_rows, batch)])
        needed, inverse = rows.unique(return_inverse=True)
        prompt_ids, inverse = (to_device(tensor, latents.device) for tensor in (self.prompt_ids[needed], inverse))
        text_embeds = self.text_encoder(prompt_ids)[inverse]  # (B, T, C)

        noisy_latents = self.schedule.add_noise(latents, noise, timesteps)
        prediction = self.unet(noisy_latents, timesteps, text_embeds)
        target = self.schedule.target(latents, noise, timesteps)
        if self.frozen is not None:
            n = counts[0]  # after them come the class images
            with torch.no_grad(), without_updates(self.lora):
                frozen_embeds = self.frozen.text_encoder(prompt_ids)[inverse[n:]]
                frozen_prediction = self.frozen.unet(noisy_latents[n:], timesteps[n:], frozen_embeds)
            target = torch.cat([target[:n], frozen_prediction.float()])
        errors = F.mse_loss(prediction.float(), target.float(), reduction="none")
        return torch.stack([error.mean() for error in errors.split(counts)])


def recompute_activations(model: nn.Module) -> None:
    """Keep only the input of each block, and compute the rest again in the backward pass; gradients stay the same."""
    for block in model.modules():
        if isinstance(block, (ResnetBlock2D, Transformer2DModel, EncoderLayer)):
            block.forward = partial(recompute, block.forward, use_reentrant=False, preserve_rng_state=False)


# ---------------------------------------------------------------------------------------------- checkpoints


def write_result(path: Path, sd: StableDiffusion, weights: Path, lora: nn.ModuleDict | None) -> None:
    """What was learnt: a model folder to sample from or, with --lora, a file of updates."""
    if lora:
        save_lora(lora, path, sd.info)
    else:
        sd.write(path, torch.float32, vae_from=weights)


def save_checkpoint(folder: Path, sd: StableDiffusion, weights: Path, model: DreamBoothLoss,
                    optimizer: torch.optim.Optimizer, state: dict[str, object]) -> None:
    """The result so far and, to resume, what AdamW knows of each trained parameter and a few numbers; whole or not."""
    with written_whole(folder) as path:
        path.mkdir()
        write_result(path / LORA_FILE if model.lora else path, sd, weights, model.lora)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        for kind in ("exp_avg", "exp_avg_sq", "step"):  # one by one: what is being written takes host memory
            tensors = {f"{kind}.{name}": optimizer.state[parameter][kind] for name, parameter in trained.items()}
            save_tensors(tensors, path / f"state.{kind}.safetensors")
        write_json(path / "state.json", state)


def load_checkpoint(folder: Path, model: DreamBoothLoss, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and the optimizer's tensors back; InputError if any tensor is missing."""
    files = {part: folder / part / WEIGHT_FILES[part] for part in ("unet", "text_encoder")}
    for part, path in ({"lora": folder / LORA_FILE} if model.lora else files).items():
        stored = read_tensors(path)
        module = getattr(model, part)
        check_tensors(stored, {name: tensor.shape for name, tensor in module.state_dict().items()}, path)
        module.load_state_dict(stored)

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for kind in ("exp_avg", "exp_avg_sq", "step"):
        path = folder / "state.safetensors"  # of an older checkpoint, with all kinds
        path = path if path.exists() else folder / f"state.{kind}.safetensors"
        stored = {key: tensor for key, tensor in read_tensors(path).items() if key.startswith(f"{kind}.")}
        shapes = {f"{kind}.{name}": torch.Size([]) if kind == "step" else p.shape for name, p in trained.items()}
        check_tensors(stored, shapes, path)
        for name, parameter in trained.items():
            # laid out like the parameter: files are row-major, and fused AdamW pairs elements by their place in memory
            tensor = stored[f"{kind}.{name}"]
            like = tensor if kind == "step" else parameter.detach()
            optimizer.state[parameter][kind] = torch.empty_like(like, device=parameter.device).copy_(tensor)


# ------------------------------------------------------------------------------------------------ training


def start_processes(name: str) -> tuple[int, int, torch.device]:
    """Join the processes that torchrun started, if it did; `name` is --device. Returns rank, world size, device."""
    world_size = int(os.environ.get("WORLD_SIZE") or 1)
    rank = int(os.environ.get("RANK", 0)) if world_size > 1 else 0
    if world_size > 1 and torch.cuda.is_available() and name in ("auto", "cuda"):
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), torch.cuda.device_count()
        require(here <= gpus, f"torchrun started {here} processes on {gpus} GPUs; use --nproc_per_node {gpus}")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))  # what "cuda" means from here on
    device = choose_device(name)
    if world_size > 1:
        check_processes(device, world_size)
        own = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else None
        # patient enough for ranks that wait while one draws class images or writes a checkpoint
        dist.init_process_group("nccl" if own else "gloo", timeout=timedelta(hours=2), device_id=own)
    return rank, world_size, device


def trainable(sd: StableDiffusion, weights: Path, prompts: list[list[str]], settings: Settings,
              dtype: torch.dtype) -> tuple[DreamBoothLoss, torch.optim.Optimizer]:
    """The loss as one module, and AdamW over its trained parameters: the model's own, or those of low-rank updates."""
    lora, frozen = None, None
    if settings.frozen_prior and settings.prior_weight > 0:
        before = sd if settings.lora else load(weights, sd.device, dtype)  # updates leave the model as it was
        frozen = nn.ModuleDict({"unet": before.unet, "text_encoder": before.text_encoder})
    trained = {"unet": sd.unet} if settings.freeze_text else {"unet": sd.unet, "text_encoder": sd.text_encoder}
    if settings.lora:
        for network in (sd.unet, sd.text_encoder):
            network.to(dtype)  # it stays as it is, which needs no fp32
        trained = attach(trained, settings.lora, settings.lora_conv, settings.seed)
        lora = nn.ModuleDict({name: update for updates in trained.values() for name, update in updates.items()})
    layout = torch.contiguous_format if sd.device.type == "mps" else torch.channels_last  # wrong on MPS: pytorch#193349
    model = DreamBoothLoss(sd, prompts, settings.freeze_text, lora, frozen).to(memory_format=layout)
    if settings.offload:
        model.to("cpu")
    rates = {"unet": settings.lr, "text_encoder": settings.lr_text}  # the loop sets each "lr" by "initial_lr"
    groups = [{"params": list(module.parameters()), "initial_lr": rates[part]} for part, module in trained.items()]
    return model, torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, fused=True)


def joined(model: DreamBoothLoss, dtype: torch.dtype, compiled: bool) -> DistributedDataParallel:
    """The loss, whose backward pass averages the gradients of all processes."""
    # gradients live in the buckets that are sent, without a second copy; --compile cuts its graph at each bucket
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=200 if compiled else 25)
    if dist.get_backend() == "nccl" and dtype == torch.bfloat16:  # sent as they were computed: 2 GB a step
        parallel.register_comm_hook(None, bf16_compress_hook)
    return parallel


def main(settings: Settings) -> None:
    rank, world_size, device = start_processes(settings.device)
    dtype = choose_dtype(settings.precision, device)
    # no cache: each weight is cast once in a forward pass, and a copy kept longer would only take memory
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)

    # The model, in fp32 whatever the precision: a step of 1e-6 would be lost in the 8 bits of a bf16 weight.
    weights = model_folder(settings.weights)
    sd = load(weights, device)
    settings = settings.resolve(sd.info.recipe)
    run = Run(Path(settings.out))

    # Your pictures, and the prompts under which pictures are learnt.
    instance_images, remarks = read_pictures(Path(settings.images), sd.resolution)
    require(bool(instance_images), no_picture_in("--images", settings.images, remarks))
    captions = read_captions(Path(settings.images), instance_images)
    prior = ClassImages(sd, weights, settings.class_noun, settings.seed, settings.class_prompts, any(captions),
                        settings.class_dir)
    prompts = [subject_prompts(captions, settings.identifier, settings.class_noun)]
    if settings.prior_weight > 0:
        prompts.append(prior.prompts(settings.class_images))
    remarks += prompt_remarks(sd.tokenizer, prompts, settings.identifier)

    # OUT belongs to this run from here on. The first process claims it, the others wait for that.
    pictures = pictures_digest([*instance_images.values(), *prior.own], captions + prior.own_captions)
    facts = {"world_size": world_size, "device": device.type, "precision": str(dtype), "model": prior.key,
             "pictures": pictures}
    run.begin(rank, sd, settings, facts)
    if rank == 0:
        run.save_inputs(instance_images, prompts[0])
        scorer = Scorer(choose_clip(settings.clip, sd.info.base), [*instance_images.values()], settings.class_noun)
        say(memory_plan(sd, settings, dtype, world_size), *remarks)

    # The class images: what the model now draws for the class, to hold it to that.
    stop, image_sets = StopSignal(rank), [list(instance_images.values())]
    if settings.prior_weight > 0:
        folder = Path(settings.class_dir or run.out / "class_images")
        image_sets.append(prior.images(folder, settings.class_images, dtype, rank, world_size, stop))
    sets = [Latents.of(images, sd.vae, device) for images in image_sets]  # in fp32: bf16's error is half of std
    sd.vae.to("cpu")  # every picture is encoded now; previews bring it back for a moment

    # What is trained, and how: `masters` is the loss whose fp32 parameters the optimizer moves.
    masters, optimizer = trainable(sd, weights, prompts, settings, dtype)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    loss_weights = torch.tensor([1.0, settings.prior_weight][: len(sets)], device=device)

    # Where we are: at step 0, or at the newest checkpoint.
    state = {"step": 0, "scores": {}, "clip": settings.clip, "scaler": scaler.state_dict(),
             "class_images": pictures_digest(sum(image_sets[1:], []))}
    saved = checkpoints(run.out)
    if settings.resume and saved:
        state = run.read_state(saved[-1], state)
        load_checkpoint(saved[-1], masters, optimizer)
        scaler.load_state_dict(state["scaler"])

    sd.info = replace(sd.info, identifier=settings.identifier, class_noun=settings.class_noun,
                      base=sd.info.base or {"name": weights.resolve().name, "license": "that of this model"})
    # `model` computes a step: `masters` or, with --offload, a low-precision copy; `parallel` averages over processes.
    model, offloaded = masters, []
    if settings.offload:
        model = copy.deepcopy(masters).to(device, dtype)
        masters.frozen = None  # only the copy predicts
        offloaded = [pair for pair in zip(masters.parameters(), model.parameters()) if pair[0].requires_grad]
    shown = replace(sd, unet=model.unet, text_encoder=model.text_encoder)  # in previews
    if settings.recompute:
        recompute_activations(model)
    if settings.compile:
        model.unet.compile()
    parallel = joined(model, dtype, settings.compile) if world_size > 1 else model

    if rank == 0:
        run.open_log(state["step"], settings)
        if scorer.clip and state["step"] == 0:  # what scores are measured against
            scorer.note(state["scores"], 0, run.preview(shown, scorer.prompts, 0, autocast))
        run.report()

    progress = tqdm(range(state["step"], settings.steps), f"teaching {settings.identifier} {settings.class_noun}",
                    unit="step", initial=state["step"], total=settings.steps, disable=rank > 0)
    for step in progress:
        decay_steps = max(1, settings.lr_decay * settings.steps)  # the rates are constant, then fall to 0
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * min(1, (settings.steps - step) / decay_steps)
        # One batch, cut into equal parts, one for each micro-step of each process. Who takes which changes nothing.
        parts = settings.accumulate * world_size
        counts = [parts * count for count in settings.examples_per_set]
        batch = random_batch(sets, counts, sd.schedule.config.num_train_timesteps, settings.seed, step)
        sums = torch.zeros(len(sets) + 1, device=device)  # losses, and whether anyone asked to stop: one all_reduce
        shares = range(rank * settings.accumulate, (rank + 1) * settings.accumulate)  # of this process
        for share in shares:
            micro_batch = [examples.part(share, parts).to(device) for examples in batch]
            # DDP averages the gradients of all processes in the last of the backward passes
            with nullcontext() if share == shares[-1] or world_size == 1 else parallel.no_sync():
                with autocast():
                    losses = parallel(micro_batch) / settings.accumulate
                # GradScaler keeps its scale where the loss is; with --offload, the optimizer needs it on the CPU
                scaler.scale((losses * loss_weights).sum().to(trained[0].device)).backward()
            sums[:-1] += losses.detach() / world_size
        sums[-1].fill_(stop.asked)  # an assignment would wait for the GPU
        if world_size > 1:
            dist.all_reduce(sums)
        for full, low in offloaded:
            full.grad, low.grad = low.grad.to(full), None
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)  # not where a gradient overflowed; update() then halves the scale
        scaler.update()
        optimizer.zero_grad()
        if offloaded:
            torch._foreach_copy_([low.detach() for _, low in offloaded], [full.detach() for full, _ in offloaded])

        *losses, asked_to_stop = sums.tolist()  # here alone the CPU waits for the GPU: all of the step is in its queue
        state["step"] = done = step + 1
        check_finite(losses, scaler, done, settings.lr)

        if rank == 0:
            due = done == settings.steps or (settings.save_every > 0 and done % settings.save_every == 0)
            previewing = settings.sample_every > 0 and done % settings.sample_every == 0
            values = dict(zip(("instance_loss", "prior_loss"), losses))
            progress.set_postfix({name: f"{value:.4f}" for name, value in values.items()}, refresh=False)
            if due or asked_to_stop:
                with torch.no_grad(), autocast():  # the step may have broken the weights: the last losses once more
                    check_finite(model(micro_batch).tolist(), scaler, done, settings.lr)
            if previewing or (due and scorer.clip):
                scores = state["scores"] if due or asked_to_stop else {}  # the steps of checkpoints alone are compared
                values |= scorer.note(scores, done, run.preview(shown, scorer.prompts, done, autocast))
            run.log(done, values)
            if asked_to_stop or (due and settings.save_every > 0):  # last: what it refers to is there by now
                sd.info = replace(sd.info, step=done)
                state["scaler"] = scaler.state_dict()
                save_checkpoint(run.checkpoint(done), sd, weights, masters, optimizer, state)
                run.drop_checkpoints(settings.keep, scorer.best_step(state["scores"], run))
            if previewing or due or asked_to_stop:
                run.report()
        if asked_to_stop:
            break
    if world_size > 1:
        dist.barrier()  # nobody leaves, and has torchrun end the others, while rank 0 writes
    if state["step"] < settings.steps:
        raise stop.stopped(f"; sample.py --weights {run.out} draws with what it knows by now")

    if rank == 0:
        sd.info = replace(sd.info, step=state["step"])
        with written_whole(run.result(settings)) as path:
            write_result(path, sd, weights, masters.lora)
        run.finish(settings, scorer.advice(state["scores"], run, state["step"]))


if __name__ == "__main__":
    cli.run(main, Settings, __doc__, defaults=partial(earlier_options, Settings),
            after_failure="; once that is mended, --resume goes on from the last checkpoint",
            out_of_memory="Try, in this order: --freeze-text (no gradients and moments of the text encoder), "
                          "--batch 1 without --accumulate, --recompute (hardly any activations), --lora 8 (a third "
                          "of all), --no-frozen-prior, or --offload (the whole model, a third of it on the GPU)")
