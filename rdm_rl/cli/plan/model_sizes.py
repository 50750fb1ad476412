"""Configurations of published models, as plain data, for ``rdm-rl plan`` and ``benchmarks/gpu.py``.

These are the numbers of each model's own configuration files; what equals its class's default is left out, and no
weights belong to them. Tests compare parameter counts with the published ones:

=================  ===================================================  ================================================
name               model                                                published parameters of the denoising network
=================  ===================================================  ================================================
``sd15``           stable-diffusion-v1-5/stable-diffusion-v1-5          860 M (SDXL paper, table 1)
``sdxl``           stabilityai/stable-diffusion-xl-base-1.0             2.6 B (SDXL paper, table 1)
``sd35-medium``    stabilityai/stable-diffusion-3.5-medium              2.5 B (model card), 0.2 B of it a fixed buffer
``flux-dev``       black-forest-labs/FLUX.1-dev                         11.9 B (diffusers' benchmark tables)
``klein-base-4b``  black-forest-labs/FLUX.2-klein-base-4B               4 B (its name)
``z-image``        Tongyi-MAI/Z-Image, and Z-Image-Turbo                6.15 B (the hub's count of the files)
``sana-1600m``     Efficient-Large-Model/Sana_1600M_1024px_diffusers    1.6 B (model card)
=================  ===================================================  ================================================

References:
    | SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis (Podell et al., 2023), table 1
    | https://arxiv.org/abs/2307.01952
    | https://huggingface.co/datasets/diffusers/benchmarks
"""

from typing import Any

Blueprint = dict[str, Any]
"""What a pipeline is made of: ``_class_name``, and for each component its class (``_class_name``) and configuration."""


def _of(class_name: str, **config: Any) -> Blueprint:
    return {"_class_name": class_name, **config}


_SD_VAE = _of(
    "AutoencoderKL",
    block_out_channels=[128, 256, 512, 512],
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    layers_per_block=2,
)
_SD3_VAE = {**_SD_VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
_CLIP_L = _of("CLIPTextModel", hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)
_CLIP_BIG_G = _of(
    "CLIPTextModelWithProjection",
    **{"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
    **{"projection_dim": 1280, "hidden_act": "gelu"},
)
_T5_XXL = _of(
    "T5EncoderModel",
    **{"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"},
    **{"is_encoder_decoder": False, "use_cache": False},
)
_QWEN3_4B = {
    **{"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_key_value_heads": 8},
    **{"head_dim": 128, "tie_word_embeddings": True, "use_cache": False},
}
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_DCAE = {
    f"{side}_{what}": value
    for side in ("encoder", "decoder")
    for what, value in {
        "block_types": [*["ResBlock"] * 3, *["EfficientViTBlock"] * 3],
        "block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "qkv_multiscales": [[], [], [], [5], [5], [5]],
    }.items()
}

MODELS: dict[str, Blueprint] = {
    "sd15": _of(
        "StableDiffusionPipeline",
        unet=_of("UNet2DConditionModel", sample_size=64, cross_attention_dim=768),
        vae=_SD_VAE,
        text_encoder=_CLIP_L,
        scheduler=_of("PNDMScheduler", **_SD_BETAS, skip_prk_steps=True),
    ),
    "sdxl": _of(
        "StableDiffusionXLPipeline",
        unet=_of(
            "UNet2DConditionModel",
            **{"sample_size": 128, "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048},
            **{"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]},
            **{"up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]},
            **{"transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20]},
            **{"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256},
            projection_class_embeddings_input_dim=2816,
        ),
        vae={**_SD_VAE, "sample_size": 1024, "scaling_factor": 0.13025},
        text_encoder=_CLIP_L,
        text_encoder_2=_CLIP_BIG_G,
        scheduler=_of("EulerDiscreteScheduler", **_SD_BETAS, timestep_spacing="leading"),
    ),
    "sd35-medium": _of(
        "StableDiffusion3Pipeline",
        transformer=_of(
            "SD3Transformer2DModel",
            **{"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "out_channels": 16},
            **{"pos_embed_max_size": 384, "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm"},
        ),
        vae={**_SD3_VAE, "sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        text_encoder={**_CLIP_L, "_class_name": "CLIPTextModelWithProjection"},
        text_encoder_2=_CLIP_BIG_G,
        text_encoder_3=_T5_XXL,
        scheduler=_of("FlowMatchEulerDiscreteScheduler", shift=3.0),
    ),
    "flux-dev": _of(
        "FluxPipeline",
        transformer=_of("FluxTransformer2DModel", guidance_embeds=True),
        vae={**_SD3_VAE, "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        text_encoder=_CLIP_L,
        text_encoder_2=_T5_XXL,
        scheduler=_of("FlowMatchEulerDiscreteScheduler", shift=3.0, use_dynamic_shifting=True),
    ),
    "klein-base-4b": _of(
        "Flux2KleinPipeline",
        transformer=_of(
            "Flux2Transformer2DModel",
            **{"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
            guidance_embeds=False,
        ),
        vae=_of("AutoencoderKLFlux2"),
        text_encoder=_of("Qwen3ForCausalLM", **_QWEN3_4B),
        scheduler=_of("FlowMatchEulerDiscreteScheduler", shift=3.0, use_dynamic_shifting=True),
    ),
    "z-image": _of(
        "ZImagePipeline",
        transformer=_of("ZImageTransformer2DModel", axes_lens=[1536, 512, 512]),
        vae={**_SD3_VAE, "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        text_encoder=_of("Qwen3Model", **_QWEN3_4B),
        scheduler=_of("FlowMatchEulerDiscreteScheduler", shift=3.0),
    ),
    "sana-1600m": _of(
        "SanaPipeline",
        transformer=_of("SanaTransformer2DModel"),
        vae=_of(
            "AutoencoderDC",
            **_DCAE,
            encoder_layers_per_block=[2, 2, 2, 3, 3, 3],
            decoder_layers_per_block=[3] * 6,
            **{"downsample_block_type": "Conv", "upsample_block_type": "interpolate", "scaling_factor": 0.41407},
        ),
        text_encoder=_of("Gemma2Model"),
        scheduler=_of(
            "DPMSolverMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    ),
}
