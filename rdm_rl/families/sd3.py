"""Stable Diffusion 3 and 3.5: a multimodal transformer with three text encoders that predicts a flow's velocity."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from rdm_rl.families.encoding import dtype_of
from rdm_rl.families.flow import FlowFamily
from rdm_rl.families.resolution import Resolution
from rdm_rl.records import Conditioning


class StableDiffusion3Family(FlowFamily):
    """Pipelines of class ``StableDiffusion3Pipeline``, with or without the third text encoder (T5)."""

    latent_multiple: ClassVar[int] = 2  # The transformer's patches.
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional_components: ClassVar[tuple[str, ...]] = ("text_encoder_3",)
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    comfyui_layers: ClassVar[str] = (
        r"transformer_blocks\.\d+\.(attn2?\.to_([qkv]|out\.0)|attn\.(add_[qkv]_proj|to_add_out)|norm1(_context)?\.linear|"
        r"ff(_context)?\.net\.(0\.proj|2))|time_text_embed\.(timestep|text)_embedder\.linear_[12]|context_embedder|"
        r"pos_embed\.proj|norm_out\.linear|proj_out"
    )
    # RTDMD's real-score guidance for SD3.5-M (its public code); for SD3-M it sets 7.
    teacher_guidance_scale: float = 4.5

    def _check_resolution(self, resolution: Resolution) -> None:
        super()._check_resolution(resolution)
        config: Any = self.network.config
        most = config.pos_embed_max_size * config.patch_size * self.pixels_per_latent
        if max(resolution) > most:
            raise ValueError(f"resolution={resolution}, but this model's table of positions ends at {most} pixels.")

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Hidden states of all encoders, shape (N, L, E), and the pooled output of the first two, shape (N, E')."""
        texts = list(prompts)
        states, _, pooled, _ = self.pipeline.encode_prompt(
            texts, texts, texts, device=self.device, do_classifier_free_guidance=False
        )
        return Conditioning(tensors={"encoder_hidden_states": states, "pooled_projections": pooled})

    def forward(
        self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """The transformer's output."""
        dtype = dtype_of(network)
        output: Tensor = network(
            hidden_states=x_t.to(dtype),
            timestep=self.schedule.timestep(t),
            return_dict=False,
            **{name: value.to(dtype) for name, value in conditioning.tensors.items()},
        )[0]
        return output.float()
