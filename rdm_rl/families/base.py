"""What the library asks of a family of diffusion pipelines: the border where foreign models become one interface."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rdm_rl.data_types import Conditioning
from rdm_rl.noise_schedule import NoiseSchedule, PredictionType, x_0_from_output
from rdm_rl.samplers import SamplerName


class Family(ABC):
    """One kind of diffusers pipeline.

    Args:
        pipeline: The loaded pipeline. Its encoders and decoder are frozen and put in evaluation mode.

    Raises:
        ValueError: If the pipeline cannot be distilled by this family.
    """

    network_name: ClassVar[str] = "unet"
    """Attribute of the pipeline that holds the denoising network."""

    lora_targets: ClassVar[tuple[str, ...]]
    """Module names (matched by suffix) that get an adapter when the user's ``LoraConfig`` names none."""

    teacher_guidance_scale: ClassVar[float]
    """Guidance of the teacher when the user sets none: what published distillations of this family use."""

    schedule: NoiseSchedule
    prediction_type: PredictionType

    def __init__(self, pipeline: Any) -> None:
        """Keep the pipeline and freeze everything in it."""
        self.pipeline = pipeline
        self._empty: Conditioning | None = None
        if any(isinstance(module, BaseTunerLayer) for module in self.network.modules()):
            raise ValueError(
                "The pipeline already has adapters, which would be switched off without a word. Call pipe.fuse_lora() "
                "and pipe.unload_lora_weights() first, or load the pipeline again."
            )
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)

    @property
    def network(self) -> nn.Module:
        """The denoising network of the pipeline."""
        network: nn.Module = getattr(self.pipeline, self.network_name)
        return network

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return next(self.network.parameters()).device

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent, (C, H, W), at the pipeline's default resolution."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The encoded prompts, one row each, on the family's device, without a graph."""

    @abstractmethod
    def forward(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's raw output, float32, shape (N, C, H, W), for x_t of that shape and t of shape (N,)."""

    @abstractmethod
    def decode(self, x_0: Tensor) -> Tensor:
        """Images, shape (N, 3, H', W'), in [0, 1], of latents of shape (N, C, H, W); differentiable."""

    def enable_decoder_checkpointing(self) -> None:
        """Recompute the decoder's activations in backward passes instead of keeping them."""
        self.pipeline.vae.enable_gradient_checkpointing()

    @abstractmethod
    def student_scheduler(self, num_inference_steps: int, sampler: SamplerName = "renoise") -> Any:
        """The stock scheduler with which diffusers walks the K-step student exactly as the policy does.

        Args:
            num_inference_steps: Steps K of the student.
            sampler: The policy's sampler.

        Raises:
            ValueError: If no stock scheduler makes the sampler's K steps.
        """

    @abstractmethod
    def student_times(self, num_inference_steps: int, sampler: SamplerName = "renoise") -> Tensor:
        """The times that the student visits, shape (K,), in (0, 1], falling: those of the student's scheduler."""

    @abstractmethod
    def save_lora(self, folder: str, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write an adapter as ``pytorch_lora_weights.safetensors`` that ``load_lora_weights`` reads.

        Args:
            folder: Where to write.
            state: The adapter's weights under PEFT's names, without the adapter's name.
            metadata: The adapter's configuration.
        """

    @abstractmethod
    def load_lora(self, folder: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """The weights of an adapter saved for diffusers, under PEFT's names without an adapter's name.

        Args:
            folder: Where it is.

        Returns:
            The weights, and the adapter's configuration if the file has it.
        """

    def save_pipeline(self, folder: str, network: nn.Module, scheduler: Any) -> None:
        """Write a whole pipeline with another network and scheduler.

        Args:
            folder: Where to write.
            network: The student's network.
            scheduler: The student's scheduler.
        """
        components = {**self.pipeline.components, self.network_name: network, "scheduler": scheduler}
        type(self.pipeline)(**components).save_pretrained(folder)

    @abstractmethod
    def border(self) -> str:
        """A short name of what a teacher and a student must share: the noise schedule and the text encoder."""

    def empty_prompt(self) -> Conditioning:
        """The encoded empty prompt, one row, kept after the first call and outside of any autocast, as prompts are."""
        if self._empty is None:
            with torch.autocast(self.device.type, enabled=False):
                self._empty = self.encode([""])
        return self._empty

    def predict_x_0(
        self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """The network's prediction of x_0, with classifier-free guidance on the raw output as the pipelines do it.

        References:
            | Classifier-Free Diffusion Guidance (Ho and Salimans, 2022), eq. 6, with w = guidance_scale - 1
            | https://arxiv.org/abs/2207.12598

        Args:
            network: The network to ask.
            x_t: Noisy latents, shape (N, C, H, W).
            t: Times, shape (N,), in (0, 1].
            conditioning: Encoded prompts, N rows.
            guidance_scale: 1 asks the network once; anything else also asks it for the empty prompt.

        Returns:
            The prediction, shape (N, C, H, W), float32.
        """
        if guidance_scale == 1.0:
            output = self.forward(network, x_t, t, conditioning)
        else:
            both = self.empty_prompt().repeat(len(x_t)).then(conditioning)
            without, with_prompt = self.forward(network, torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
            output = without + guidance_scale * (with_prompt - without)
        return x_0_from_output(output, x_t, self.schedule.alpha(t), self.schedule.sigma(t), self.prediction_type)


@torch.no_grad()
def fingerprint(network: nn.Module, **settings: object) -> str:
    """A short name for a network's weights and some settings: files made with others never mix.

    Args:
        network: The network; a sample of each of its weights is read.
        settings: Anything that JSON can hold.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, parameter in network.named_parameters():
        if "lora_" not in name:
            flat = parameter.flatten()
            part = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy()
            # Adapters wrap a layer as base_layer; the weights are the same.
            digest.update(name.replace(".base_layer", "").encode() + part.tobytes())
    return digest.hexdigest()[:16]
