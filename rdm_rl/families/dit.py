"""DiT on ImageNet: a transformer over latents that is told a class."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rdm_rl.families.encoding import dtype_of
from rdm_rl.families.variance_preserving import VariancePreservingFamily
from rdm_rl.records import Conditioning


class DiTFamily(VariancePreservingFamily):
    """Pipelines of class ``DiTPipeline``. A prompt is the number of a class, or its name in the pipeline's list.

    The stock pipeline loads no adapters, so that a student is saved as a whole pipeline.
    """

    network_name: ClassVar[str] = "transformer"
    text_encoder_names: ClassVar[tuple[str, ...]] = ()
    loads_lora: ClassVar[bool] = False
    any_resolution: ClassVar[bool] = False
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    teacher_guidance_scale: float = 1.5  # The DiT paper's best FID at 256 pixels (arXiv 2212.09748, table 2).

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels of an image's side one latent stands for; the pipeline does not say."""
        return int(2 ** (len(self.pipeline.vae.config.block_out_channels) - 1))

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """The classes, shape (N,), int64."""
        return Conditioning(tensors={"class_labels": torch.tensor(self.class_labels(prompts), device=self.device)})

    def encode_without_values(self, count: int) -> Conditioning:
        """Classes, shape (N,)."""
        return Conditioning(tensors={"class_labels": torch.zeros(count, dtype=torch.int64, device=self.device)})

    def class_labels(self, prompts: Sequence[str]) -> list[int]:
        """The classes that prompts name.

        Raises:
            ValueError: If a prompt is neither a class's number nor its name.
        """
        config: Any = self.network.config
        names: dict[str, int] = getattr(self.pipeline, "labels", None) or {}
        found = []
        for prompt in prompts:
            number = int(prompt) if prompt.isdigit() else names.get(prompt)
            if number is None or number >= config.num_embeds_ada_norm:
                raise ValueError(
                    f"The prompt {prompt!r} names no class of this model: write its number, 0 to "
                    f"{config.num_embeds_ada_norm - 1}, or a name in pipeline.labels."
                )
            found.append(number)
        return found

    def encoding_facts(self) -> dict[str, object]:
        """The usual facts, and the names of the classes."""
        return {**super().encoding_facts(), "labels": getattr(self.pipeline, "labels", None)}

    def encode_empty_prompt(self) -> Conditioning:
        """The class that stands for none, which is the one after the last."""
        config: Any = self.network.config
        return Conditioning(tensors={"class_labels": torch.tensor([config.num_embeds_ada_norm], device=self.device)})

    def forward(
        self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """The transformer's output, without the variance that it predicts beside it."""
        labels = conditioning.tensors["class_labels"]
        dtype = dtype_of(network)
        output: Tensor = network(
            x_t.to(dtype), timestep=self.schedule.timestep(t), class_labels=labels, return_dict=False
        )[0]
        return output.float()[:, : x_t.shape[1]]
