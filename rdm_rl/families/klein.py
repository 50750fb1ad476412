"""FLUX.2-klein: a transformer over tokens of two by two latents, with hidden states of Qwen3 as prompts."""

from collections.abc import Sequence
from math import exp
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rdm_rl.families.encoding import dtype_of, tokens_before_prompt
from rdm_rl.families.flow import FlowFamily
from rdm_rl.noise_schedule import FlowMatching
from rdm_rl.randomness import Generators, normal
from rdm_rl.records import Conditioning


class Flux2KleinFamily(FlowFamily):
    """Pipelines of class ``Flux2KleinPipeline``: klein-base, with guidance, and klein, distilled and without.

    Latents of shape (N, C, H, W) are the pipeline's own: two by two of the decoder's lie in one, normalised by the
    decoder's running statistics, and each is a token. So C is four times the decoder's, and H and W are half as large.
    """

    comfyui_layers: ClassVar[str] = (
        r"transformer_blocks\.\d+\.(attn\.(to_([qkv]|out\.0|add_out)|add_[qkv]_proj)|ff(_context)?\.linear_(in|out))|"
        r"single_transformer_blocks\.\d+\.attn\.to_(qkv_mlp_proj|out)|(x|context)_embedder|norm_out\.linear|proj_out"
    )

    comfyui_times: ClassVar[str] = "the node `Flux2Scheduler`"

    @property
    def lora_targets(self) -> tuple[str, ...]:  # type: ignore[override]
        """Every linear layer of the blocks.

        ``attn.to_out`` is named block by block, as in the blocks of two streams it is a list of layers.
        """
        single = range(self.pipeline.transformer.config.num_single_layers)
        return (
            *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
            *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
            *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
            *("attn.to_qkv_mlp_proj", *(f"single_transformer_blocks.{number}.attn.to_out" for number in single)),
        )

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels of an image's side one latent, and so one token, stands for."""
        return 2 * super().pixels_per_latent

    @property
    def own_latent_size(self) -> tuple[int, int]:
        """Height and width of the latents that the pipeline draws by default."""
        size = int(self.pipeline.default_sample_size) // 2
        return size, size

    @property
    def decoder_channels(self) -> int:
        """Channels of what the decoder is given."""
        return self.latent_channels // 4

    @property
    def has_guidance(self) -> bool:
        """Whether the pipeline guides: with klein-base it does."""
        return not self.pipeline.config.is_distilled

    @property
    def teacher_guidance_scale(self) -> float:  # type: ignore[override]
        """The pipeline's default; none for a distilled model."""
        return 4.0 if self.has_guidance else 1.0

    def flow_schedule(self) -> FlowMatching:
        """With a shift that falls with the number of steps, where the pipeline's does."""
        schedule = super().flow_schedule()
        if not self.pipeline.scheduler.config.get("use_dynamic_shifting"):
            return schedule
        # Older versions of diffusers, with which other families work, have no such pipeline.
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        first, second = (compute_empirical_mu(self.image_tokens, steps) for steps in (0, 1))
        return FlowMatching(schedule.steps, shift=exp(first), shift_per_step=exp(second - first))

    @property
    def token_limits(self) -> dict[str, int]:
        """What the template of a chat leaves of the pipeline's length of a prompt."""
        return {"tokenizer": super().token_limits["tokenizer"] - tokens_before_prompt(self.pipeline.tokenizer)}

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Hidden states of three of Qwen3's layers, shape (N, L, 3 E)."""
        states, _ = self.pipeline.encode_prompt(list(prompts), device=self.device)
        return Conditioning(tensors={"encoder_hidden_states": states})

    def forward(
        self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """The transformer's output, its tokens as latents."""
        dtype = dtype_of(network)
        states = conditioning.tensors["encoder_hidden_states"].to(dtype)
        # Positions are those of the first sample for all.
        output: Tensor = network(
            hidden_states=_tokens(x_t.to(dtype)),
            timestep=self.schedule.timestep(t).to(dtype) / 1000,
            guidance=None,
            encoder_hidden_states=states,
            txt_ids=self.pipeline._prepare_text_ids(states[:1]).to(x_t.device),
            img_ids=self.pipeline._prepare_latent_ids(x_t[:1]).to(x_t.device),
            return_dict=False,
        )[0]
        return _latents(output.float(), x_t.shape)

    def decode(self, x_0: Tensor) -> Tensor:
        """Images, shape (N, 3, H', W'), in [0, 1], of latents of shape (N, C, H, W); differentiable."""
        vae: Any = self.decoder
        mean, variance = (value.view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
        latents = self.pipeline._unpatchify_latents(x_0 * (variance + vae.config.batch_norm_eps).sqrt() + mean)
        images: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return (images * 0.5 + 0.5).clamp(0, 1).float()

    def step_noise(self, shape: Sequence[int], generator: Generators, device: torch.device) -> Tensor:
        """The noise of a random step: the scheduler draws it for tokens."""
        count, channels, height, width = shape
        return _latents(normal((count, height * width, channels), generator, device), shape)


def _tokens(latents: Tensor) -> Tensor:
    """Each latent a token: (N, C, H, W) becomes (N, H W, C)."""
    return latents.flatten(2).transpose(1, 2)


def _latents(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`_tokens`, in a shape (N, C, H, W)."""
    return tokens.transpose(1, 2).reshape(*shape)
