"""The second embedded problem: its data, prompts, recognisers and teacher."""

from pathlib import Path
from shutil import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from rdm_rl.randomness import seeded_generator
from rdm_rl.scenes.data import (
    ATTRIBUTES,
    DATA_FILE,
    GROUNDS,
    GUIDANCE_SCALE,
    INKS,
    NETWORKS_FILE,
    OPEN,
    TEACHER_FOLDER,
    compose,
    load_handwriting,
    random_attributes,
    scene_prompts,
    wanted_attributes,
)
from rdm_rl.scenes.recognisers import fulfilled, load_network, recognised_attributes
from rdm_rl.scenes.students import ScenesEvaluation
from tests.helpers import EXAMPLES, example


def scenes(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scenes of held-out handwriting and their attributes."""
    generator = seeded_generator(0, "tests/scenes")
    attributes = random_attributes(count, generator)
    return compose(attributes, load_handwriting("held_out"), generator), attributes


def test_the_split_keeps_the_held_out_handwriting_apart() -> None:
    train, held_out = load_handwriting("train"), load_handwriting("held_out")
    assert torch.bincount(held_out.digits).tolist() == [200] * 10
    assert len(train.digits) == 8000
    known = {ink.numpy().tobytes() for ink in train.ink}
    shared = sum(ink.numpy().tobytes() in known for ink in held_out.ink)
    assert shared <= 2  # Some plain ones look alike at this size.


def test_scenes_are_a_function_of_the_generator() -> None:
    first, again = scenes(8)[0], scenes(8)[0]
    assert torch.equal(first, again)
    assert 0 <= first.min() <= first.max() <= 1


def test_inks_and_grounds_are_where_the_attributes_say() -> None:
    images, attributes = scenes(100)
    inks, grounds = (torch.tensor([*colours.values()]) for colours in (INKS, GROUNDS))
    assert torch.equal(torch.cdist(images[:, :, 0, 0], grounds).argmin(1), attributes[:, 5])
    for place, column in enumerate((1, 3)):
        half = slice(12 * place, 12 * place + 12)
        for image, scene in zip(images, attributes, strict=True):
            pixels = (image[:, half] if scene[4] == 1 else image[:, :, half]).flatten(1).T
            change = pixels - image[:, 0, 0]  # A thin stroke covers its pixels in part; the direction tells its ink.
            strongest = change[change.norm(dim=1).argmax()]
            assert torch.cosine_similarity(strongest, inks - image[:, 0, 0]).argmax() == scene[column]


def test_a_prompt_asks_for_its_scene_or_leaves_the_ground_open() -> None:
    generator = seeded_generator(0, "tests/scenes")
    attributes = random_attributes(400, generator)
    prompts = scene_prompts(attributes, generator)
    wanted = wanted_attributes(prompts)
    assert torch.equal(wanted[:, :5], attributes[:, :5])
    left_open = wanted[:, 5] == OPEN
    assert torch.equal(wanted[~left_open, 5], attributes[~left_open, 5])
    assert torch.equal(left_open, torch.tensor(["ground" not in prompt for prompt in prompts]))
    assert 150 < left_open.sum() < 250
    for words in (" left of ", " right of ", " above ", " below ", " 7", " seven"):
        assert any(words in prompt for prompt in prompts), words


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a red seven left of a blue 2", [7, 0, 2, 3, 0, OPEN]),
        ("a red seven right of a blue 2", [2, 3, 7, 0, 0, OPEN]),
        ("a pink 0 above a green nine on a white ground", [0, 4, 9, 2, 1, 2]),
        ("a pink 0 below a green nine on a black ground", [9, 2, 0, 4, 1, 0]),
        ("", [OPEN] * 6),
    ],
)
def test_what_a_prompt_asks_for(prompt: str, wanted: list[int]) -> None:
    assert wanted_attributes([prompt]).tolist() == [wanted]


@pytest.mark.parametrize(
    "prompt", ["a seven", "a red seven left of a blue 12", "a red 7 left of a blue 2 on a red ground"]
)
def test_other_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="describes no scene"):
        wanted_attributes([prompt])


def test_network_c_reads_held_out_scenes() -> None:
    images, attributes = scenes(500)
    correct = (recognised_attributes(images) == attributes).float().mean(0)
    assert dict(zip(ATTRIBUTES, (correct >= 0.95).tolist(), strict=True)) == dict.fromkeys(ATTRIBUTES, True)
    assert (
        fulfilled(images, scene_prompts(attributes, seeded_generator(1, "tests/scenes"))).all(1).float().mean() >= 0.9
    )


@pytest.mark.parametrize("name", ["A", "B"])
def test_the_other_networks_read_scenes_too(name: str) -> None:
    images, attributes = scenes(500)
    answers = [logits.argmax(1) for logits in load_network(name)(images)]
    assert (torch.stack(answers, 1) == attributes).all(1).float().mean() >= 0.85


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(ValueError, match="network 'D' is unknown"):
        load_network("D")


def test_the_teacher_is_a_small_plain_pipeline() -> None:
    files = [file for file in TEACHER_FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in TEACHER_FOLDER.parent.rglob("*") if file.is_file()) < 9_000_000
    assert {file.suffix for file in files} <= {".json", ".md", ".txt", ".safetensors"}
    weights = load_file(TEACHER_FOLDER / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in weights)
    teacher = ScenesEvaluation.load_teacher()
    assert {teacher.unet.dtype, teacher.vae.dtype, teacher.text_encoder.dtype} == {torch.float32}
    assert teacher.scheduler.config.prediction_type == "v_prediction"
    assert teacher.scheduler.config.clip_sample is False


def test_the_encoder_is_a_linear_map_of_patches_without_randomness() -> None:
    vae, images = ScenesEvaluation.load_teacher().vae, 2 * scenes(3)[0] - 1
    with torch.no_grad():
        latents = vae.encode(torch.cat([images, images[:1] + images[1:2] - images[2:]])).latent_dist
    first, second, third, combined = latents.mean
    torch.testing.assert_close(combined, first + second - third, rtol=0, atol=1e-3)
    assert latents.std.max() < 1e-5


def test_every_word_of_a_prompt_is_one_token() -> None:
    attributes = random_attributes(200, seeded_generator(4, "tests/scenes"))
    prompts = scene_prompts(attributes, seeded_generator(5, "tests/scenes"))
    tokens = ScenesEvaluation.load_teacher().tokenizer(prompts).input_ids
    assert [len(ids) for ids in tokens] == [len(prompt.split()) + 2 for prompt in prompts]


@pytest.mark.usefixtures("onednn")
def test_the_teacher_draws_what_prompts_ask_for() -> None:
    attributes = random_attributes(24, seeded_generator(2, "tests/scenes"))
    prompts = scene_prompts(attributes, seeded_generator(3, "tests/scenes"))
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 10, "guidance_scale": GUIDANCE_SCALE, "output_type": "pt"}
    images = ScenesEvaluation.load_teacher()(prompts, generator=generator, **call).images
    assert fulfilled(images, prompts).all(1).float().mean() >= 0.7


@pytest.mark.usefixtures("onednn")
def test_the_script_that_made_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)  # It takes some stages from the first teacher's script.
    monkeypatch.setenv("TQDM_DISABLE", "1")
    copy(DATA_FILE, tmp_path)
    example("train_scenes_teacher").main(["--output_dir", str(tmp_path), "--quick"])
    assert load_file(tmp_path / "networks.safetensors").keys() == load_file(NETWORKS_FILE).keys()
    call = {"num_inference_steps": 1, "guidance_scale": GUIDANCE_SCALE, "output_type": "pt"}
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "teacher")
    assert pipeline("a red 7 left of a blue 2", **call).images.shape == (1, 3, 24, 24)
