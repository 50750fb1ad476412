"""Sana: a linear-attention transformer over strongly compressed latents, with a language model as text encoder."""

from collections.abc import Sequence
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rdm_rl.families.encoding import dtype_of
from rdm_rl.families.flow import FlowFamily
from rdm_rl.policy import SamplerName
from rdm_rl.records import Conditioning


class SanaFamily(FlowFamily):
    """Pipelines of class ``SanaPipeline``."""

    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    teacher_guidance_scale: float = 4.5  # The pipeline's default.

    @classmethod
    def text_encoder_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        """Never float16, in which Gemma 2 overflows: Sana's authors run it in bfloat16, whatever the transformer's."""
        return torch.bfloat16 if dtype == torch.float16 else dtype

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """The language model's hidden states, shape (N, L, E), and which of them are text, shape (N, L).

        Prompts come after the pipeline's default instruction; the empty prompt, as in the pipeline, does not.
        """
        instruction = signature(type(self.pipeline).__call__).parameters["complex_human_instruction"].default
        return self._encode(list(prompts), instruction)

    def encode_empty_prompt(self) -> Conditioning:
        """The empty prompt without the instruction."""
        return self._encode([""], None)

    @property
    def token_limits(self) -> dict[str, int]:
        """One less than the pipeline's length of a prompt: the instruction's last token has a place in it."""
        return {name: limit - 1 for name, limit in super().token_limits.items()}

    def _encode(self, prompts: list[str], instruction: list[str] | None) -> Conditioning:
        states, mask, _, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device, complex_human_instruction=instruction
        )
        return Conditioning(tensors={"encoder_hidden_states": states, "encoder_attention_mask": mask})

    def forward(
        self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """The transformer's output, without the variance that some are trained to predict beside it."""
        dtype = dtype_of(network)
        config: Any = network.config
        output: Tensor = network(
            x_t.to(dtype),
            encoder_hidden_states=conditioning.tensors["encoder_hidden_states"].to(dtype),
            encoder_attention_mask=conditioning.tensors["encoder_attention_mask"],
            timestep=self.schedule.timestep(t) * config.timestep_scale,
            return_dict=False,
        )[0]
        return output.float()[:, : x_t.shape[1]]

    def student_call(
        self, num_inference_steps: int, sampler: SamplerName = "renoise", guidance_scale: float = 1.0
    ) -> dict[str, Any]:
        """The usual arguments; the image has the student's size, and not 1024 pixels or the nearest in a list."""
        height, width = (side * self.pixels_per_latent for side in self.latent_shape[1:])
        usual = super().student_call(num_inference_steps, sampler, guidance_scale)
        return {**usual, "height": height, "width": width, "use_resolution_binning": False}
