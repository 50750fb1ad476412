"""What every family promises: it is the stock pipeline's own prediction, guidance and sampler, and its files load."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from peft import LoraConfig
from torch import Tensor

from rdm_rl.families import Family, FlowFamily, Flux2KleinFamily, load_family
from rdm_rl.networks.roles import AdapterNetworks
from rdm_rl.policy import rollout
from rdm_rl.student import SavedStudent, load_student, set_decoder_precision
from tests.helpers import QUICK, brightness, changed, latents, prompt_batch, quick_trainer, randomize, snapshot
from tests.tiny_pipelines import (
    CALLS,
    align_weights,
    tiny_dit,
    tiny_flux,
    tiny_klein,
    tiny_pixart,
    tiny_sana,
    tiny_sd,
    tiny_sd3,
    tiny_sdxl,
    tiny_unconditional,
    tiny_zimage,
)

# What is made, and the resolution that makes its images small where the published size is written into the class.
MAKERS: dict[str, tuple[Callable[[Path], Any], int | None]] = {
    "sd": (partial(tiny_sd, whole=True), None),
    "sd-v": (lambda folder: tiny_sd(folder, "v_prediction", whole=True), None),
    "sdxl": (tiny_sdxl, None),
    "sdxl-v": (lambda folder: tiny_sdxl(folder, "v_prediction"), None),
    "sd3": (tiny_sd3, None),
    "sd3-without-t5": (lambda folder: tiny_sd3(folder, t5=False), None),
    "flux-dev": (tiny_flux, 16),
    "flux-schnell": (lambda folder: tiny_flux(folder, guidance_embeds=False), 16),
    "sana": (tiny_sana, None),
    "pixart": (tiny_pixart, 16),
    "klein": (tiny_klein, 16),
    "zimage": (tiny_zimage, 16),
    "dit": (tiny_dit, None),
    "ddpm": (tiny_unconditional, None),
    "ddpm-v": (lambda folder: tiny_unconditional(folder, "v_prediction"), None),
}
SEED = 11


@pytest.fixture(scope="session", params=MAKERS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny saved pipeline."""
    place = tmp_path_factory.mktemp(kind)
    MAKERS[kind][0](place / "sources").save_pretrained(place / "pipeline")
    return place / "pipeline"


@pytest.fixture(scope="session")
def family(kind: str, folder: Path) -> Family:
    """Loaded once: no test changes its networks."""
    made = load_family(folder, resolution=MAKERS[kind][1])
    made.pipeline.set_progress_bar_config(disable=True)
    return made


def prompts(family: Family, count: int = 2) -> list[str]:
    texts = ["the digit 3", "a cat", "the digit 5"] if family.text_encoder_names else ["3", "1", "0"]
    return texts[:count]


def asked(family: Family, texts: list[str]) -> dict[str, Any]:
    """How the stock pipeline is asked for images of these prompts."""
    call = {name: value for name, value in CALLS[type(family.pipeline).__name__].items() if name != "prompt"}
    if not family.text_encoder_names:
        return {"class_labels": [int(text) for text in texts]} if "class_labels" in call else {"batch_size": len(texts)}
    return {**call, "prompt": list(texts)}  # Z-Image's pipeline writes into the list.


def drawn_by(pipeline: Any, monkeypatch: pytest.MonkeyPatch, **call: Any) -> tuple[Tensor, Any]:
    """The latents that a stock pipeline ends with, taken where they leave the scheduler, and its images."""
    last: list[Tensor] = []
    step = pipeline.scheduler.step

    def spy(*arguments: Any, **options: Any) -> Any:
        result = step(*arguments, **options)
        last[:] = [result[0] if isinstance(result, tuple) else result.prev_sample]
        return result

    monkeypatch.setattr(pipeline.scheduler, "step", spy)
    images = pipeline(**call).images
    return last[0], images


