"""Tiny real pipelines, built on the fly."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rdm_rl import RDMConfig

PROMPTS = [{"prompt": f"the digit {digit}", "digit": digit} for digit in range(10)]


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    characters = [chr(code) for code in range(33, 127)]
    tokens = [*characters, *(one + "</w>" for one in characters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def tiny_sd(folder: Path, prediction_type: str = "epsilon", seed: int = 0, **scheduler) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline of about a million random parameters, with latents of shape (4, 8, 8)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            latent_channels=4,
            norm_num_groups=8,
            sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=190,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=16,
                bos_token_id=188,
                eos_token_id=189,
                pad_token_id=189,
            )
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        **{"clip_sample": False, "steps_offset": 1, **scheduler},
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tiny_tokenizer(folder / "tokenizer_source"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


def tiny_config(output_dir: Path, **overrides) -> RDMConfig:
    """Settings for a run of a few seconds."""
    defaults = dict(
        output_dir=str(output_dir),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        per_device_train_batch_size=4,
        num_generations=2,
        num_inference_steps=2,
        fake_score_updates_per_policy_update=2,
        fake_score_warmup_steps=1,
        warm_start_steps=2,
        warm_start_num_states=4,
        warm_start_ode_steps=2,
        teacher_guidance_scale=1.0,
        seed=7,
    )
    return RDMConfig(**{**defaults, **overrides})
