"""Configurations of published models, as plain data, for ``rdm-rl plan`` and ``benchmarks/gpu.py``.

These are the numbers of each model's own configuration files; no weights belong to them. What a file leaves at its
class's default is left out here, too. Tests build each network without memory and compare its parameter count with the
published one:

==============  =====================================================  ================================================
name            model                                                  published parameters of the denoising network
==============  =====================================================  ================================================
``sd15``        stable-diffusion-v1-5/stable-diffusion-v1-5            860 M (SDXL paper, table 1)
``sdxl``        stabilityai/stable-diffusion-xl-base-1.0               2.6 B (SDXL paper, table 1)
``sd35-medium`` stabilityai/stable-diffusion-3.5-medium                2.5 B (model card), 0.2 B of it a fixed buffer
``flux-dev``    black-forest-labs/FLUX.1-dev                           11.9 B (diffusers' benchmark tables)
``sana-1600m``  Efficient-Large-Model/Sana_1600M_1024px_diffusers      1.6 B (model card)
==============  =====================================================  ================================================

References:
    | SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis (Podell et al., 2023), table 1
    | https://arxiv.org/abs/2307.01952
    | https://huggingface.co/datasets/diffusers/benchmarks
"""

from typing import Any

Blueprint = dict[str, Any]
"""What a pipeline is made of: ``_class_name``, and for each component its class (``_class_name``) and configuration."""

_SD_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
_SD3_VAE = {**_SD_VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
_CLIP_L = {
    "_class_name": "CLIPTextModel",
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}
_CLIP_BIG_G = {
    "_class_name": "CLIPTextModelWithProjection",
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "max_position_embeddings": 77,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_T5_XXL = {
    "_class_name": "T5EncoderModel",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "use_cache": False,
}
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}

MODELS: dict[str, Blueprint] = {
    "sd15": {
        "_class_name": "StableDiffusionPipeline",
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 2,
            "block_out_channels": [320, 640, 1280, 1280],
            "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
            "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "norm_num_groups": 32,
        },
        "vae": {**_SD_VAE, "sample_size": 512},
        "text_encoder": _CLIP_L,
        "scheduler": {"_class_name": "PNDMScheduler", **_SD_BETAS, "skip_prk_steps": True, "set_alpha_to_one": False},
    },
    "sdxl": {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 2,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "norm_num_groups": 32,
        },
        "vae": {**_SD_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        "text_encoder": _CLIP_L,
        "text_encoder_2": _CLIP_BIG_G,
        "scheduler": {"_class_name": "EulerDiscreteScheduler", **_SD_BETAS, "timestep_spacing": "leading"},
    },
    "sd35-medium": {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": list(range(13)),
            "qk_norm": "rms_norm",
        },
        "vae": {**_SD3_VAE, "sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        "text_encoder": {**_CLIP_L, "_class_name": "CLIPTextModelWithProjection"},
        "text_encoder_2": _CLIP_BIG_G,
        "text_encoder_3": _T5_XXL,
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
    },
    "flux-dev": {
        "_class_name": "FluxPipeline",
        "transformer": {
            "_class_name": "FluxTransformer2DModel",
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": [16, 56, 56],
        },
        "vae": {**_SD3_VAE, "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        "text_encoder": _CLIP_L,
        "text_encoder_2": _T5_XXL,
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
        },
    },
    "sana-1600m": {
        "_class_name": "SanaPipeline",
        "transformer": {
            "_class_name": "SanaTransformer2DModel",
            "sample_size": 32,
            "patch_size": 1,
            "in_channels": 32,
            "out_channels": 32,
            "num_layers": 20,
            "attention_head_dim": 32,
            "num_attention_heads": 70,
            "num_cross_attention_heads": 20,
            "cross_attention_head_dim": 112,
            "cross_attention_dim": 2240,
            "caption_channels": 2304,
            "mlp_ratio": 2.5,
        },
        "vae": {
            "_class_name": "AutoencoderDC",
            "latent_channels": 32,
            "attention_head_dim": 32,
            "encoder_block_types": [*["ResBlock"] * 3, *["EfficientViTBlock"] * 3],
            "decoder_block_types": [*["ResBlock"] * 3, *["EfficientViTBlock"] * 3],
            "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
            "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
            "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
            "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
            "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
            "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
            "downsample_block_type": "Conv",
            "upsample_block_type": "interpolate",
            "scaling_factor": 0.41407,
        },
        "text_encoder": {
            "_class_name": "Gemma2Model",
            "vocab_size": 256000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
        },
        "scheduler": {
            "_class_name": "DPMSolverMultistepScheduler",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 3.0,
        },
    },
}