def unpacked(family: Family, found: Tensor) -> Tensor:
    """Tokens as latents of shape (N, C, H, W): FLUX's, and FLUX.2's."""
    if found.ndim == 4:
        return found
    _, height, width = family.latent_shape
    if isinstance(family, Flux2KleinFamily):
        return found.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    pixels = (height * family.pixels_per_latent, width * family.pixels_per_latent, family.pixels_per_latent)
    unpacked_latents: Tensor = family.pipeline._unpack_latents(found, *pixels)
    return unpacked_latents


def test_a_prompt_is_cut_where_the_family_says(family: Family) -> None:
    """The last letter counts as long as it is within the largest limit; beyond it, the prompt is reported."""
    if not family.tokenizers:
        assert family.token_limits == {}
        assert family.cut_prompts(["3", "1"]) == []
        return
    name = max(family.token_limits, key=family.token_limits.__getitem__)
    limit = family.token_limits[name]
    fitting = "x" * (limit - len(family.tokenizers[name]("").input_ids))
    fitting = fitting[len(family.tokenizers[name](fitting).input_ids) - limit :]  # T5 puts a mark before a word.
    for words, is_cut in ((fitting, False), (fitting + "x", True)):
        first, second = (family.encode([words[:-1] + letter]).tensors for letter in "xy")
        assert all(torch.equal(first[key], second[key]) for key in first) == is_cut
        reported = {each: cut for cut in family.cut_prompts(["x", words]) for each in cut.tokenizers}
        assert (name in reported) == is_cut
        assert all((cut.count, cut.longest > cut.limit) == (1, True) for cut in reported.values())


def test_a_pipeline_without_its_tokenizers_cuts_no_prompt(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts may have been encoded before, and the encoders left away."""
    for name in reversed([*family.tokenizers]):
        monkeypatch.setattr(family.pipeline, name, None)
        assert name not in {each for cut in family.cut_prompts(["x" * 2000]) for each in cut.tokenizers}
    assert family.cut_prompts(["x" * 2000]) == []


def test_prediction_of_x_0_is_the_scheduler_s(family: Family) -> None:
    x_t, texts = latents(2, *family.latent_shape), prompts(family)
    conditioning = family.encode(texts)
    for timestep in (999, 500, 100):
        t = torch.full((2,), (timestep + 1) / 1000)
        output = family.forward(family.network, x_t, t, conditioning)
        assert output.dtype == torch.float32
        assert output.shape == x_t.shape
        if isinstance(family, FlowFamily):
            scheduler = FlowMatchEulerDiscreteScheduler()
            scheduler.set_timesteps(sigmas=[t[0].item()])
            expected = scheduler.step(output, scheduler.timesteps[0], x_t).prev_sample  # One step, to t = 0.
        else:
            ddim = DDIMScheduler.from_config(family.pipeline.scheduler.config, clip_sample=False, thresholding=False)
            ddim.set_timesteps(1000)
            expected = ddim.step(output, timestep, x_t).pred_original_sample
        x_0 = family.predict_x_0(family.network, x_t, t, conditioning)
        torch.testing.assert_close(x_0, expected, rtol=1e-5, atol=1e-5)


def test_the_network_hears_time_prompt_and_noise(family: Family) -> None:
    x_t, texts = latents(2, *family.latent_shape), prompts(family, 3)
    first = family.predict_x_0(family.network, x_t, torch.tensor([0.5, 0.5]), family.encode(texts[:2]))
    later = family.forward(family.network, x_t, torch.tensor([0.9, 0.5]), family.encode(texts[:2]))
    again = family.forward(family.network, x_t, torch.tensor([0.5, 0.5]), family.encode(texts[:2]))
    assert not torch.allclose(later[0], again[0], atol=1e-4)
    torch.testing.assert_close(later[1], again[1])
    if family.text_encoder_names or hasattr(family, "class_labels"):
        other = family.predict_x_0(family.network, x_t, torch.tensor([0.5, 0.5]), family.encode([texts[2], texts[1]]))
        assert not torch.allclose(other[0], first[0], atol=1e-5)
        torch.testing.assert_close(other[1], first[1], rtol=1e-4, atol=1e-4)


def test_guidance_is_the_pipeline_s_own(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of the pipeline's deterministic sampler, down to clean latents, is its prediction of x_0 at t = 1."""
    pipeline, texts = family.pipeline, prompts(family)
    noise = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(SEED))
    if isinstance(family, FlowFamily):
        monkeypatch.setattr(pipeline, "scheduler", FlowMatchEulerDiscreteScheduler())
        times = {"sigmas": [1.0]}
    else:
        config = {**pipeline.scheduler.config, "clip_sample": False, "thresholding": False}
        ddim = DDIMScheduler.from_config(config, timestep_spacing="trailing", set_alpha_to_one=True)
        monkeypatch.setattr(pipeline, "scheduler", ddim)
        times = {}
    for guidance in (1.0, 0.5, 3.0) if family.has_guidance else (1.0,):
        call = {**asked(family, texts), **family.student_call(1, guidance_scale=guidance), **times}
        call["generator"] = torch.Generator().manual_seed(SEED)
        # DiT's pipeline has a guided and an unguided half from one noise; both halves are the guided prediction.
        expected = unpacked(family, drawn_by(pipeline, monkeypatch, **call)[0][: len(texts)])
        x_0 = family.predict_x_0(family.network, noise, torch.ones(2), family.encode(texts), guidance)
        torch.testing.assert_close(x_0, expected, rtol=1e-4, atol=1e-4)
        if guidance > 1:
            plain = family.predict_x_0(family.network, noise, torch.ones(2), family.encode(texts), 1.0)
            assert (plain - expected).abs().max() > 1e-3


