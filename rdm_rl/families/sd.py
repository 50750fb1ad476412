"""Stable Diffusion 1.x and 2.x (and the embedded digits): a U-Net with one text encoder, epsilon or v-prediction."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor, nn

from rdm_rl.data_types import Conditioning
from rdm_rl.families.base import Family, fingerprint
from rdm_rl.noise_schedule import VariancePreserving
from rdm_rl.samplers import SamplerName


class StableDiffusionFamily(Family):
    """Pipelines of class ``StableDiffusionPipeline``.

    Args:
        pipeline: The pipeline.

    Raises:
        ValueError: If the scheduler's prediction type is not one the library converts to x_0.
    """

    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
        *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out", "downsamplers.0.conv"),
        "upsamplers.0.conv",
    )
    schedule: VariancePreserving

    # DMD2's setting for SD1.5 (its public scripts); a guidance of 1 leaves the teacher as it was trained.
    teacher_guidance_scale: ClassVar[float] = 1.75

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        """Read the schedule and the prediction type from the pipeline's scheduler."""
        super().__init__(pipeline)
        kind = pipeline.scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                f"The model's scheduler says prediction_type={kind!r}, which has no conversion to x_0 here; "
                "supported are 'epsilon', 'v_prediction' and 'sample'. Correct scheduler/scheduler_config.json."
            )
        self.prediction_type = kind
        self.schedule = VariancePreserving(DDIMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod)
        if kind == "epsilon" and self.schedule.alphas_cumprod[-1] == 0:
            raise ValueError(
                "The model predicts epsilon and its scheduler sets rescale_betas_zero_snr=True: at t = 1 nothing of "
                "x_0 is left, so no prediction of it can be read off the noise. Use a v-prediction model, or unset it."
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent, (C, H, W), at the pipeline's default resolution."""
        config = self.pipeline.unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The last hidden states of the text encoder, shape (N, L, E)."""
        embeddings, _ = self.pipeline.encode_prompt(list(prompts), self.device, 1, False)
        return Conditioning(tensors={"encoder_hidden_states": embeddings})

    def forward(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's output."""
        dtype = next(network.parameters()).dtype
        states = conditioning.tensors["encoder_hidden_states"].to(dtype)
        timestep = self.schedule.timestep(t)
        output: Tensor = network(x_t.to(dtype), timestep, encoder_hidden_states=states, return_dict=False)[0]
        return output.float()

    def decode(self, x_0: Tensor) -> Tensor:
        """Images of latents, as the pipeline decodes and rescales them."""
        vae = self.pipeline.vae
        images: Tensor = vae.decode(x_0.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        images = (images * 0.5 + 0.5).clamp(0, 1)
        return images.float()

    def student_scheduler(self, num_inference_steps: int, sampler: SamplerName = "renoise") -> Any:
        """``LCMScheduler``, or ``DDIMScheduler`` for ``ddim``, set so that its step is the policy's.

        LCM's default ``timestep_scaling`` of 10 would mix the noisy sample into x_0, and a base configuration's
        ``clip_sample`` or ``thresholding`` would silently change latents. ``original_inference_steps`` makes
        ``pipe(prompt, num_inference_steps=K, guidance_scale=1.0)`` walk the student's own K times. DDIM's ``trailing``
        steps begin at pure noise; its last one goes to clean data.
        """
        config = {**self.pipeline.scheduler.config, "clip_sample": False, "thresholding": False}
        if sampler == "renoise":
            return LCMScheduler.from_config(
                config, timestep_scaling=10000.0, original_inference_steps=num_inference_steps
            )
        steps = len(self.schedule.alphas_cumprod)
        if sampler != "ddim" or steps % num_inference_steps:
            raise ValueError(
                f"sampler={sampler!r} with num_inference_steps={num_inference_steps}: a variance-preserving model is "
                f"sampled with 'renoise' or 'ddim', and stock DDIM's steps only chain if their number divides {steps}. "
                "Use 'renoise', or 'ddim' with 2, 4, 5, 8, 10, 20, 25, 40 or 50 steps."
            )
        return DDIMScheduler.from_config(config, timestep_spacing="trailing", set_alpha_to_one=True)

    def student_times(self, num_inference_steps: int, sampler: SamplerName = "renoise") -> Tensor:
        """The times of the student's scheduler."""
        scheduler = self.student_scheduler(num_inference_steps, sampler)
        scheduler.set_timesteps(num_inference_steps)
        times: Tensor = (scheduler.timesteps.cpu().float() + 1) / scheduler.config.num_train_timesteps
        return times

    def save_lora(self, folder: str, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write the U-Net's adapter."""
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=state,  # PEFT's names: diffusers' own cover attention alone, and a mixture loads in part.
            unet_lora_adapter_metadata=metadata,
            safe_serialization=True,
        )

    def load_lora(self, folder: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """The U-Net's part of a saved adapter."""
        state, _, metadata = StableDiffusionPipeline.lora_state_dict(
            folder, weight_name="pytorch_lora_weights.safetensors", return_lora_metadata=True
        )
        prefix = f"{self.network_name}."
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        converted: dict[str, Tensor] = convert_unet_state_dict_to_peft(own)
        known = {name: value for name, value in (metadata or {}).items() if name.startswith(prefix)}
        return converted, {name.removeprefix(prefix): value for name, value in known.items()} or None

    def border(self) -> str:
        """Schedule and text encoder; the prediction type may differ, as both are wrapped to predict x_0."""
        levels = self.schedule.alphas_cumprod.tolist()
        return fingerprint(self.pipeline.text_encoder, levels=levels)
