"""Train all weights of a diffusion model by a loop like those of diffusers' examples.

    python docs/examples/diffusion_loop.py transformer      # an image transformer as SD3's: flow matching
    python docs/examples/diffusion_loop.py video            # a video transformer as Wan's: flow matching
    python docs/examples/diffusion_loop.py unet             # a U-Net as SD's: noise prediction

The models are tiny, with random weights; latents and text embeddings are random. A real model comes by
`SD3Transformer2DModel.from_pretrained("stabilityai/stable-diffusion-3.5-medium", subfolder="transformer")`, and
latents and embeddings are computed beforehand.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, SD3Transformer2DModel, UNet2DConditionModel, WanTransformer3DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from hf_galore import make_optimizer

Batch = dict[str, Any]


def flow_matching_loss(model: nn.Module, batch: Batch) -> Tensor:
    """How far the model is from ε − x, the velocity at (1 − σ)x + σε of latents x; σ is logit-normal."""
    latents = batch["latents"]
    noise = torch.randn_like(latents)
    sigma = torch.randn(len(latents), device=latents.device).sigmoid()
    share = sigma.view(-1, *[1] * (latents.ndim - 1))
    noisy = (1 - share) * latents + share * noise
    velocity = model(hidden_states=noisy, timestep=1000 * sigma, **batch["condition"], return_dict=False)[0]
    return mse_loss(velocity.float(), noise - latents)


def noise_prediction_loss(model: nn.Module, batch: Batch) -> Tensor:
    """How far the model is from the noise that was added to latents."""
    latents = batch["latents"]
    noise = torch.randn_like(latents)
    timesteps = torch.randint(NOISE.config.num_train_timesteps, (len(latents),), device=latents.device)
    noisy = NOISE.add_noise(latents, noise, timesteps)
    found = model(sample=noisy, timestep=timesteps, **batch["condition"], return_dict=False)[0]
    return mse_loss(found.float(), noise)


NOISE = DDPMScheduler(num_train_timesteps=1000)


def train(
    model: Any,
    rows: list[Batch],
    loss_of: Callable[[nn.Module, Batch], Tensor],
    checkpoint: Path,
    *,
    steps: int = 8,
    stop_at: int | None = None,
    batch_size: int = 2,
    accumulate: int = 2,
    max_norm: float | None = 1.0,
    precision: str = "no",
    checkpointing: bool = True,
    target_modules: Any = "all-linear",
    optim: str = "galore_adamw_8bit_layerwise",
    optim_args: str = "rank=8, update_proj_gap=4, scale=1",
    lr: float = 1e-3,
    seed: int = 0,
) -> EMAModel:
    """Train, from `checkpoint` on if it is there, and leave one there.

    Args:
        rows: of latents and what they are conditioned on; one pass over them is `steps` optimizer steps or more.
        stop_at: the step after which to stop before `steps`, as an interruption would.
        accumulate: micro-batches of a step.
        max_norm: of the gradients; `None` for no clipping.
        target_modules: which weights to project, such as ["attn"] of what is trainable.

    Returns:
        The moving average of the weights.
    """
    accelerator = Accelerator(gradient_accumulation_steps=accumulate, mixed_precision=precision)
    torch.manual_seed(seed)
    if checkpointing:
        model.enable_gradient_checkpointing()
    galore = make_optimizer(
        model,
        target_modules,
        optim=optim,
        optim_args=optim_args,
        lr=lr,
        weight_decay=0.01,
        hold_gradients=max_norm is not None,  # layerwise: until step(), to be clipped. An accumulation holds by itself
    )
    ema = EMAModel(model.parameters(), decay=0.99, model_cls=type(model), model_config=model.config)
    schedule = get_scheduler("cosine", galore, num_warmup_steps=2, num_training_steps=steps)
    # With a generator of its own: it would draw from the one that noise comes from, and once more after a resume.
    loader = DataLoader(rows, batch_size=batch_size, generator=torch.Generator())
    model, optimizer, loader, schedule = accelerator.prepare(model, galore, loader, schedule)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    step = 0
    if checkpoint.exists():
        accelerator.load_state(checkpoint)  # weights, moments and bases, schedule, average and random numbers
        step = schedule.scheduler.last_epoch
        loader = accelerator.skip_first_batches(loader, step * accumulate)
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            loss = loss_of(model, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients and max_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(model.parameters())
            step += 1
            if step == (stop_at or steps):
                break
    accelerator.save_state(checkpoint)
    galore.close()  # takes the hooks off the model
    return ema


def optimizer_for_two(unet: nn.Module, text_encoder: nn.Module, optim: str, optim_args: str) -> Any:
    """One optimizer of two models, each with a learning rate of its own. What is frozen stays out."""
    return make_optimizer(
        nn.ModuleList([unet, text_encoder]),
        "all-linear",
        optim=optim,
        optim_args=optim_args,
        params=[
            {"params": unet.parameters(), "lr": 1e-3, "weight_decay": 0.01},
            {"params": text_encoder.parameters(), "lr": 1e-4},
        ],
    )


def tiny_transformer() -> SD3Transformer2DModel:
    """Two blocks of Stable Diffusion 3's transformer."""
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def tiny_video() -> WanTransformer3DModel:
    """Two blocks of Wan's transformer, for 3 frames."""
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=96,
        num_layers=2,
    )


def tiny_unet() -> UNet2DConditionModel:
    """Two resolutions of Stable Diffusion's U-Net."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def tiny_rows(kind: str, rows: int = 32) -> list[Batch]:
    """Random latents and text embeddings."""
    generator = torch.Generator().manual_seed(1)
    shape = (4, 3, 8, 8) if kind == "video" else (4, 8, 8)
    found = []
    for _ in range(rows):
        condition = {"encoder_hidden_states": torch.randn(5, 32, generator=generator)}
        if kind == "transformer":
            condition["pooled_projections"] = torch.randn(32, generator=generator)
        found.append({"latents": torch.randn(shape, generator=generator), "condition": condition})
    return found


KINDS: dict[str, tuple[Callable[[], Any], Callable[[nn.Module, Batch], Tensor]]] = {
    "transformer": (tiny_transformer, flow_matching_loss),
    "video": (tiny_video, flow_matching_loss),
    "unet": (tiny_unet, noise_prediction_loss),
}


def main() -> None:
    """Run by hand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    kind = parser.parse_args().kind
    make, loss_of = KINDS[kind]
    folder = Path(tempfile.mkdtemp())
    ema = train(make(), tiny_rows(kind), loss_of, folder / "checkpoint")
    ema.save_pretrained(folder / "averaged")
    print(f"The averaged weights are in {folder / 'averaged'}")


if __name__ == "__main__":
    main()
