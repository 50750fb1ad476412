"""At the border of Stable Diffusion, beside what tests/test_family_contract.py asks of every family."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel
from torch import Tensor

from rdm_rl.families import StableDiffusionFamily, check_model_name, load_family
from rdm_rl.records import Conditioning
from tests.helpers import latents, tiny_sd
from tests.tiny_pipelines import tiny_klein, tiny_zimage

PROMPTS = ["the digit 3", "the digit 4", "the digit 5"]


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fail)


def test_prediction_of_x_0_is_the_schedulers_where_the_network_predicts_it(tmp_path: Path) -> None:
    family = load_family(tiny_sd(tmp_path, "sample"))
    x_t, conditioning = latents(3, 4, 8, 8), family.encode(PROMPTS)
    for timestep in (999, 500, 0):
        t = torch.full((3,), (timestep + 1) / 1000)
        output = family.forward(family.network, x_t, t, conditioning)
        scheduler = DDIMScheduler.from_config(family.pipeline.scheduler.config)
        scheduler.set_timesteps(1000)
        expected = scheduler.step(output, timestep, x_t).pred_original_sample
        x_0 = family.predict_x_0(family.network, x_t, t, conditioning)
        assert x_0.dtype == torch.float32
        torch.testing.assert_close(x_0, expected, rtol=1e-5, atol=1e-5)


def test_prompts_are_encoded_without_graph_row_by_row(tmp_path: Path) -> None:
    family = load_family(tiny_sd(tmp_path))
    states = family.encode(PROMPTS).tensors["encoder_hidden_states"]
    assert states.shape == (3, 16, 32)
    assert not states.requires_grad
    torch.testing.assert_close(family.encode(PROMPTS[1:2]).tensors["encoder_hidden_states"], states[1:2])
    assert not torch.allclose(states[0], states[1])


def test_student_times_fall_evenly(tmp_path: Path) -> None:
    family = load_family(tiny_sd(tmp_path))
    for steps in (1, 2, 3, 4, 8):  # The scheduler steps by 1000 // K, so three steps start at timestep 998.
        assert (family.student_times(steps) - (1 - torch.arange(steps) / steps)).abs().max() < 2e-3


def test_student_scheduler_changes_nothing_behind_our_back(tmp_path: Path) -> None:
    pipe = tiny_sd(tmp_path, "v_prediction")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=True, thresholding=True)
    scheduler = load_family(pipe).student_scheduler(4)
    config = scheduler.config
    assert (config.clip_sample, config.thresholding, config.timestep_scaling) == (False, False, 10000)
    assert config.original_inference_steps == 4
    assert config.prediction_type == "v_prediction"
    assert torch.equal(scheduler.alphas_cumprod, pipe.scheduler.alphas_cumprod)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_epsilon_has_no_answer_where_there_is_no_signal(tmp_path: Path) -> None:
    """With zero terminal SNR, alpha is 0 at t = 1 and x_0 cannot be read off the predicted noise."""
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        load_family(tiny_sd(tmp_path, "epsilon", rescale_betas_zero_snr=True))
    family = load_family(tiny_sd(tmp_path / "v", "v_prediction", rescale_betas_zero_snr=True))
    assert family.schedule.alpha(torch.tensor(1.0)) == 0
    x_0 = family.predict_x_0(family.network, latents(2, 4, 8, 8), torch.ones(2), family.encode(PROMPTS[:2]))
    assert x_0.isfinite().all()
    with pytest.raises(ValueError, match="prediction_type='flow_prediction'"):
        load_family(tiny_sd(tmp_path, "flow_prediction"))


@pytest.mark.parametrize(("is_distilled", "guidance"), [(False, 4.0), (True, 1.0)])
def test_of_klein_the_distilled_model_has_no_guidance(is_distilled: bool, guidance: float) -> None:
    family = load_family(tiny_klein(is_distilled=is_distilled))
    assert family.has_guidance != is_distilled
    assert family.teacher_guidance_scale == guidance


def test_z_image_reads_each_prompt_to_its_own_end() -> None:
    """Also where one is filled up to 64 tokens and the other to 32."""
    family = load_family(tiny_zimage(), resolution=16)
    conditioning = family.encode(["the digit 3", "a cat"])
    states, lengths = (conditioning.tensors[name] for name in ("encoder_hidden_states", "prompt_lengths"))
    assert lengths[1] < 32 < lengths[0] < states.shape[1]
    behind = torch.arange(states.shape[1]) >= lengths[:, None]
    assert not states[behind].any()
    x_t, t = latents(2, *family.latent_shape), torch.tensor([0.9, 0.5])
    expected = family.forward(family.network, x_t, t, conditioning)
    other = Conditioning(tensors={**conditioning.tensors, "encoder_hidden_states": states + 9 * behind[:, :, None]})
    assert torch.equal(family.forward(family.network, x_t, t, other), expected)
    other = Conditioning(tensors={**conditioning.tensors, "prompt_lengths": lengths - 1})
    assert not torch.allclose(family.forward(family.network, x_t, t, other), expected)


def test_loads_a_folder_or_a_pipeline(base: Path, tmp_path: Path) -> None:
    from_folder, given = load_family(base), load_family(tiny_sd(tmp_path))
    assert isinstance(from_folder, StableDiffusionFamily)
    states: list[dict[str, Tensor]] = [family.network.state_dict() for family in (from_folder, given)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert from_folder.latent_shape == (4, 8, 8)


@pytest.mark.usefixtures("no_loading")
def test_what_is_no_pipeline_is_said_before_loading(tmp_path: Path) -> None:
    for name in ("/no/such/folder", "./missing", "~/missing", "missing", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="neither an existing folder nor a hub name"):
            load_family(name)
    with pytest.raises(FileNotFoundError, match=r"without model_index\.json"):
        load_family(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "KolorsPipeline"}')
    with pytest.raises(ValueError, match=r"KolorsPipeline, which no family supports.*StableDiffusionPipeline"):
        load_family(tmp_path)
    check_model_name("owner/name")


def test_unsupported_loaded_pipeline_is_refused() -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
    )
    with pytest.raises(ValueError, match="PNDMPipeline, which no family supports"):
        load_family(type("PNDMPipeline", (DDIMPipeline,), {})(unet=unet, scheduler=DDIMScheduler()))
