"""Whole models in one ``.safetensors`` file: read as diffusers reads them; what is wrong is said from the header."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from rdm_rl import RDMTrainer
from rdm_rl.cli.main import main
from rdm_rl.families import check_model_name, load_family
from rdm_rl.families.single_file import default_config, read_model_header
from rdm_rl.student import base_of, load_student, model_config_of
from tests.helpers import QUICK, quick_trainer, randomize, same, tiny_sd
from tests.original_layout import clip_tensors, original_tensors, save_single_file, unet_tensors, vae_tensors
from tests.tiny_pipelines import fill_random, tiny_flux, tiny_sd3, tiny_sdxl


class Model(NamedTuple):
    """A pipeline, and its folder and its file."""

    pipeline: Any
    folder: Path
    file: Path


@pytest.fixture
def models(tmp_path: Path) -> Callable[..., Model]:
    def make(kind: Callable[[Path], DiffusionPipeline], tensors: Callable[[Any], Any] = original_tensors) -> Model:
        pipeline: Any = kind(tmp_path / "source")
        fill_random(pipeline.vae)
        pipeline.save_pretrained(tmp_path / "folder")
        return Model(pipeline, tmp_path / "folder", save_single_file(tensors(pipeline), tmp_path / "mine.safetensors"))

    return make


def transformer_tensors(pipeline: Any) -> dict[str, torch.Tensor]:
    return dict(pipeline.transformer.state_dict())


def images(pipeline: Any, steps: int = 2) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    size = {"height": 16, "width": 16}
    drawn: torch.Tensor = pipeline(
        "a cat", num_inference_steps=steps, generator=generator, output_type="pt", **size
    ).images
    return drawn


@pytest.mark.parametrize(
    ("kind", "tensors"),
    [
        (partial(tiny_sd, whole=True), original_tensors),
        (tiny_sdxl, original_tensors),
        (partial(tiny_sd, whole=True), lambda pipe: unet_tensors(pipe.unet) | vae_tensors(pipe.vae)),
        (tiny_sdxl, lambda pipe: dict(pipe.unet.state_dict())),
        (tiny_sd3, transformer_tensors),
        (tiny_flux, transformer_tensors),
    ],
    ids=["sd", "sdxl", "sd without encoder", "sdxl network", "sd3 network", "flux network"],
)
def test_a_file_is_the_folder_that_it_was_made_of(kind: Any, tensors: Any, models: Any) -> None:
    model = models(kind, tensors)
    if tensors is original_tensors:  # Nothing but configurations is needed.
        for weights in model.folder.rglob("*.safetensors"):
            weights.unlink()
    family = load_family(model.file, model_config=model.folder)
    for name in (family.network_name, "vae", *family.text_encoder_names):
        assert same(*(getattr(pipe, name).state_dict() for pipe in (family.pipeline, model.pipeline))), name
    torch.testing.assert_close(images(family.pipeline), images(model.pipeline))
    assert all(not value.requires_grad for value in family.network.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_in_half_precision_is_loaded_in_the_one_asked_for(dtype: torch.dtype, models: Any) -> None:
    model = models(tiny_sdxl)
    save_single_file(original_tensors(model.pipeline), model.file, torch.float16)
    family = load_family(model.file, model_config=model.folder, dtype=dtype)
    for part in (family.network, *family.text_encoders):
        assert {value.dtype for value in part.parameters()} == {dtype}
    assert {value.dtype for value in family.decoder.parameters()} == {torch.float32}
    for name, value in family.decoder.state_dict().items():  # As in the file, not rounded again on the way.
        assert torch.equal(value, model.pipeline.vae.state_dict()[name].half().float()), name


def refused(file: Path, config: Path | None = None) -> str:
    """Why a model is refused before anything is loaded, in one line."""
    with pytest.raises((ValueError, OSError)) as caught:
        check_model_name(str(file), None if config is None else str(config))
    text = str(caught.value)
    assert "\n" not in text
    return text


def lora_tensors(pipe: Any) -> dict[str, torch.Tensor]:
    return {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.ones(4, 16)}


def peft_tensors(pipe: Any) -> dict[str, torch.Tensor]:
    return {"down_blocks.0.attentions.0.proj_in.lora_A.weight": torch.ones(4, 16)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (peft_tensors, r"is an adapter \(a LoRA\)"),
        (lora_tensors, r"is an adapter \(a LoRA\), and no whole model.*as policy_init .* or as teacher_adapter"),
        (lambda pipe: vae_tensors(pipe.vae), r"holds no denoising network of .* only 'first_stage_model\."),
        (lambda pipe: unet_tensors(pipe.unet) | {"a.scale_weight": torch.ones(1)}, "is quantised: 'a.scale_weight'"),
        (
            lambda pipe: original_tensors(pipe) | {"v_pred": torch.ones(1), "ztsnr": torch.ones(1)},
            r"trained with prediction_type='v_prediction', but .* scheduler has 'epsilon'.*\"rescale_betas_zero_snr\"",
        ),
        (
            lambda pipe: {"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(1)},
            "holds no network of a StableDiffusionPipeline, which model_config says it is",
        ),
    ],
    ids=["adapter of PEFT", "adapter of kohya", "autoencoder", "quantised", "v", "other"],
)
def test_what_a_header_says_is_wrong(tensors: Any, message: str, models: Any) -> None:
    model = models(tiny_sd, tensors)
    assert re.search(message, refused(model.file, model.folder))


def test_parts_that_neither_file_nor_configuration_has(models: Any) -> None:
    model = models(tiny_sd3, transformer_tensors)
    for name in ("text_encoder", "text_encoder_3"):
        for weights in (model.folder / name).glob("*.safetensors"):
            weights.unlink()
    text = refused(model.file, model.folder)
    assert "holds no text_encoder, text_encoder_3, and model_config=" in text
    assert "To do without text_encoder_3, let its model_index.json say [null, null]" in text
    shutil.rmtree(model.folder / "tokenizer_2")
    assert "model_config=" in refused(model.file, model.folder)
    assert "has no 'tokenizer_2' folder" in refused(model.file, model.folder)


def test_files_that_cannot_be_read(models: Any, tmp_path: Path) -> None:
    model = models(tiny_sd)
    whole = model.file.read_bytes()
    for content in (whole[: len(whole) // 2], b"<html>Not found</html>"):
        model.file.write_bytes(content)
        assert "is damaged, or only a part of a download" in refused(model.file, model.folder)
    assert "does not exist. Check the path" in refused(tmp_path / "none.safetensors")
    (tmp_path / "old.ckpt").touch()
    assert "is no .safetensors file. Pickles" in refused(tmp_path / "old.ckpt")


def test_a_file_that_does_not_fit_its_configuration(models: Any, tmp_path: Path) -> None:
    model = models(tiny_sd)
    for missing in (
        "model.diffusion_model.out.2.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ):
        short = original_tensors(model.pipeline)
        del short[missing]
        save_single_file(short, tmp_path / "short.safetensors")
        with pytest.raises(ValueError, match=r"has no tensor for .* Set model_config to the pipeline that it was made"):
            load_family(tmp_path / "short.safetensors", model_config=model.folder)
    file = model.folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cross_attention_dim": 16}))
    with pytest.raises(ValueError, match=r"does not fit the configuration in .* expected shape .*16") as caught:
        load_family(model.file, model_config=model.folder)
    assert "\n" not in str(caught.value)


def test_without_a_configuration_it_is_diffusers_usual_one(models: Any, tmp_path: Path) -> None:
    model = models(tiny_sd)
    with pytest.raises(
        OSError, match=r"is one file, whose configuration .*='stable-diffusion-v1-5/stable-diffusion-v1-5'"
    ):
        load_family(model.file)
    sdxl = {name: torch.ones(1) for name in ("input_blocks.0.0.bias", "label_emb.0.0.weight")}
    save_file({f"model.diffusion_model.{name}": value for name, value in sdxl.items()}, tmp_path / "x.safetensors")
    assert default_config(read_model_header(str(tmp_path / "x.safetensors"))).endswith("stable-diffusion-xl-base-1.0")
    save_file({"transformer_blocks.0.attn.to_q.weight": torch.ones(1)}, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match=r"does not say of which model it is. Set model_config to"):
        load_family(tmp_path / "y.safetensors")


def trainer_of(model: Model, output_dir: Path, given: Any = None, **settings: Any) -> RDMTrainer:
    config = {"model_config": str(model.folder)}
    return quick_trainer(model.file, output_dir, "rdm", given=given, **{**QUICK, **config, **settings})


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning")
@pytest.mark.parametrize("tensors", [original_tensors, lambda pipe: unet_tensors(pipe.unet)], ids=["whole", "network"])
def test_a_student_of_a_file_is_drawn_exported_and_planned(
    tensors: Any, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models(tiny_sd, tensors)
    trainer = trainer_of(model, tmp_path / "run")
    randomize(trainer.networks)
    student = tmp_path / "student"
    trainer.save_model(student)
    assert (base_of(student), model_config_of(student)) == ("mine.safetensors", "folder")
    expected = trainer.generate(["a cat"], generator=torch.Generator().manual_seed(3))
    saved = load_student(student, model.file, model_config=model.folder)
    drawn = saved.draw(["a cat"], generator=torch.Generator().manual_seed(3), output_type="pt")
    torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-4)

    card = (student / "README.md").read_text()
    assert str(tmp_path) not in card
    code = card.split("```python\n")[1].split("```")[0]
    for place, path in (
        ("path/to/the/base/mine.safetensors", model.file),
        ("path/to/its/configuration/folder", model.folder),
    ):
        assert place in code
        code = code.replace(place, str(path))
    names: dict[str, Any] = {}
    exec(code.replace("path/to/the/student/student", str(student)), names)
    torch.testing.assert_close(images(names["pipe"], 1), images(saved.pipeline, 1))

    monkeypatch.chdir(tmp_path)  # The card names a file and a folder: both are found beside it.
    words = ["sample", "--student", str(student), "--prompt", "a cat", "--num_images", "1", "--output_dir", "drawn"]
    assert main(words) == 0
    assert main(["export", str(student), "--format", "kohya"]) == 0
    assert (tmp_path / "student-kohya.safetensors").is_file()
    model.file.unlink()
    assert main(words) == 2
    assert "is an adapter of a model called 'mine.safetensors': give its --model" in capsys.readouterr().err


def test_a_file_is_planned_from_its_header_and_for_the_largest_size(
    models: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models(tiny_sd)
    words = ["plan", "--model", str(model.file), "--model_config", str(model.folder), "--lora_r", "2"]
    assert main([*words, "--resolution", "16", "8x24", "16x8"]) == 0
    assert "(StableDiffusionPipeline), images of 16x16 (the largest of 3)" in capsys.readouterr().out


def test_a_style_by_file_on_a_teacher_from_a_file(models: Any, tmp_path: Path) -> None:
    model = models(tiny_sd)
    style = quick_trainer(model.folder, tmp_path / "style", "rdm", **QUICK)
    randomize(style.networks)
    style.save_model()
    file = tmp_path / "style" / "pytorch_lora_weights.safetensors"
    from_file = trainer_of(model, tmp_path / "run", {"teacher_adapter": file})
    from_folder = quick_trainer(model.folder, tmp_path / "run", "rdm", given={"teacher_adapter": file}, **QUICK)
    x_t, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(1)
    predictions = [
        trainer.networks.predict(role, x_t, t, trainer.family.encode(["a cat"]))
        for trainer in (from_file, from_folder)
        for role in ("teacher", "policy")
    ]
    torch.testing.assert_close(predictions[:2], predictions[2:])
    assert not torch.allclose(*predictions[:2], atol=1e-3)
    with pytest.raises(ValueError, match=r"teacher_adapter=.* is a whole model. Pass it as teacher"):
        trainer_of(model, tmp_path / "run", {"teacher_adapter": model.file})
    with pytest.raises(ValueError, match=r"is an adapter .* and no whole model"):
        quick_trainer(file, tmp_path / "run", "rdm", **QUICK)


def test_teacher_and_start_of_the_policy_from_files(models: Any, tmp_path: Path) -> None:
    model = models(tiny_sd)
    other = tiny_sd(tmp_path / "source", seed=5)
    tensors = unet_tensors(other.unet) | clip_tensors(other.text_encoder, "cond_stage_model.transformer.")
    start = save_single_file(tensors, tmp_path / "start.safetensors")
    trainer = quick_trainer(model.folder, tmp_path / "run", "rdm", given={"policy_init": start}, **QUICK)
    assert same(_plain(trainer.networks.module("policy")), other.unet.state_dict())
    assert same(_plain(trainer.networks.module("teacher")), model.pipeline.unet.state_dict())
    taught = quick_trainer(
        model.folder, tmp_path / "run", "rdm", given={"teacher": model.file}, model_config=str(model.folder), **QUICK
    )
    assert same(_plain(taught.networks.module("teacher")), model.pipeline.unet.state_dict())
    wrong = save_single_file(unet_tensors(tiny_sdxl(tmp_path / "source").unet), tmp_path / "wrong.safetensors")
    with pytest.raises(
        ValueError, match=r"policy_init=.* does not fit the base's UNet2DConditionModel: .*Pass a student"
    ):
        quick_trainer(model.folder, tmp_path / "run", "rdm", given={"policy_init": wrong}, **QUICK)
    of_v = save_single_file(tensors | {"v_pred": torch.ones(1)}, tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match="says that it predicts v, but the base's scheduler has 'epsilon'"):
        quick_trainer(model.folder, tmp_path / "run", "rdm", given={"policy_init": of_v}, **QUICK)
    with pytest.raises(ValueError, match=r"model_config=.* but neither model nor teacher is one. Leave it out"):
        quick_trainer(model.folder, tmp_path / "run", "rdm", model_config="owner/name", **QUICK)


def _plain(network: Any) -> dict[str, torch.Tensor]:
    """A network's own weights, without adapters."""
    state = {name.replace(".base_layer", ""): value for name, value in network.state_dict().items()}
    return {name: value for name, value in state.items() if "lora_" not in name}
