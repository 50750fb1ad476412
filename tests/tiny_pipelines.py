"""Tiny real pipelines of each family, with random weights, built on the fly and without a hub.

Each function returns a stock diffusers pipeline of the true classes, with latents of 8x8 (pixels of 8x8 where there is
no VAE) and images of 16x16 (Sana: 32x32). Every parameter has values that differ from each other and from zero, also
those that diffusers initialises to zero or one (adaLN, output projections, norms): otherwise a network would ignore the
time or the prompt and a test would pass by accident. (``tiny_sd`` of ``tests.helpers`` keeps its initial values.)

``CALLS`` holds what each stock pipeline must be told to draw such a small image: some have the size of the published
checkpoint written into them.
"""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizerFast,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.helpers import tiny_sd, tiny_tokenizer

Module = TypeVar("Module", bound=nn.Module)
SIZE = {"height": 16, "width": 16}
# What to call each stock pipeline with, beside num_inference_steps, so that it draws so small an image.
CALLS: Mapping[str, Mapping[str, Any]] = {
    "StableDiffusionPipeline": {"prompt": "the digit 3"},
    "StableDiffusionXLPipeline": {"prompt": "the digit 3"},
    "StableDiffusion3Pipeline": {"prompt": "the digit 3"},
    "FluxPipeline": {"prompt": "the digit 3", **SIZE},
    # Sana's pipeline takes multiples of 32 only; its tiny autoencoder compresses by 4 where the others do by 2.
    "SanaPipeline": {"prompt": "the digit 3", "height": 32, "width": 32, "use_resolution_binning": False},
    "PixArtSigmaPipeline": {"prompt": "the digit 3", **SIZE, "use_resolution_binning": False},
    "Flux2KleinPipeline": {"prompt": "the digit 3", **SIZE},
    "ZImagePipeline": {"prompt": "the digit 3", **SIZE},
    "DiTPipeline": {"class_labels": [3]},
    "DDPMPipeline": {},
}


def fill_random(module: nn.Module) -> None:
    """Move every parameter whose values are all equal (zeros, ones) away from that, by a normal of 0.1."""
    with torch.no_grad():
        for parameter in module.parameters():
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * torch.randn_like(parameter))


def _build(function: Callable[[], Module], seed: int) -> Module:
    """The network that ``function`` makes under a seed of its own; the global random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = function()
        fill_random(module)
        return module.eval()


# --- parts ------------------------------------------------------------------------------------------------------------


def tiny_vae(latent_channels: int = 4, **config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **config,
    )


def tiny_flux_vae() -> AutoencoderKL:
    """The decoder of FLUX.1, which Z-Image has, too."""
    return tiny_vae(4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)


def clip_config(width: int = 32, **config: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=190,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=188,
        eos_token_id=189,
        pad_token_id=189,
        **config,
    )


def _characters(first: list[str]) -> list[tuple[str, float]]:
    """Special tokens, the word mark and the printable characters, each with its score in a unigram model."""
    return [(token, 0.0) for token in first] + [
        (token, -1.0) for token in ["▁", *(chr(code) for code in range(33, 127))]
    ]


def tiny_t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer of single characters: pad 0, end of sequence 1, unknown 2, as T5 has them."""
    backend = Tokenizer(models.Unigram(_characters(["<pad>", "</s>", "<unk>"]), unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return T5TokenizerFast(tokenizer_object=backend, extra_ids=0, model_max_length=64)


def tiny_t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=98,
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def tiny_gemma_tokenizer() -> PreTrainedTokenizerFast:
    """A Gemma tokenizer of single characters and a beginning-of-sequence token; spaces become the word mark.

    Each line of Sana's instruction, which goes before every prompt, is one token: in characters it is long.
    """
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokens = [token for token, _ in _characters(first)]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Replace("▁", " ")
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    instruction = signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    backend.add_tokens([AddedToken(line, normalized=False) for line in instruction])
    return GemmaTokenizerFast(tokenizer_object=backend, model_max_length=2048)


def tiny_gemma(width: int) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=101 + 16,  # 101 characters and marks, and the lines of the instruction.
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=2048,
            sliding_window=64,
            query_pre_attn_scalar=8,
            use_cache=False,
        )
    )


# Qwen's and some lines more: "the digit 3" is then longer than the 32 tokens that Z-Image fills up to, "a cat" is not.
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{{ '\n\n\n' if enable_thinking else '<think>\n' }}"
)


