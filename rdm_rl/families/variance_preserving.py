"""What families with a discrete variance-preserving noise schedule share: DDPM's betas, and the schedulers for them."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from diffusers import DDIMScheduler, LCMScheduler
from torch import Tensor

from rdm_rl.families.base import Family
from rdm_rl.families.resolution import Resolution
from rdm_rl.noise_schedule import VariancePreserving
from rdm_rl.policy import SamplerName


class VariancePreservingFamily(Family):
    """A family whose scheduler has a table of alphas: Stable Diffusion 1.x, 2.x, XL, DiT, DDPM.

    Args:
        pipeline: The pipeline.
        resolution: Size of the images in pixels; None is the pipeline's own.

    Raises:
        ValueError: If the scheduler has no such table, or its prediction type is not one the library converts to x_0.
    """

    schedule: VariancePreserving

    def __init__(self, pipeline: Any, resolution: int | str | Resolution | None = None) -> None:
        """Read the schedule and the prediction type from the pipeline's scheduler."""
        super().__init__(pipeline, resolution)
        self.schedule = VariancePreserving(_alphas_cumprod(pipeline.scheduler))
        kind = pipeline.scheduler.config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                f"The model's scheduler says prediction_type={kind!r}, which has no conversion to x_0 here; "
                "supported are 'epsilon', 'v_prediction' and 'sample'. Correct scheduler/scheduler_config.json."
            )
        self.prediction_type = kind
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
        steps = len(self.schedule.alphas_cumprod)
        if num_inference_steps > steps:
            raise ValueError(
                f"num_inference_steps={num_inference_steps}, but the model knows {steps} times, and a student takes "
                f"one for each step. Set at most {steps}: 1 to 8 are usual."
            )
        if sampler == "renoise":
            extra: dict[str, Any] = {"timestep_scaling": 10000.0, "original_inference_steps": num_inference_steps}
            return _scheduler(LCMScheduler, self.schedule.alphas_cumprod, {**config, **extra})
        if sampler != "ddim" or steps % num_inference_steps:
            raise ValueError(
                f"sampler={sampler!r} with num_inference_steps={num_inference_steps}: a variance-preserving model is "
                f"sampled with 'renoise' or 'ddim', and stock DDIM's steps only chain if their number divides {steps}. "
                "Use 'renoise', or 'ddim' with 2, 4, 5, 8, 10, 20, 25, 40 or 50 steps."
            )
        extra = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
        return _scheduler(DDIMScheduler, self.schedule.alphas_cumprod, {**config, **extra})

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


def _alphas_cumprod(scheduler: Any) -> Tensor:
    """A scheduler's own table of alphas, shape (T,), float32, on the CPU.

    Raises:
        ValueError: If it has none, or does not noise by it.
    """
    config = scheduler.config
    table: Tensor | None = getattr(scheduler, "alphas_cumprod", None)
    if table is None or config.get("use_flow_sigmas") or config.get("timestep_type") == "continuous":
        raise ValueError(
            f"The model's scheduler is a {type(scheduler).__name__} that does not noise by a table of alphas "
            "(alphas_cumprod), on which this family's schedule rests. If the network was trained with DDPM's betas, "
            "set pipe.scheduler to a DDIMScheduler with these betas; an EDM model such as Playground v2.5 or CosXL "
            "was not, and no family is written for it: use SDXL's own weights, or docs/add_a_family.md."
        )
    table = table.float().cpu().clone()
    if config.get("rescale_betas_zero_snr"):
        table[-1] = 0  # Some schedulers hold 2**-24 there, so that their sigma stays finite.
    return table


def _scheduler(kind: type[Any], alphas_cumprod: Tensor, config: Mapping[str, Any]) -> Any:
    """A scheduler with this table, shape (T,), and with those settings of another one that it has too.

    diffusers' own way, ``from_config``, warns of all the others.
    """
    known = {name: config[name] for name in signature(kind).parameters if name in config}
    try:
        scheduler = kind(**known)
        if torch.equal(scheduler.alphas_cumprod, alphas_cumprod):
            return scheduler
    except NotImplementedError:
        pass  # A kind of betas, such as "sigmoid", that this scheduler does not offer, but takes as numbers.
    levels = torch.cat([torch.ones(1), alphas_cumprod]).double()
    betas = (1 - levels[1:] / levels[:-1]).tolist()
    return kind(**{**known, "trained_betas": betas, "num_train_timesteps": len(betas), "rescale_betas_zero_snr": False})
