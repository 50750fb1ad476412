"""What families with a discrete variance-preserving noise schedule share: DDPM's betas, and the schedulers for them."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from diffusers import DDIMScheduler, LCMScheduler
from torch import Tensor

from rdm_rl.families.base import Family
from rdm_rl.noise_schedule import VariancePreserving
from rdm_rl.policy import SamplerName


class VariancePreservingFamily(Family):
    """A family whose scheduler has betas: Stable Diffusion 1.x, 2.x, XL, DiT, DDPM.

    Args:
        pipeline: The pipeline.
        resolution: Height and width of the images in pixels; None is the pipeline's own.

    Raises:
        ValueError: If the scheduler's prediction type is not one the library converts to x_0.
    """

    schedule: VariancePreserving

    def __init__(self, pipeline: Any, resolution: int | None = None) -> None:
        """Read the schedule and the prediction type from the pipeline's scheduler."""
        super().__init__(pipeline, resolution)
        kind = pipeline.scheduler.config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                f"The model's scheduler says prediction_type={kind!r}, which has no conversion to x_0 here; "
                "supported are 'epsilon', 'v_prediction' and 'sample'. Correct scheduler/scheduler_config.json."
            )
        self.prediction_type = kind
        self.schedule = VariancePreserving(_scheduler(DDIMScheduler, pipeline.scheduler.config).alphas_cumprod)
        if kind == "epsilon" and self.schedule.alphas_cumprod[-1] == 0:
            raise ValueError(
                "The model predicts epsilon and its scheduler sets rescale_betas_zero_snr=True: at t = 1 nothing of "
                "x_0 is left, so no prediction of it can be read off the noise. Use a v-prediction model, or unset it."
            )

    def student_scheduler(self, num_inference_steps: int, sampler: SamplerName = "renoise") -> Any:
        """``LCMScheduler``, or ``DDIMScheduler`` for ``ddim``, set so that its step is the policy's.

        LCM's default ``timestep_scaling`` of 10 would mix the noisy sample into x_0, and a base configuration's
        ``clip_sample`` or ``thresholding`` would silently change latents. ``original_inference_steps`` makes
        ``pipe(prompt, num_inference_steps=K, guidance_scale=1.0)`` walk the student's own K times. DDIM's ``trailing``
        steps begin at pure noise; its last one goes to clean data.
        """
        config = {**self.pipeline.scheduler.config, "clip_sample": False, "thresholding": False}
        if sampler == "renoise":
            return _scheduler(
                LCMScheduler, config, timestep_scaling=10000.0, original_inference_steps=num_inference_steps
            )
        steps = len(self.schedule.alphas_cumprod)
        if sampler != "ddim" or steps % num_inference_steps:
            raise ValueError(
                f"sampler={sampler!r} with num_inference_steps={num_inference_steps}: a variance-preserving model is "
                f"sampled with 'renoise' or 'ddim', and stock DDIM's steps only chain if their number divides {steps}. "
                "Use 'renoise', or 'ddim' with 2, 4, 5, 8, 10, 20, 25, 40 or 50 steps."
            )
        return _scheduler(DDIMScheduler, config, timestep_spacing="trailing", set_alpha_to_one=True)

    def student_times(self, num_inference_steps: int, sampler: SamplerName = "renoise") -> Tensor:
        """The times of the student's scheduler."""
        scheduler = self.student_scheduler(num_inference_steps, sampler)
        scheduler.set_timesteps(num_inference_steps)
        times: Tensor = (scheduler.timesteps.cpu().float() + 1) / scheduler.config.num_train_timesteps
        return times

    def schedule_facts(self) -> list[float]:
        """Signal levels of all timesteps."""
        levels: list[float] = self.schedule.alphas_cumprod.tolist()
        return levels


def _scheduler(kind: type[Any], config: Mapping[str, Any], **changes: Any) -> Any:
    """A scheduler with those settings of another one that it has too; diffusers' own way warns of all the others."""
    known = {name: config[name] for name in signature(kind).parameters if name in config}
    return kind(**{**known, **changes})
