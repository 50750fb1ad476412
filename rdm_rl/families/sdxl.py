"""Stable Diffusion XL: a U-Net with two text encoders that is also told the size of the image."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rdm_rl.families.kohya import sgm_name
from rdm_rl.families.sd import StableDiffusionFamily
from rdm_rl.records import Conditioning


class StableDiffusionXLFamily(StableDiffusionFamily):
    """Pipelines of class ``StableDiffusionXLPipeline``: the base model, without a refiner."""

    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    optional_components: ClassVar[tuple[str, ...]] = ("text_encoder",)
    teacher_guidance_scale: float = 8.0  # DMD2's setting for SDXL (its public scripts).

    def kohya_name(self, layer: str) -> str:
        """By the names of the code that SDXL was published with.

        Kohya's scripts know no others of this model, A1111 misses the first upsampler under diffusers' names, and
        ComfyUI and diffusers read both.
        """
        config: Any = self.network.config
        return super().kohya_name(sgm_name(layer, config.layers_per_block, config.up_block_types))

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Hidden states of both encoders, shape (N, L, E), and the second one's pooled output, shape (N, E')."""
        states, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        return Conditioning(tensors={"encoder_hidden_states": states, "text_embeds": pooled})

    def encode_empty_prompt(self) -> Conditioning:
        """Zeros where the pipeline says so, as the published model does, else the encoded empty prompt."""
        row = super().encode_empty_prompt()
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return row
        return Conditioning(tensors={name: torch.zeros_like(value) for name, value in row.tensors.items()})

    def added_conditioning(
        self, x_t: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> dict[str, Tensor] | None:
        """The pooled prompt, and sizes: of the original image, of its crop's corner, and of the result."""
        pooled = conditioning.tensors["text_embeds"].to(dtype)
        height, width = (side * self.pixels_per_latent for side in x_t.shape[2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=dtype, device=pooled.device)
        return {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), -1)}

    def decode(self, x_0: Tensor) -> Tensor:
        """Images of latents, which some autoencoders also normalise channel by channel."""
        config: Any = self.pipeline.vae.config
        values = config.get("latents_mean"), config.get("latents_std")  # Small and asymmetric ones know of neither.
        if None in values:
            return super().decode(x_0)
        mean, std = (x_0.new_tensor(value).view(1, -1, 1, 1) for value in values)
        return super().decode(x_0 * std + mean * config.scaling_factor)