def tiny_qwen_tokenizer() -> Qwen2TokenizerFast:
    """A Qwen tokenizer of single bytes, and with the template of a chat."""
    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return Qwen2TokenizerFast(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=1024,
        chat_template=_CHAT,
    )


def tiny_qwen(width: int, layers: int = 2) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=259,
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=layers,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )


# --- pipelines --------------------------------------------------------------------------------------------------------


def tiny_sdxl(
    folder: Path, prediction_type: str = "epsilon", seed: int = 0, **scheduler: Any
) -> StableDiffusionXLPipeline:
    """SDXL: two CLIP encoders, the second one's projection pooled into the time embedding together with six sizes."""
    unet = _build(
        lambda: UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=24 + 32,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 20,
        ),
        seed,
    )
    encoder = _build(lambda: CLIPTextModel(clip_config(24)), seed + 1)
    encoder_2 = _build(
        lambda: CLIPTextModelWithProjection(clip_config(32, projection_dim=20, hidden_act="gelu")), seed + 2
    )
    tokenizer_2 = tiny_tokenizer(folder / "tokenizer_source")
    # The second tokenizer of SDXL pads with "!".
    tokenizer_2.pad_token = "!"
    return StableDiffusionXLPipeline(
        vae=_build(lambda: tiny_vae(scaling_factor=0.13025), seed + 3),
        text_encoder=encoder,
        text_encoder_2=encoder_2,
        tokenizer=tiny_tokenizer(folder / "tokenizer_source"),
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            **{"steps_offset": 1, "timestep_spacing": "leading", **scheduler},
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def tiny_sd3(folder: Path, t5: bool = True, seed: int = 0) -> StableDiffusion3Pipeline:
    """SD3.5: a flow transformer with joint attention, two CLIP encoders and, if ``t5``, a T5 encoder.

    Saved without T5, diffusers loads it only when told so: ``text_encoder_3=None, tokenizer_3=None``.
    """
    transformer = _build(
        lambda: SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=20 + 28,
            pos_embed_max_size=12,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        seed,
    )
    vae = _build(
        lambda: tiny_vae(
            16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
        ),
        seed + 1,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=vae,
        text_encoder=_build(lambda: CLIPTextModelWithProjection(clip_config(24, projection_dim=20)), seed + 2),
        tokenizer=tiny_tokenizer(folder / "tokenizer_source"),
        text_encoder_2=_build(
            lambda: CLIPTextModelWithProjection(clip_config(32, projection_dim=28, hidden_act="gelu")), seed + 3
        ),
        tokenizer_2=tiny_tokenizer(folder / "tokenizer_source"),
        text_encoder_3=_build(lambda: tiny_t5(64), seed + 4) if t5 else None,
        tokenizer_3=tiny_t5_tokenizer() if t5 else None,
    )


def tiny_flux(folder: Path, guidance_embeds: bool = True, seed: int = 0) -> FluxPipeline:
    """FLUX.1-dev, or schnell without ``guidance_embeds``: packed latents, CLIP's pooled output and a T5 sequence."""
    transformer = _build(
        lambda: FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            pooled_projection_dim=24,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        ),
        seed,
    )
    vae = _build(tiny_flux_vae, seed + 1)
    if guidance_embeds:
        scheduler = FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        )
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=_build(lambda: CLIPTextModel(clip_config(24)), seed + 2),
        tokenizer=tiny_tokenizer(folder / "tokenizer_source"),
        text_encoder_2=_build(lambda: tiny_t5(48), seed + 3),
        tokenizer_2=tiny_t5_tokenizer(),
        transformer=transformer,
    )


def tiny_sana(folder: Path | None = None, seed: int = 0) -> SanaPipeline:
    """Sana: linear attention, a deep-compression autoencoder and a decoder-only language model as text encoder."""
    transformer = _build(
        lambda: SanaTransformer2DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=24,
            sample_size=8,
        ),
        seed,
    )
    vae = _build(
        lambda: AutoencoderDC(
            latent_channels=8,
            attention_head_dim=8,
            encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 16, 16),
            decoder_block_out_channels=(8, 16, 16),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
            downsample_block_type="Conv",
            upsample_block_type="interpolate",
            scaling_factor=0.41407,
        ),
        seed + 1,
    )
    return SanaPipeline(
        tokenizer=tiny_gemma_tokenizer(),
        text_encoder=_build(lambda: tiny_gemma(24), seed + 2),
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
        ),
    )


