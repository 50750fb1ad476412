"""Stable Diffusion 1.x and 2.x (and the embedded digits): a U-Net with one text encoder, epsilon or v-prediction."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rdm_rl.families.encoding import dtype_of
from rdm_rl.families.variance_preserving import VariancePreservingFamily
from rdm_rl.records import Conditioning


class StableDiffusionFamily(VariancePreservingFamily):
    """Pipelines of class ``StableDiffusionPipeline``."""

    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
        *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out", "downsamplers.0.conv"),
        "upsamplers.0.conv",
    )
    comfyui_layers: ClassVar[str] = (
        r"conv_in|conv_out|(time|add)_embedding\.linear_[12]|(down_blocks|mid_block|up_blocks)\..+\.(conv[12]?|proj_in|"
        r"proj_out|conv_shortcut|time_emb_proj|attn[12]\.to_([qkv]|out\.0)|ff\.net\.(0\.proj|2))"
    )

    # DMD2's setting for SD1.5 (its public scripts); a guidance of 1 leaves the teacher as it was trained.
    teacher_guidance_scale: float = 1.75

    @property
    def latent_multiple(self) -> int:  # type: ignore[override]
        """What makes the sides of images multiples of 8, which the pipeline wants."""
        return max(1, 8 // self.pixels_per_latent)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """The last hidden states of the text encoder, shape (N, L, E)."""
        embeddings, _ = self.pipeline.encode_prompt(list(prompts), self.device, 1, False)
        return Conditioning(tensors={"encoder_hidden_states": embeddings})

    def forward(
        self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """The U-Net's output."""
        dtype = dtype_of(network)
        output: Tensor = network(
            x_t.to(dtype),
            self.schedule.timestep(t),
            encoder_hidden_states=conditioning.tensors["encoder_hidden_states"].to(dtype),
            timestep_cond=self.guidance_embedding(network, guidance_scale, x_t),
            added_cond_kwargs=self.added_conditioning(x_t, conditioning, dtype),
            return_dict=False,
        )[0]
        return output.float()

    def added_conditioning(
        self, x_t: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> dict[str, Tensor] | None:
        """What else the U-Net is told; nothing here."""
        return None

    def embeds_guidance(self, network: Any) -> bool:
        """Whether the U-Net is a latent consistency model, which is told its guidance."""
        return network.config.time_cond_proj_dim is not None

    def guidance_embedding(self, network: Any, guidance_scale: float, like: Tensor) -> Tensor | None:
        """The guidance as a latent consistency model is told it, shape (N, E), or None."""
        if not self.embeds_guidance(network):
            return None
        scale = torch.full((len(like),), guidance_scale - 1)
        size = network.config.time_cond_proj_dim
        embedding: Tensor = self.pipeline.get_guidance_scale_embedding(scale, embedding_dim=size)
        return embedding.to(like.device, dtype_of(network))
