"""Plain diffusion models of pixels: a U-Net that is told nothing but the time."""

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import DDPMPipeline
from torch import Tensor, nn

from rdm_rl.families.encoding import dtype_of
from rdm_rl.families.resolution import Resolution
from rdm_rl.families.variance_preserving import VariancePreservingFamily
from rdm_rl.policy import SamplerName
from rdm_rl.records import Conditioning


class UnconditionalFamily(VariancePreservingFamily):
    """Pipelines of class ``DDPMPipeline`` and ``DDIMPipeline``. Prompts are names without effect.

    The stock pipelines load no adapters, so that a student is saved as a whole pipeline: a ``DDPMPipeline``, because a
    ``DDIMPipeline`` replaces whatever scheduler it is given.
    """

    text_encoder_names: ClassVar[tuple[str, ...]] = ()
    decoder_name: ClassVar[str | None] = None
    loads_lora: ClassVar[bool] = False
    any_resolution: ClassVar[bool] = False
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "time_emb_proj"),
        *("conv_in", "conv_out", "downsamplers.0.conv", "upsamplers.0.conv"),
    )
    teacher_guidance_scale: float = 1.0

    def __init__(self, pipeline: Any, resolution: int | str | Resolution | None = None) -> None:
        """Refuse a network that is told a class, or that predicts a variance."""
        super().__init__(pipeline, resolution)
        config = pipeline.unet.config
        if config.out_channels != config.in_channels:
            raise ValueError(
                f"The U-Net makes {config.out_channels} channels of {config.in_channels}: it also predicts a variance, "
                "which the student's scheduler cannot take. Keep the first channels of unet.conv_out, those of the "
                "prediction, and set out_channels to in_channels."
            )
        if pipeline.unet.config.num_class_embeds is not None:
            raise ValueError(
                f"The U-Net is told one of {pipeline.unet.config.num_class_embeds} classes, but no stock pipeline "
                "draws from such a model. A DiTPipeline is supported; or write a family (docs/add_a_family.md)."
            )

    @property
    def pixels_per_latent(self) -> int:
        """The network works on the pixels themselves."""
        return 1

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Nothing."""
        return Conditioning()

    def forward(
        self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """The U-Net's output."""
        dtype = dtype_of(network)
        output: Tensor = network(x_t.to(dtype), self.schedule.timestep(t), return_dict=False)[0]
        return output.float()

    @property
    def has_guidance(self) -> bool:
        """Without a condition there is nothing to guide towards."""
        return False

    def decode(self, x_0: Tensor) -> Tensor:
        """The pixels, moved from [-1, 1] to [0, 1]."""
        return (x_0 / 2 + 0.5).clamp(0, 1).float()

    def student_call(
        self, num_inference_steps: int, sampler: SamplerName = "renoise", guidance_scale: float = 1.0
    ) -> dict[str, Any]:
        """The number of steps."""
        return {"num_inference_steps": num_inference_steps}

    def save_pipeline(self, folder: str, network: nn.Module, scheduler: Any) -> None:
        """Write a ``DDPMPipeline``."""
        DDPMPipeline(unet=network, scheduler=scheduler).save_pretrained(folder)
