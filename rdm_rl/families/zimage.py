"""Z-Image and Z-Image-Turbo: a transformer that reads words and latents as one sequence, with Qwen3 as text encoder."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rdm_rl.families.encoding import dtype_of, tokens_before_prompt
from rdm_rl.families.flow import FlowFamily
from rdm_rl.records import Conditioning


class ZImageFamily(FlowFamily):
    """Pipelines of class ``ZImagePipeline``.

    Turbo has the class and the configuration of the base model. It was distilled without guidance: as a teacher, it
    wants ``teacher_guidance_scale=1``.
    """

    latent_multiple: ClassVar[int] = 2  # The transformer's patches.
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    )
    comfyui_layers: ClassVar[str] = (
        r"(layers|noise_refiner|context_refiner)\.\d+\.(attention\.to_([qkv]|out\.0)|feed_forward\.w[123]|"
        r"adaLN_modulation\.0)|all_final_layer\.2-1\.(linear|adaLN_modulation\.1)|all_x_embedder\.2-1|cap_embedder\.1|"
        r"t_embedder\.mlp\.[02]"
    )
    teacher_guidance_scale: float = 5.0  # The base model's card draws with 4, which the pipeline counts from 0.

    @property
    def own_latent_size(self) -> tuple[int, int]:
        """Height and width of the latents that the pipeline draws by default: those of 1024 pixels."""
        size = 1024 // self.pixels_per_latent
        return size, size

    def pipeline_guidance(self, guidance_scale: float) -> float:
        """One less, as the pipeline counts from 0: it adds its number of times what the prompt changes."""
        return max(guidance_scale - 1.0, 0.0)

    @property
    def prompt_tokens(self) -> int:
        """The most tokens of a prompt, with the template of a chat around it: the pipeline's default."""
        return super().token_limits["tokenizer"]

    @property
    def token_limits(self) -> dict[str, int]:
        """What the template leaves of them."""
        return {"tokenizer": self.prompt_tokens - tokens_before_prompt(self.pipeline.tokenizer)}

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Qwen3's hidden states, filled up with zeros to shape (N, L, E), and how many are a prompt's, shape (N,)."""
        rows, _ = self.pipeline.encode_prompt(list(prompts), self.device, do_classifier_free_guidance=False)
        most, lengths = self.prompt_tokens, [len(row) for row in rows]
        states = torch.stack([pad(row, (0, 0, 0, most - len(row))) for row in rows])
        return Conditioning(
            tensors={"encoder_hidden_states": states, "prompt_lengths": torch.tensor(lengths, device=self.device)}
        )

    def encode_without_values(self, count: int) -> Conditioning:
        """Prompts of the greatest length: how long one is, is a value, so that the lengths are on the CPU here."""
        width, dtype = self.pipeline.transformer.config.cap_feat_dim, self.pipeline.text_encoder.dtype
        states = torch.empty(count, self.prompt_tokens, width, dtype=dtype, device=self.device)
        lengths = torch.full((count,), self.prompt_tokens)
        return Conditioning(tensors={"encoder_hidden_states": states, "prompt_lengths": lengths})

    def forward(
        self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """The transformer's output with its sign turned: it is told the time from noise on, and predicts so."""
        dtype = dtype_of(network)
        states = conditioning.tensors["encoder_hidden_states"].to(dtype)
        lengths = conditioning.tensors["prompt_lengths"].tolist()
        outputs: Any = network(
            list(x_t.to(dtype).unsqueeze(2)),  # An image is a film of one frame.
            (self.schedule.steps - self.schedule.timestep(t)) / self.schedule.steps,
            [row[:length] for row, length in zip(states, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(outputs).float().squeeze(2)