def tiny_dit(folder: Path | None = None, seed: int = 0) -> DiTPipeline:
    """DiT: a class label instead of a prompt (1000 is "no class"), and a variance predicted beside the noise."""
    transformer = _build(
        lambda: DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            norm_num_groups=8,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=1000,
        ),
        seed,
    )
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    return DiTPipeline(
        transformer=transformer,
        vae=_build(tiny_vae, seed + 1),
        scheduler=DDIMScheduler(beta_start=0.0001, beta_end=0.02, clip_sample=False, set_alpha_to_one=True),
        # As in the published file, a class may have several names.
        id2label={digit: f"{word}, {digit}" for digit, word in enumerate(words)},
    )


def tiny_unconditional(folder: Path | None = None, prediction_type: str = "epsilon", seed: int = 0) -> DDPMPipeline:
    """DDPM: a UNet on pixels of 8x8 in [-1, 1], no VAE and no prompt."""
    unet = _build(
        lambda: UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        seed,
    )
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler(prediction_type=prediction_type))


def tiny_pixart(folder: Path | None = None, seed: int = 0) -> PixArtSigmaPipeline:
    """PixArt-Sigma: a DiT with a T5 prompt and a variance predicted beside the noise."""
    transformer = _build(
        lambda: PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            norm_num_groups=8,
            cross_attention_dim=32,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=1000,
            caption_channels=48,
            use_additional_conditions=False,
        ),
        seed,
    )
    return PixArtSigmaPipeline(
        tokenizer=tiny_t5_tokenizer(),
        text_encoder=_build(lambda: tiny_t5(48), seed + 1),
        vae=_build(lambda: tiny_vae(scaling_factor=0.13025), seed + 2),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(algorithm_type="dpmsolver++"),
    )


def tiny_klein(folder: Path | None = None, is_distilled: bool = False, seed: int = 0) -> Flux2KleinPipeline:
    """FLUX.2-klein: latents that are packed and normalised, and the 9th, 18th and 27th layer of a language model."""
    transformer = _build(
        lambda: Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * 8,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        seed,
    )
    vae = _build(
        lambda: AutoencoderKLFlux2(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=16,
        ),
        seed + 1,
    )
    statistics = torch.rand(2, 16, generator=torch.Generator().manual_seed(seed))
    vae.bn.running_mean.copy_(statistics[0] - 0.5)
    vae.bn.running_var.copy_(statistics[1] + 0.5)
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=_build(lambda: tiny_qwen(8, layers=27), seed + 2),
        tokenizer=tiny_qwen_tokenizer(),
        transformer=transformer,
        is_distilled=is_distilled,
    )


def tiny_zimage(folder: Path | None = None, seed: int = 0) -> ZImagePipeline:
    """Z-Image: words and latents in one sequence, and a time and a velocity that are turned around."""
    transformer = _build(
        lambda: ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 16, 16],
        ),
        seed,
    )
    vae = _build(tiny_flux_vae, seed + 1)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=_build(lambda: tiny_qwen(16), seed + 2),
        tokenizer=tiny_qwen_tokenizer(),
        transformer=transformer,
    )


# Every kind of pipeline, by a short name: builder(folder) -> pipeline.
TINY: Mapping[str, Callable[[Path], DiffusionPipeline]] = {
    "sd": partial(tiny_sd, whole=True),
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "sd3_without_t5": lambda folder: tiny_sd3(folder, t5=False),
    "flux_dev": tiny_flux,
    "flux_schnell": lambda folder: tiny_flux(folder, guidance_embeds=False),
    "sana": tiny_sana,
    "dit": tiny_dit,
    "unconditional": tiny_unconditional,
    "pixart": tiny_pixart,
    "klein": tiny_klein,
    "zimage": tiny_zimage,
}


def align_weights(*owners: DiffusionPipeline | nn.Module) -> None:
    """Copy weights to memory that is aligned, before the bits of two networks' outputs are compared.

    safetensors maps weights from their file, where they begin anywhere, and some kernels then round otherwise. Measured
    (torch 2.13.0, AMD EPYC): a linear layer that is given one row, if its weight is at no multiple of 16 bytes, differs
    in the last bits; more rows, convolutions, norms and backward passes do not.
    """
    for owner in owners:
        parts = owner.components.values() if isinstance(owner, DiffusionPipeline) else [owner]
        for module in parts:
            if isinstance(module, nn.Module):
                for parameter in module.parameters():
                    parameter.data = parameter.data.clone()


def tiny_autoencoder(folder: Path, latent_channels: int = 4) -> Path:
    """A tiny autoencoder of random weights that doubles the size, as the tiny pipelines' own does."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderTiny(
            latent_channels=latent_channels,
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ).save_pretrained(folder)
    return folder
