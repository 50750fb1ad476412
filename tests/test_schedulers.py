"""Every scheduler of diffusers: a model is trained by its own alphas, or refused by the scheduler's name."""

from inspect import isclass, signature
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, LCMScheduler
from torch import Tensor

from rdm_rl.families import load_family
from rdm_rl.noise_schedule import x_0_from_output
from tests.helpers import latents
from tests.tiny_pipelines import tiny_sd3, tiny_unconditional

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # Of old schedulers.

# Whatever else diffusers has, now or later, is to be refused.
SCHEDULERS_OF_BETAS = {
    *("CogVideoXDDIM", "CogVideoXDPM", "DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep"),
    *("DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSDE", "DPMSolverSinglestep"),
    *("EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM"),
    *("LMSDiscrete", "PNDM", "RePaint", "SASolver", "TCD", "UnCLIP", "UniPCMultistep"),
}
SCHEDULERS_OF_FLOWS = {
    *("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM", "DEISMultistep", "SASolver", "UniPCMultistep"),
    *("DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSinglestep"),
}
REQUIRED = {
    "Amused": {"mask_token_id": 1},
    "RFD4Proteina": {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
    "VQDiffusion": {"num_vec_classes": 4},
}
CLASSES: dict[str, Any] = {
    name.removesuffix("Scheduler"): kind
    for name in dir(diffusers)
    if name.endswith("Scheduler") and isclass(kind := getattr(diffusers, name))
    # diffusers has a stand-in for a class whose own dependency is not installed.
    if "torchsde" not in getattr(kind, "_backends", ()) or diffusers.utils.is_torchsde_available()
}


@pytest.fixture(scope="module")
def pixels() -> Any:
    return tiny_unconditional()


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_sd3(tmp_path_factory.mktemp("flow"), t5=False)


def x_0_of(scheduler: Any, timestep: int, x_t: Tensor, output: Tensor) -> Tensor:
    """What a scheduler's own table makes of an output that predicts the noise."""
    alpha_bar = scheduler.alphas_cumprod[timestep]
    return (x_t - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt()


def assert_trained_and_saved_by_its_own_alphas(pipeline: Any, folder: Path) -> None:
    family = load_family(pipeline)
    x_t, output = latents(1, 3, 8, 8), latents(1, 3, 8, 8, seed=1)
    for timestep in (0, 500, 900):
        t = torch.tensor([(timestep + 1) / 1000])
        alpha_t, sigma_t = family.schedule.alpha(t), family.schedule.sigma(t)
        x_0 = x_0_from_output(output, x_t, alpha_t, sigma_t, family.prediction_type)
        expected = x_0_of(pipeline.scheduler, timestep, x_t, output).float()
        torch.testing.assert_close(x_0, expected, rtol=1e-5, atol=1e-5)
    for kind, sampler in ((LCMScheduler, "renoise"), (DDIMScheduler, "ddim")):
        family.student_scheduler(4, sampler).save_pretrained(folder)
        saved = kind.from_pretrained(folder)
        expected = pipeline.scheduler.alphas_cumprod.float()
        torch.testing.assert_close(saved.alphas_cumprod, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CLASSES)
def test_a_denoiser_by_its_scheduler_s_own_alphas(name: str, pixels: Any, tmp_path: Path) -> None:
    pixels.scheduler = CLASSES[name](**REQUIRED.get(name, {}))
    if name in SCHEDULERS_OF_BETAS:
        assert_trained_and_saved_by_its_own_alphas(pixels, tmp_path)
    else:
        with pytest.raises(
            ValueError, match=f"scheduler is a {name}Scheduler that does not noise by a table of alphas"
        ):
            load_family(pixels)


@pytest.mark.parametrize("betas", ["sigmoid", "laplace", "squaredcos_cap_v2"])
def test_kinds_of_betas_that_the_student_s_schedulers_do_not_offer(betas: str, pixels: Any, tmp_path: Path) -> None:
    pixels.scheduler = DDPMScheduler(beta_schedule=betas)
    assert_trained_and_saved_by_its_own_alphas(pixels, tmp_path)


@pytest.mark.parametrize(
    "config",
    [{"timestep_type": "continuous", "prediction_type": "v_prediction"}, {"use_flow_sigmas": True}],
    ids=["continuous", "flow"],
)
def test_a_table_that_a_scheduler_does_not_use(config: dict[str, Any], pixels: Any) -> None:
    kind = EulerDiscreteScheduler if "timestep_type" in config else diffusers.UniPCMultistepScheduler
    pixels.scheduler = kind(**config)
    with pytest.raises(ValueError, match=f"{kind.__name__} that does not noise by a table of alphas"):
        load_family(pixels)


@pytest.mark.parametrize("name", ["Euler", "EulerAncestral", "UniPC", "DPMSolver", "DDIM"])
def test_zero_terminal_signal_is_zero_for_the_student_too(name: str, pixels: Any) -> None:
    suffix = {"Euler": "Discrete", "EulerAncestral": "Discrete", "UniPC": "Multistep", "DPMSolver": "Multistep"}
    kind = CLASSES[name + suffix.get(name, "")]
    pixels.scheduler = kind(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    family = load_family(pixels)
    assert family.schedule.alpha(torch.tensor(1.0)) == 0
    student = family.student_scheduler(4)
    torch.testing.assert_close(student.alphas_cumprod, pixels.scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)
    assert student.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("name", CLASSES)
def test_a_flow_by_its_scheduler_s_own_sigmas(name: str, flow: Any) -> None:
    kind = CLASSES[name]
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "shift": 3.0, "flow_shift": 3.0}
    known = {key: value for key, value in config.items() if key in signature(kind).parameters}
    flow.scheduler = kind(**REQUIRED.get(name, {}), **known)
    if name not in SCHEDULERS_OF_FLOWS:
        with pytest.raises(ValueError, match=f"scheduler is a {name}Scheduler with prediction_type="):
            load_family(flow)
        return
    family = load_family(flow)
    assert family.schedule.descent(1.0, 2).tolist() == [1.0, 0.75, 0.0]
    flow.scheduler.set_timesteps(4)
    times = flow.scheduler.timesteps / flow.scheduler.config.num_train_timesteps
    sigmas = flow.scheduler.sigmas[: len(times)]
    torch.testing.assert_close(family.schedule.sigma(times), sigmas.float(), rtol=0, atol=2e-3)
    torch.testing.assert_close(family.schedule.alpha(times), 1 - sigmas.float(), rtol=0, atol=2e-3)
