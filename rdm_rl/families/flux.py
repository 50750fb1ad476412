"""FLUX.1-dev and FLUX.1-schnell: a transformer over packed latents that is told its guidance, or has none."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rdm_rl.families.encoding import dtype_of
from rdm_rl.families.flow import FlowFamily
from rdm_rl.policy import SamplerName
from rdm_rl.randomness import Generators, normal
from rdm_rl.records import Conditioning


class FluxFamily(FlowFamily):
    """Pipelines of class ``FluxPipeline``.

    The library sees latents of shape (N, C, H, W); two by two of them are packed into one token where the network, and
    the pipeline's random steps, want them so. Guidance is a number that the network is told (dev) or nothing (schnell);
    true classifier-free guidance is not offered.
    """

    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"),
    )
    comfyui_layers: ClassVar[str] = (
        r"transformer_blocks\.\d+\.(attn\.(to_([qkv]|out\.0|add_out)|add_[qkv]_proj)|ff(_context)?\.net\.(0\.proj|2)|"
        r"norm1(_context)?\.linear)|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)|"
        r"time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]|(x|context)_embedder|norm_out\.linear|proj_out"
    )
    latent_multiple: ClassVar[int] = 2

    @property
    def own_latent_size(self) -> tuple[int, int]:
        """Height and width of the latents that the pipeline draws by default."""
        size = int(self.pipeline.default_sample_size)
        return size, size

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, before packing."""
        return super().latent_channels // 4

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """T5's hidden states, shape (N, L, E), and CLIP's pooled output, shape (N, E')."""
        states, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), None, device=self.device, max_sequence_length=self.prompt_tokens
        )
        return Conditioning(tensors={"encoder_hidden_states": states, "pooled_projections": pooled})

    @property
    def has_guidance(self) -> bool:
        """Whether the network is told one: dev is, schnell is not."""
        return bool(self.network.config.guidance_embeds)  # type: ignore[union-attr]

    @property
    def teacher_guidance_scale(self) -> float:  # type: ignore[override]
        """The pipeline's default, that of the model's own card; none for schnell."""
        return 3.5 if self.has_guidance else 1.0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a prompt: 512, and 256 for schnell, as its model card says."""
        return 512 if self.has_guidance else 256

    @property
    def token_limits(self) -> dict[str, int]:
        """CLIP's own limit, and for T5 the length of a prompt."""
        return {**super().token_limits, "tokenizer_2": self.prompt_tokens}

    def encoding_facts(self) -> dict[str, object]:
        """The usual facts, and the length of a prompt."""
        return {**super().encoding_facts(), "prompt_tokens": self.prompt_tokens}

    def student_call(
        self, num_inference_steps: int, sampler: SamplerName = "renoise", guidance_scale: float = 1.0
    ) -> dict[str, Any]:
        """The usual arguments, and the length of a prompt where it is not the pipeline's default."""
        usual = super().student_call(num_inference_steps, sampler, guidance_scale)
        return usual if self.has_guidance else {**usual, "max_sequence_length": self.prompt_tokens}

    def embeds_guidance(self, network: Any) -> bool:
        """Always: schnell, which is told none, is not asked twice either."""
        return True

    def forward(
        self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """The transformer's output, unpacked."""
        dtype = dtype_of(network)
        _, _, height, width = x_t.shape
        ids = self.pipeline._prepare_latent_image_ids(len(x_t), height // 2, width // 2, x_t.device, dtype)
        states = conditioning.tensors["encoder_hidden_states"].to(dtype)
        config: Any = network.config
        guidance = torch.full((len(x_t),), guidance_scale, device=x_t.device) if config.guidance_embeds else None
        output: Tensor = network(
            hidden_states=_pack(x_t.to(dtype)),
            timestep=self.schedule.timestep(t).to(dtype) / 1000,
            guidance=guidance,
            encoder_hidden_states=states,
            pooled_projections=conditioning.tensors["pooled_projections"].to(dtype),
            txt_ids=torch.zeros(states.shape[1], 3, device=x_t.device, dtype=dtype),
            img_ids=ids,
            return_dict=False,
        )[0]
        return _unpack(output.float(), height, width)

    def step_noise(self, shape: Sequence[int], generator: Generators, device: torch.device) -> Tensor:
        """The noise of a random step: the scheduler draws it for packed latents."""
        count, channels, height, width = shape
        packed = normal((count, (height // 2) * (width // 2), channels * 4), generator, device)
        return _unpack(packed, height, width)


def _pack(latents: Tensor) -> Tensor:
    """Two by two latents to a token: (N, C, H, W) becomes (N, H W / 4, 4 C)."""
    count, channels, height, width = latents.shape
    blocks = latents.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(count, (height // 2) * (width // 2), channels * 4)


def _unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`_pack`."""
    blocks = tokens.view(len(tokens), height // 2, width // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return blocks.reshape(len(tokens), -1, height, width)