def own_sample(family: Family, texts: list[str], steps: int) -> Tensor:
    """What our rollout draws with the untrained network; where the pipeline draws noise globally, so do we here."""
    torch.manual_seed(SEED)
    return rollout(
        lambda x_t, t, conditioning: family.predict_x_0(family.network, x_t, t, conditioning),
        prompt_batch(len(texts), family.encode(texts)),
        family.schedule,
        family.student_times(steps),
        shape=family.latent_shape,
        generator=torch.default_generator,
        step_noise=family.step_noise,
    ).sample


def test_the_sampler_is_the_stock_pipeline_s_bit_for_bit(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the saved scheduler and call."""
    texts, pipeline = prompts(family), family.pipeline
    for steps in (1, 2, 3, 4):
        monkeypatch.setattr(pipeline, "scheduler", family.student_scheduler(steps))
        call = {**asked(family, texts), **family.student_call(steps), "generator": torch.default_generator}
        torch.manual_seed(SEED)
        expected = unpacked(family, drawn_by(pipeline, monkeypatch, **call)[0])
        assert torch.equal(own_sample(family, texts, steps), expected), steps


def test_student_times_start_at_noise_and_fall(family: Family) -> None:
    for steps in (1, 2, 3, 4, 8):
        times = family.student_times(steps)
        assert times.shape == (steps,)
        assert times[0] == pytest.approx(1, abs=1.5e-3)
        assert (times[1:] < times[:-1]).all()
        assert times[-1] >= 1 / steps - 2e-3  # A shift spends more steps at high noise, never fewer.


def test_images_are_the_pipeline_s(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    x_0 = latents(1, *family.latent_shape).requires_grad_()
    images = family.decode(x_0)
    assert images.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1
    (slope,) = torch.autograd.grad(images.mean(), x_0)
    assert slope.abs().sum() > 0
    assert images.shape[2:] == tuple(side * family.pixels_per_latent for side in family.latent_shape[1:])
    monkeypatch.setattr(family.pipeline, "scheduler", family.student_scheduler(1))
    call = {**asked(family, prompts(family)), **family.student_call(1), "output_type": "np"}
    call["generator"] = torch.Generator().manual_seed(SEED)
    drawn, expected = drawn_by(family.pipeline, monkeypatch, **call)
    ours = family.decode(unpacked(family, drawn))
    torch.testing.assert_close(ours, torch.as_tensor(expected).permute(0, 3, 1, 2), rtol=0, atol=1e-5)


def test_everything_is_frozen(family: Family, kind: str) -> None:
    for part in family.pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            assert not part.training
            for name, parameter in part.named_parameters():
                assert not parameter.requires_grad
                # With constants, a network could ignore its time or its prompt, and tests would pass by accident.
                assert kind in ("sd", "sd-v") or parameter.numel() == 1 or parameter.std() > 0, name


def test_a_saved_adapter_reads_back_exactly(family: Family, kind: str, folder: Path, tmp_path: Path) -> None:
    """In the stock pipeline, with images of the student; a family without a loader saves the whole pipeline."""
    resolution = MAKERS[kind][1]
    given = {"peft_config": LoraConfig(r=2)}
    settings = {**QUICK, "num_inference_steps": 2, "resolution": resolution}
    trainer = quick_trainer(folder, tmp_path / "run", "rdm", given=given, **settings)
    randomize(trainer.networks, scale=0.1)
    trainer.save_model(tmp_path / "student")
    texts = prompts(family)
    student = load_student(tmp_path / "student", folder)
    if "guidance_scale" in student.call:  # Z-Image's pipeline counts it from 0.
        card = (tmp_path / "student" / "README.md").read_text(encoding="utf-8")
        assert f"it is used with `guidance_scale={student.call['guidance_scale']}`" in card
    align_weights(trainer.family.pipeline, student.pipeline)
    assert (tmp_path / "student" / "pytorch_lora_weights.safetensors").is_file() == family.loads_lora
    for count in (1, 2):
        torch.manual_seed(SEED)
        ours = trainer.generate(texts[:count], generator=torch.default_generator)
        torch.manual_seed(SEED)
        theirs = torch.as_tensor(student.draw(texts[:count], generator=torch.default_generator, output_type="np"))
        # Merged weights round once more than an adapter beside them.
        atol = 0 if family.loads_lora else 1e-4
        torch.testing.assert_close(ours, theirs.permute(0, 3, 1, 2), rtol=0, atol=atol)
    plain = family.decode(own_sample(family, texts, 2))
    assert (ours - plain).abs().max() > 1e-3  # The adapter does something.


def test_stock_pipelines_draw_in_half_precision(family: Family, kind: str, folder: Path) -> None:
    if kind.startswith("ddpm"):
        pytest.skip("diffusers' own pipeline cannot make an image of bfloat16")
    for dtype in [torch.bfloat16, *([torch.float16] if kind == "sana" else [])]:  # Its encoder keeps bfloat16.
        pipeline = load_family(folder, dtype=dtype, resolution=MAKERS[kind][1]).pipeline
        set_decoder_precision(pipeline, dtype)
        pipeline.scheduler = family.student_scheduler(2)
        pipeline.set_progress_bar_config(disable=True)
        (image,) = SavedStudent(pipeline, family.student_call(2)).draw(prompts(family, 1))
        assert image.size[0] == family.latent_shape[2] * family.pixels_per_latent


def test_full_fine_tuning_saves_a_pipeline(family: Family, kind: str, folder: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "num_inference_steps": 2, "max_steps": 1, "resolution": MAKERS[kind][1]}
    rows = [{"prompt": text} for text in prompts(family)]
    given = {"peft_config": None}
    trainer = quick_trainer(folder, tmp_path / "run", "rdm", given=given, train_dataset=rows, **settings)
    trainer.train()
    trainer.save_model(tmp_path / "student")
    assert str(folder) not in (tmp_path / "student" / "model_index.json").read_text()
    student = load_student(tmp_path / "student", "nothing")
    torch.manual_seed(SEED)
    theirs = torch.as_tensor(
        student.draw(prompts(family), generator=torch.default_generator, output_type="np")
    ).permute(0, 3, 1, 2)
    torch.manual_seed(SEED)
    ours = trainer.generate(prompts(family), generator=torch.default_generator)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # DiT's pipeline rounds its latents differently.
    own = snapshot(getattr(student.pipeline, family.network_name))
    assert changed(snapshot(family.network), own)
    assert not changed(snapshot(trainer.networks.module("policy")), own)


def test_an_update_changes_only_what_it_should(family: Family, kind: str, folder: Path, tmp_path: Path) -> None:
    """GNDMR with a reward's gradient: policy and fake score move, everything else stays bit for bit."""
    rows = [{"prompt": text} for text in prompts(family, 3)]
    settings = {**QUICK, "max_steps": 1, "resolution": MAKERS[kind][1]}
    trainer = quick_trainer(
        folder,
        tmp_path,
        ["rdm", brightness()],
        given={"peft_config": LoraConfig(r=2)},
        train_dataset=rows,
        **settings,
    )
    parts = {name: one for name, one in family.pipeline.components.items() if isinstance(one, torch.nn.Module)}
    own = trainer.family.pipeline.components
    before = {name: snapshot(own[name]) for name in parts}
    trainer.train()
    for name in parts:
        moved = changed(before[name], snapshot(own[name]))
        if name != family.network_name:
            assert not moved
            continue
        assert all("lora_" in one for one in moved)
        for role in ("policy", "fake_score"):
            assert any(f".{role}." in one for one in moved)
    assert all(value == value for row in trainer.state.log_history for value in row.values())
    assert any(row["rewards/brightness/lambda"] > 0 for row in trainer.state.log_history)


def test_a_flow_s_times_are_the_base_scheduler_s(family: Family, kind: str) -> None:
    if not isinstance(family, FlowFamily):
        pytest.skip("betas")
    config = family.pipeline.scheduler.config
    own = {"shift": config["flow_shift"]} if "flow_shift" in config else {}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, **own)
    c = scheduler.config
    mu = calculate_shift(family.image_tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    for steps in (1, 4, 20):
        if isinstance(family, Flux2KleinFamily):
            mu = compute_empirical_mu(family.image_tokens, steps)
        even = [1 - index / steps for index in range(steps)]
        scheduler.set_timesteps(sigmas=even, mu=mu if c.use_dynamic_shifting else None)
        torch.testing.assert_close(family.student_times(steps), scheduler.sigmas[:-1], rtol=0, atol=1e-6)
    assert (family.schedule.shift > 1) == (kind != "flux-schnell")


def test_the_adapter_s_layers_exist_and_recomputed_activations_give_the_same_gradients(kind: str, folder: Path) -> None:
    """In both trained roles, with the role left before the backward pass."""
    family = load_family(folder, resolution=MAKERS[kind][1])
    networks = AdapterNetworks(family, LoraConfig(r=2), torch.Generator().manual_seed(0))
    layers = {name.rsplit(".lora_A", 1)[0] for name in networks.named_parameters("policy") if ".lora_A" in name}
    for target in family.lora_targets:
        assert any(layer.endswith(f".{target}") or layer == target for layer in layers), target
    randomize(networks)
    x_t, conditioning = latents(2, *family.latent_shape), family.encode(prompts(family))

    def gradients() -> tuple[dict[str, Tensor], int]:
        """They, and how many forward passes of layers they took."""
        passes = 0

        def count(*_: Any) -> None:
            nonlocal passes
            passes += 1

        hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
        for role in ("policy", "fake_score"):
            networks.predict(role, x_t, torch.tensor([0.9, 0.5]), conditioning).square().mean().backward()
        hook.remove()
        found = {}
        for role in ("policy", "fake_score"):
            for name, parameter in networks.named_parameters(role).items():
                if parameter.grad is not None:
                    found[name], parameter.grad = parameter.grad, None
        return found, passes

    plain, passes = gradients()
    networks.enable_activation_checkpointing()
    again, more_passes = gradients()
    assert more_passes > passes, "nothing was recomputed"
    assert plain.keys() == again.keys()
    assert any(value.abs().max() > 0 for value in plain.values())
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-8, msg=name)
