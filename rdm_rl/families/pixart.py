"""PixArt-Sigma: a transformer over latents with T5 as text encoder."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from rdm_rl.families.encoding import dtype_of
from rdm_rl.families.variance_preserving import VariancePreservingFamily
from rdm_rl.policy import SamplerName
from rdm_rl.records import Conditioning


class PixArtFamily(VariancePreservingFamily):
    """Pipelines of class ``PixArtSigmaPipeline``.

    The stock pipeline loads no adapters, so that a student is saved as a whole pipeline.
    """

    network_name: ClassVar[str] = "transformer"
    latent_multiple: ClassVar[int] = 2  # The transformer's patches.
    loads_lora: ClassVar[bool] = False
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    comfyui_layers: ClassVar[str] = (
        r"transformer_blocks\.\d+\.(attn[12]\.to_([qkv]|out\.0)|ff\.net\.(0\.proj|2))|pos_embed\.proj|proj_out|"
        r"adaln_single\.(linear|emb\.timestep_embedder\.linear_[12])|caption_projection\.linear_[12]"
    )
    teacher_guidance_scale: float = 4.5  # The pipeline's default.

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """T5's hidden states, shape (N, L, E), and which of them are text, shape (N, L)."""
        states, mask, _, _ = self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device
        )
        return Conditioning(tensors={"encoder_hidden_states": states, "encoder_attention_mask": mask})

    def forward(
        self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """The transformer's output, without the variance that it predicts beside it."""
        dtype = dtype_of(network)
        output: Tensor = network(
            x_t.to(dtype),
            encoder_hidden_states=conditioning.tensors["encoder_hidden_states"].to(dtype),
            encoder_attention_mask=conditioning.tensors["encoder_attention_mask"],
            timestep=self.schedule.timestep(t),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output.float()[:, : x_t.shape[1]]

    def student_call(
        self, num_inference_steps: int, sampler: SamplerName = "renoise", guidance_scale: float = 1.0
    ) -> dict[str, Any]:
        """The usual arguments; prompts and the image's size are taken as they are, as in training."""
        usual = super().student_call(num_inference_steps, sampler, guidance_scale)
        return {**usual, "use_resolution_binning": False, "clean_caption": False}
