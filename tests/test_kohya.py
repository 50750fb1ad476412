"""Files for programs that people draw with: ComfyUI drops nothing of them, and adds to each weight what PEFT does."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rdm_rl.cli.main import main
from rdm_rl.cli.plan.model_sizes import MODELS
from rdm_rl.cli.plan.skeleton import make_skeleton, read_blueprint
from rdm_rl.families import FlowFamily, load_family
from rdm_rl.families.adapters import DIFFUSERS_LORA, adapter_scales
from rdm_rl.families.kohya import sgm_name
from rdm_rl.families.sd import StableDiffusionFamily
from rdm_rl.networks.roles import AdapterNetworks
from rdm_rl.policy import make_sampler, renoise, rollout
from rdm_rl.student import KOHYA_LORA, save_student
from tests import comfyui
from tests.helpers import EXAMPLES, latents, prompt_batch, table_rows
from tests.tiny_pipelines import CALLS, TINY, align_weights, tiny_sd

READ_BY_COMFYUI = ("sd", "sdxl", "sd3", "flux_dev", "flux_schnell", "pixart", "klein", "zimage")
PLAIN = LoraConfig(r=4, lora_alpha=4)  # All of the family's own layers.
SCALED = LoraConfig(r=4, lora_alpha=6)
SOME = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "conv1", "conv_in"]
SOME_SCALED = LoraConfig(r=4, lora_alpha=6, target_modules=SOME)
# Layers of other ranks and other scales, and the scale of rank-stabilised LoRA: all that PEFT offers.
MIXED = LoraConfig(
    **{"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": SOME},
    **{"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 2, "to_v": 3}},
)


def student_of(kind: str, config: LoraConfig, folder: Path) -> AdapterNetworks:
    """A tiny student with random adapters, saved in ``student`` beside its base in ``base``."""
    pipeline = TINY[kind](folder / "sources")
    pipeline.save_pretrained(folder / "base")
    networks = AdapterNetworks(load_family(pipeline), config, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for parameter in networks.parameters("policy"):
        parameter.data.normal_(std=0.2, generator=generator)
    save_student(folder / "student", networks, num_inference_steps=2, base=str(folder / "base"), facts={})
    return networks


def added_by_peft(networks: AdapterNetworks) -> dict[str, Tensor]:
    layers = networks.module("policy").named_modules()
    return {name: layer.get_delta_weight("policy").flatten(1) for name, layer in layers if isinstance(layer, LoraLayer)}


@pytest.mark.parametrize("config", [PLAIN, SCALED, MIXED], ids=["plain", "scaled", "mixed"])
@pytest.mark.parametrize("kind", READ_BY_COMFYUI)
def test_comfyui_adds_to_every_weight_what_the_student_does(kind: str, config: LoraConfig, tmp_path: Path) -> None:
    networks = student_of(kind, config, tmp_path)
    files = [name for name in (KOHYA_LORA, DIFFUSERS_LORA) if (tmp_path / "student" / name).is_file()]
    is_unet = networks.family.network_name == "unet"
    # A transformer's file for diffusers is ComfyUI's too, unless it needs an alpha to be right.
    assert (KOHYA_LORA in files) == (is_unet or not networks.family.loads_lora or config is not PLAIN)
    card = (tmp_path / "student" / "README.md").read_text(encoding="utf-8")
    assert f"`{files[0]}` is for ComfyUI" in card
    assert ("the node `Flux2Scheduler`" in card) == (kind == "klein")
    added, left_over = comfyui.what_is_added(
        load_file(tmp_path / "student" / files[0]), comfyui.names_of(networks.family.network)
    )
    assert not left_over
    torch.testing.assert_close(added, added_by_peft(networks), rtol=1e-5, atol=1e-6)


def test_why_a_file_of_its_own_is_needed(tmp_path: Path) -> None:
    """Of diffusers' file of a U-Net, ComfyUI drops the attention layers with no more than a line in its log."""
    networks = student_of("sd", SCALED, tmp_path)
    file = load_file(tmp_path / "student" / DIFFUSERS_LORA)
    _, left_over = comfyui.what_is_added(file, comfyui.names_of(networks.family.network))
    assert left_over == {name for name in file if ".to_" in name}
    assert left_over


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_every_layer_of_the_true_sizes_has_its_name(model: str) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(MODELS[model]["unet"])
    places = comfyui.unet_layers(unet)
    layers = [name for name, part in unet.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    assert len(layers) > 250
    assert set(layers) <= places.keys()
    config: Any = unet.config
    for layer in layers:
        assert sgm_name(layer, config.layers_per_block, config.up_block_types) == places[layer]
        assert re.fullmatch(StableDiffusionFamily.comfyui_layers, layer)


def pictures(folder: Path, lora: Path) -> Tensor:
    """What stock diffusers draws with a file, without this library."""
    pipeline = load_family(folder / "base").pipeline
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    align_weights(pipeline)
    call = CALLS[type(pipeline).__name__]
    torch.manual_seed(3)
    images: Tensor = pipeline(**call, num_inference_steps=2, guidance_scale=1.0, output_type="pt").images
    return images


@pytest.mark.parametrize(
    ("kind", "config", "atol"),
    [
        *((kind, SCALED, 0) for kind in ("sd", "sdxl")),
        # Where scales are part of the weights, they round elsewhere.
        *((kind, MIXED, 1e-4) for kind in ("sd", "sdxl", "flux_dev", "sd3", "zimage")),
    ],
)
@pytest.mark.filterwarnings("error:.*alpha_pattern:RuntimeWarning")
def test_the_same_images_from_both_files(kind: str, config: LoraConfig, atol: float, tmp_path: Path) -> None:
    student_of(kind, config, tmp_path)
    by_diffusers, by_kohya = (pictures(tmp_path, tmp_path / "student" / name) for name in (DIFFUSERS_LORA, KOHYA_LORA))
    torch.testing.assert_close(by_kohya, by_diffusers, rtol=0, atol=atol)
    assert by_kohya.std() > 0.01


def policy_of(base: Path, source: Path) -> AdapterNetworks:
    config = LoraConfig(r=2, target_modules=["to_q"])
    return AdapterNetworks(load_family(base), config, torch.Generator(), policy_init=str(source))


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux_dev", "klein", "zimage"])
def test_there_and_back(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a saved student to each form and back, of which a policy starts, with the same tensors."""
    monkeypatch.chdir(tmp_path)
    networks = student_of(kind, SOME_SCALED, tmp_path)
    state, _ = networks.export()
    words = ["--model", "base", "--format"]
    assert main(["export", "student", *words, "kohya"]) == 0
    assert main(["export", "student-kohya.safetensors", *words, "diffusers", "--output", "back.safetensors"]) == 0
    file = load_file("student-kohya.safetensors")
    saved = load_file(f"student/{KOHYA_LORA}")
    assert file.keys() == saved.keys()
    assert all(torch.equal(file[name], saved[name]) for name in file)
    again = policy_of(tmp_path / "base", tmp_path / "back.safetensors")
    assert again.state_dict("policy").keys() == networks.state_dict("policy").keys()
    torch.testing.assert_close(added_by_peft(again), added_by_peft(networks), rtol=1e-6, atol=1e-6)
    if kind in ("sd", "sdxl"):
        assert all(torch.equal(value, state[name]) for name, value in again.export()[0].items())
        from_kohya = policy_of(tmp_path / "base", tmp_path / "student-kohya.safetensors")
        scales, again = (adapter_scales(each.module("policy"), "policy") for each in (networks, from_kohya))
        assert again == scales


def test_alphas_of_their_own_are_read(tmp_path: Path) -> None:
    """Other trainers give attention layers another alpha than the rest, which diffusers forgets."""
    networks = student_of("sd", SOME_SCALED, tmp_path)
    file = load_file(tmp_path / "student" / KOHYA_LORA)
    for name in file:
        if name.endswith(".alpha"):
            file[name] = torch.tensor(3.0 if "_to_" in name else 5.0)
    del file["lora_unet_conv_in.alpha"]  # Its rank, then.
    save_file(file, tmp_path / "published.safetensors")
    scales = adapter_scales(policy_of(tmp_path / "base", tmp_path / "published.safetensors").module("policy"), "policy")
    due = {name: 0.75 if ".to_" in name else 1.25 for name in scales} | {"conv_in": 1.0}
    assert scales == due
    assert scales.keys() == adapter_scales(networks.module("policy"), "policy").keys()


@pytest.mark.parametrize("kind", TINY)
def test_what_comfyui_does_not_know_is_refused(kind: str, tmp_path: Path) -> None:
    """The family's pattern knows the layers that ComfyUI does, and no others."""
    family = load_family(TINY[kind](tmp_path))
    known = set(comfyui.names_of(family.network).values()) if family.comfyui_layers else set()
    layers = [name for name, part in family.network.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    assert bool(known) == (kind in (*READ_BY_COMFYUI, "sd3_without_t5"))
    refused = 0
    for layer in layers:
        state = {f"{layer}.lora_A.weight": torch.ones(1, 2), f"{layer}.lora_B.weight": torch.ones(2, 1)}
        if layer in known:
            assert len(family.comfyui_tensors(state, {layer: 0.5})) in (2, 3)
            continue
        refused += 1
        with pytest.raises(ValueError, match=type(family.network).__name__):
            family.comfyui_tensors(state, {layer: 0.5})
    assert known or refused == len(layers)


def test_a_student_that_comfyui_cannot_hold_is_saved_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    networks = student_of("sd", LoraConfig(r=2, target_modules=["to_q"], use_dora=True), tmp_path)
    assert (tmp_path / "student" / DIFFUSERS_LORA).is_file()
    assert not (tmp_path / "student" / KOHYA_LORA).exists()
    assert "lora_magnitude_vector" in caplog.text
    assert "ComfyUI" not in (tmp_path / "student" / "README.md").read_text(encoding="utf-8")
    assert networks.family.comfyui_layers


@pytest.mark.parametrize(
    ("make", "words", "message"),
    [
        (lambda folder: tiny_sd(folder).save_pretrained(folder / "student"), [], "is a whole model"),
        (lambda folder: student_of("sana", SOME_SCALED, folder), ["--model", "base"], "SanaTransformer2DModel"),
        (lambda folder: (folder / "student").mkdir(), [], "does not say which model it belongs to"),
        (lambda folder: None, [], "neither an existing folder nor a hub name"),
        (lambda folder: student_of("sd", SOME_SCALED, folder), ["--model", "sd15"], "does not fit this model"),
    ],
    ids=["full", "sana", "no-model", "nothing", "other-model"],
)
def test_what_export_refuses(
    make: Callable[[Path], Any],
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    before = set(tmp_path.iterdir())
    assert main(["export", "student", "--format", "kohya", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert set(tmp_path.iterdir()) == before


def test_half_precision_leaves_alphas_alone(tmp_path: Path) -> None:
    student_of("sd", LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=SOME), tmp_path)
    words = ["--format", "kohya", "--model", str(tmp_path / "base"), "--dtype", "float16"]
    assert main(["export", str(tmp_path / "student"), *words, "--output", str(tmp_path / "half.safetensors")]) == 0
    half, whole = load_file(tmp_path / "half.safetensors"), load_file(tmp_path / "student" / KOHYA_LORA)
    assert half.keys() == whole.keys()
    for name, value in half.items():
        assert value.dtype == (torch.float32 if name.endswith(".alpha") else torch.float16)
        assert torch.equal(value, whole[name].to(value.dtype))


# ----- what docs/draw_with_your_student.md says -----


def test_the_page_s_table_of_steps(tmp_path: Path) -> None:
    family = load_family(tiny_sd(tmp_path))
    rows = [cells for cells in table_rows("draw_with_your_student.md") if cells[0].isdigit()]
    assert len(rows) >= 5
    for cells in rows:
        steps = int(cells[0])
        times = (family.student_times(steps) * 1000 - 1).round().int().tolist()
        printed = [[float(number) for number in cell.split(", ")] for cell in cells[1:4]]
        assert printed[0] == times
        assert printed[1] == comfyui.simple_timesteps(steps)
        assert printed[2] == pytest.approx(comfyui.sgm_uniform_timesteps(steps), abs=0.006)
        assert (printed[0] == printed[1]) == (1000 % steps == 0)


@pytest.mark.parametrize(("sampler", "name"), [("renoise", "lcm"), ("ddim", "euler")])
def test_the_card_names_comfyui_s_sampler(sampler: str, name: str, tmp_path: Path) -> None:
    networks = AdapterNetworks(load_family(tiny_sd(tmp_path)), PLAIN, torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 4, "sampler": sampler, "base": "a", "facts": {}}
    save_student(tmp_path / "student", networks, **settings)
    assert f"in ComfyUI with the sampler `{name}`" in (tmp_path / "student" / "README.md").read_text(encoding="utf-8")


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["lcm", "euler"])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_comfyui_s_samplers_take_the_student_s_steps(kind: str, sampler: str, tmp_path: Path) -> None:
    family, steps = load_family(TINY[kind](tmp_path)), 4
    batch = prompt_batch(2, family.encode(["the digit 3", "the digit 4"]))
    noises = [latents(2, *family.latent_shape, seed=seed) for seed in range(steps)]
    draws = iter(noises[1:])
    is_flow = isinstance(family, FlowFamily)
    keeps_noise = make_sampler("cps" if is_flow else "ddim", 0.0)
    chains = rollout(
        partial(family.predict_x_0, family.network),
        batch,
        family.schedule,
        family.student_times(steps),
        shape=family.latent_shape,
        generator=torch.Generator().manual_seed(0),
        sampler=renoise if sampler == "lcm" else keeps_noise,
        step_noise=lambda *_: next(draws),
    )
    # The levels that the scheduler picks from, and the time that the network is told at each.
    times = (torch.arange(1000) + 1) / 1000
    if is_flow:
        times = table = family.schedule.shift * times / (1 + (family.schedule.shift - 1) * times)
    else:
        table = family.schedule.sigma(times) / family.schedule.alpha(times)

    def network(x_t: Tensor, sigma: Tensor) -> Tensor:
        time = times[(table - sigma).abs().argmin()]
        return family.forward(family.network, x_t, time.expand(2), batch.conditioning)

    def walked(timesteps: list[int]) -> Tensor:
        if sampler == "lcm":
            return comfyui.walked_by_lcm(network, table[timesteps], noises, is_flow=is_flow)
        return comfyui.walked_by_euler(network, table[timesteps], noises[0], is_flow=is_flow)

    x_0 = walked(comfyui.simple_timesteps(steps))
    torch.testing.assert_close(x_0, chains.x_0[-1], rtol=1e-3, atol=1e-4)
    assert (walked([999, 759, 499, 259]) - x_0).abs().max() > 1e-2  # Ten of 1000 are seen.


@pytest.mark.parametrize("kind", ["sd3", "flux_dev", "flux_schnell", "zimage"])
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8])
def test_a_flow_s_times_are_those_of_comfyui_s_simple(kind: str, steps: int, tmp_path: Path) -> None:
    """It picks from a table of even times, which the model's shift moves, as the student's are moved."""
    family = load_family(TINY[kind](tmp_path))
    times = torch.tensor([(time + 1) / 1000 for time in comfyui.simple_timesteps(steps)])
    shifted = family.schedule.shift * times / (1 + (family.schedule.shift - 1) * times)
    torch.testing.assert_close(family.student_times(steps), shifted)


@pytest.mark.parametrize("size", ["512", "1024x768", "1024", "1536"])
def test_flux_2_s_times_are_those_of_comfyui_s_node(size: str) -> None:
    family = load_family(make_skeleton(read_blueprint("klein-base-4b")), resolution=size)
    _, height, width = family.latent_shape
    for steps in (1, 2, 3, 4, 8):
        levels = comfyui.flux_2_levels(steps, 16 * width, 16 * height)
        assert family.student_times(steps).tolist() == pytest.approx(levels, abs=1e-6)


def test_the_workflow_is_one_that_comfyui_takes() -> None:
    """In the form of its interface for programs, which its page opens, too."""
    workflow = json.loads((EXAMPLES / "comfyui" / "few_step_student.json").read_text(encoding="utf-8"))
    for node in workflow.values():
        links, values, _ = comfyui.NODES[node["class_type"]]
        assert node["inputs"].keys() == links.keys() | values
        for name, kind in links.items():
            source, output = node["inputs"][name]
            assert comfyui.NODES[workflow[source]["class_type"]][2][output] == kind
    (sampler,) = (node["inputs"] for node in workflow.values() if node["class_type"] == "KSampler")
    settings = {"sampler_name": "lcm", "scheduler": "simple", "steps": 4, "cfg": 1.0, "denoise": 1.0}
    assert settings.items() <= sampler.items()
    assert workflow[sampler["model"][0]]["inputs"]["lora_name"] == KOHYA_LORA
