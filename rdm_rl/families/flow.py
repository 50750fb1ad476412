"""What flow-matching families share: the straight path, and the schedulers for it."""

from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from rdm_rl.families.base import Family
from rdm_rl.families.resolution import Resolution
from rdm_rl.noise_schedule import FlowMatching
from rdm_rl.policy import SamplerName


class FlowFamily(Family):
    """A family that predicts the velocity of a straight path from data to noise: SD3, FLUX, Sana, Z-Image.

    Args:
        pipeline: The pipeline.
        resolution: Size of the images in pixels; None is the pipeline's own.

    Raises:
        ValueError: If the scheduler is not one of flow matching.
    """

    network_name = "transformer"
    schedule: FlowMatching

    def __init__(self, pipeline: Any, resolution: int | str | Resolution | None = None) -> None:
        """Read the schedule from the pipeline's scheduler."""
        super().__init__(pipeline, resolution)
        config, name = pipeline.scheduler.config, type(pipeline.scheduler).__name__
        predicts_flow = config.get("prediction_type") == "flow_prediction"
        solves_flow = predicts_flow and config.get("use_flow_sigmas") and "flow_shift" in config
        if not (name.startswith("FlowMatch") or solves_flow) or config.get("invert_sigmas"):
            raise ValueError(
                f"The model's scheduler is a {name} with prediction_type={config.get('prediction_type')!r}, but a "
                f"{type(pipeline).__name__} predicts the velocity of a flow. Use its FlowMatchEulerDiscreteScheduler."
            )
        self.prediction_type = "flow"
        self.schedule = self.flow_schedule()

    def at(self, resolution: Resolution) -> "FlowFamily":
        """The same family for images of another size, with the shift of that size."""
        resized: Any = super().at(resolution)
        resized.schedule = resized.flow_schedule()
        return resized  # type: ignore[no-any-return]

    def flow_schedule(self) -> FlowMatching:
        """The straight path, with the base's shift of the times; a dynamic one depends on the image's size."""
        config = self.pipeline.scheduler.config
        steps = config.num_train_timesteps
        if not config.get("use_dynamic_shifting"):  # DPM-Solver's name, and Euler's.
            return FlowMatching(steps, shift=float(config.get("flow_shift", config.get("shift", 1.0))))
        ends = (config[f"{end}_{what}"] for what in ("image_seq_len", "shift") for end in ("base", "max"))
        mu = calculate_shift(self.image_tokens, *ends)
        is_exponential = config.get("time_shift_type", "exponential") == "exponential"
        return FlowMatching(steps, shift=float(np.exp(mu) if is_exponential else mu))

    @property
    def image_tokens(self) -> int:
        """Tokens of one image, on which a dynamic shift depends."""
        _, height, width = self.latent_shape
        return (height // self.latent_multiple) * (width // self.latent_multiple)

    def student_times(self, num_inference_steps: int, sampler: SamplerName = "renoise") -> Tensor:
        """The times 1, (K-1)/K, ..., 1/K, shifted as the base's own scheduler shifts them.

        Stock pipelines would end a four-step list at t = 0.001 instead, a step that does almost nothing.
        """
        return self.schedule.descent(1.0, num_inference_steps)[:-1]

    def student_scheduler(self, num_inference_steps: int, sampler: SamplerName = "renoise") -> Any:
        """``FlowMatchEulerDiscreteScheduler``, random for ``renoise``; the times go to the call as ``sigmas``.

        It has no shift of its own, because it would shift explicit times again.
        """
        if sampler not in ("renoise", "flow_sde", "cps"):
            raise ValueError(f"sampler={sampler!r} is not made for a flow. Use 'renoise', 'flow_sde' or 'cps'.")
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=self.schedule.steps, shift=1.0, stochastic_sampling=sampler == "renoise"
        )

    def student_call(
        self, num_inference_steps: int, sampler: SamplerName = "renoise", guidance_scale: float = 1.0
    ) -> dict[str, Any]:
        """The usual arguments and the student's times, as ``sigmas``."""
        usual = super().student_call(num_inference_steps, sampler, guidance_scale)
        return {**usual, "sigmas": self.student_times(num_inference_steps, sampler).tolist()}

    def schedule_facts(self) -> list[float]:
        """The scale of the network's time."""
        return [float(self.schedule.steps)]
