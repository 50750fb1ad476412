"""What is wrong with a model is said in one line, before gigabytes are loaded where that is possible."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, UNet2DModel
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from rdm_rl.cli.main import main
from rdm_rl.families import load_family, register_family
from rdm_rl.families.hub import adapter_file
from rdm_rl.rewards.images import load_tiny_decoder
from tests.helpers import QUICK, quick_trainer, same, tiny_sd
from tests.tiny_pipelines import tiny_dit, tiny_flux, tiny_sd3, tiny_sdxl, tiny_unconditional


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fail)


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 400
    return text


@pytest.mark.usefixtures("no_loading")
def test_a_missing_component_is_said_before_loading(tmp_path: Path) -> None:
    tiny_sdxl(tmp_path / "source").save_pretrained(tmp_path / "model")
    for missing in ("unet", "vae", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        (tmp_path / "model" / missing).rename(tmp_path / missing)
        message = f"has no '{missing}' folder, but a StableDiffusionXLPipeline"
        with pytest.raises(FileNotFoundError, match=message) as found:
            load_family(tmp_path / "model")
        one_line(found.value)
        (tmp_path / missing).rename(tmp_path / "model" / missing)


def test_a_missing_component_of_a_loaded_pipeline(tmp_path: Path) -> None:
    pipe = tiny_sd(tmp_path)
    pipe.vae = None
    with pytest.raises(ValueError, match="has no vae, which distillation needs"):
        load_family(pipe)


def test_an_encoder_without_its_tokenizer(tmp_path: Path) -> None:
    """diffusers would give every prompt the same rows of T5."""
    pipe = tiny_sd3(tmp_path / "source")
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_3").rename(tmp_path / "elsewhere")
    file = tmp_path / "model" / "model_index.json"
    index = json.loads(file.read_text())
    for listed in (index["tokenizer_3"], [None, None]):
        file.write_text(json.dumps(index | {"tokenizer_3": listed}))
        with pytest.raises(FileNotFoundError, match="has no 'tokenizer_3' folder"):
            load_family(tmp_path / "model")
    pipe.tokenizer_3 = None
    with pytest.raises(ValueError, match="has no tokenizer_3, which distillation needs"):
        load_family(pipe)


def test_what_is_not_needed_is_not_loaded(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "model")
    file = tmp_path / "model" / "model_index.json"
    listed = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | listed | {"requires_safety_checker": True}))
    assert load_family(tmp_path / "model").pipeline.safety_checker is None


def rename_weights(folder: Path, old: str, new: str) -> None:
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(old, new)))


def test_a_folder_of_one_variant_alone_is_loaded(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "model")
    rename_weights(tmp_path / "model", ".safetensors", ".fp16.safetensors")
    expected, loaded = (load_family(folder).network.state_dict() for folder in (base, tmp_path / "model"))
    assert same(loaded, expected)
    (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    rename_weights(tmp_path / "model" / "vae", "fp16", "ema")
    with pytest.raises(FileNotFoundError, match="different variants alone: ema, fp16"):
        load_family(tmp_path / "model")


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (".bin", r"no weights for 'unet' .* only diffusion_pytorch_model\.bin; pickles, .* use_safetensors=False"),
        (".gguf", r"no weights for 'unet' .* only a configuration at most; download the whole model"),
    ],
)
def test_a_folder_without_weights_to_load(suffix: str, message: str, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "model")
    rename_weights(tmp_path / "model" / "unet", ".safetensors", suffix)
    with pytest.raises(FileNotFoundError, match=message):
        load_family(tmp_path / "model")


def test_an_unsupported_prediction_type(tmp_path: Path) -> None:
    pipe = tiny_sd3(tmp_path)
    pipe.scheduler = EulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"EulerDiscreteScheduler with prediction_type='epsilon', but .* of a flow"):
        load_family(pipe)
    other = tiny_sdxl(tmp_path / "x")
    other.scheduler = DDIMScheduler(prediction_type="edm")
    with pytest.raises(ValueError, match="prediction_type='edm', which has no conversion"):
        load_family(other)


def hub_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)  # Its constructor wants the answer of a server, in a type that differs by version.
    error.args = ("a page of text\nabout tokens",)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(GatedRepoError), "'owner/name' cannot be loaded: its owner asks you to accept a licence"),
        (hub_error(RepositoryNotFoundError), "'owner/name' cannot be loaded: the hub has nothing public of this name"),
        (OSError("no space.\nSee the page."), "cannot be loaded: there is no such folder, and of the hub's: no space"),
        (hub_error(LocalEntryNotFoundError), "no whole copy in the hub's cache, and the hub cannot be reached"),
        (ConnectionError("no route"), "no whole copy in the hub's cache, and the hub cannot be reached"),
    ],
    ids=["gated", "missing", "other", "uncached", "unreachable"],
)
def test_the_hub_s_refusals(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("rdm_rl.families.loading.snapshot_download", refuse)
    with pytest.raises(OSError, match=message) as found:
        load_family("owner/name")
    one_line(found.value)
    words = ["--model_name_or_path", "owner/name", "--dataset", "digits", "--output_dir", str(tmp_path), "--use_cpu"]
    assert main(["train", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_real_hub_name_offline_is_one_line() -> None:
    """Through diffusers itself: the tests run without a hub."""
    with pytest.raises(
        OSError, match=r"model='owner/no-such-model' cannot be loaded: .*HF_HUB_OFFLINE is set"
    ) as found:
        load_family("owner/no-such-model")
    one_line(found.value)
    with pytest.raises(OSError, match="policy_init='owner/no-such-model' cannot be loaded: ") as found:
        from rdm_rl.families.loading import load_policy_init

        load_policy_init("owner/no-such-model", None)  # type: ignore[arg-type]
    one_line(found.value)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # That diffusers passes on.
def test_a_decoder_that_the_hub_cannot_give() -> None:
    with pytest.raises(OSError, match="reward_decoder='owner/no-such-model' cannot be loaded: ") as found:
        load_tiny_decoder("owner/no-such-model", 4, torch.device("cpu"))
    one_line(found.value)


@pytest.mark.parametrize("source", ["owner/lora", "owner/lora/file.safetensors"])
def test_an_adapter_that_the_hub_cannot_give(source: str, tmp_path: Path) -> None:
    family = load_family(tiny_sd(tmp_path))
    with pytest.raises(OSError, match=f"teacher_adapter='{source}' cannot be loaded: there is no such folder") as found:
        family.load_adapter(source, "style", "teacher_adapter")
    one_line(found.value)


def test_the_class_of_a_hub_model_is_known_before_it_is_fetched(
    monkeypatch: pytest.MonkeyPatch, no_loading: None, tmp_path: Path
) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    monkeypatch.setattr("rdm_rl.families.loading.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ValueError, match=r"WanPipeline, which no family supports.*FluxPipeline.*add_a_family"):
        load_family("owner/name")


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl, tiny_flux, tiny_sd3], ids=["sd", "sdxl", "flux", "sd3"])
def test_half_precision_leaves_the_decoder_alone(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "source").save_pretrained(tmp_path / "model")
    family = load_family(tmp_path / "model", dtype=torch.bfloat16)
    assert next(family.network.parameters()).dtype == torch.bfloat16
    assert all(next(one.parameters()).dtype == torch.bfloat16 for one in family.text_encoders)
    assert next(family.decoder.parameters()).dtype == torch.float32
    x_t = torch.randn(1, *family.latent_shape[:1], 8, 8, generator=torch.Generator().manual_seed(0))
    x_0 = family.predict_x_0(family.network, x_t, torch.ones(1), family.encode(["a cat"]), 2.0)
    assert x_0.dtype == torch.float32
    assert family.decode(x_0).isfinite().all()


def test_resolutions(tmp_path: Path) -> None:
    pipe = tiny_sd(tmp_path)
    assert load_family(pipe, resolution=32).latent_shape == (4, 16, 16)
    assert load_family(pipe, resolution=32).student_call(4)["height"] == 32
    assert "height" not in load_family(pipe).student_call(4)
    with pytest.raises(ValueError, match=r"resolution=33, .* multiples of 8. Set it to 32"):
        load_family(pipe, resolution=33)
    with pytest.raises(ValueError, match=r"resolution=18, .* multiples of 4. Set it to 16"):
        load_family(tiny_flux(tmp_path / "flux"), resolution=18)
    with pytest.raises(ValueError, match=r"resolution=10, .* multiples of 4. Set it to 8"):
        load_family(tiny_sd3(tmp_path / "sd3"), resolution=10)
    with pytest.raises(ValueError, match="resolution=64, but this model's table of positions ends at"):
        load_family(tiny_sd3(tmp_path / "sd3"), resolution=64)
    for made in (tiny_dit(tmp_path / "dit"), tiny_unconditional(tmp_path / "ddpm")):
        with pytest.raises(ValueError, match="images of one size only"):
            load_family(made, resolution=32)


@pytest.mark.parametrize(
    ("make", "size", "pixels"), [(tiny_sd, [4, 8], (8, 16)), (tiny_sdxl, [8, 4], (16, 8)), (tiny_sdxl, 8, None)]
)
def test_the_call_has_a_size_that_the_pipeline_would_not_take(
    make: Any, size: Any, pixels: tuple[int, int] | None, tmp_path: Path
) -> None:
    pipe = make(tmp_path)
    pipe.unet.register_to_config(sample_size=size)
    family = load_family(type(pipe)(**pipe.components))
    call = family.student_call(1)
    assert (call.get("height"), call.get("width")) == (pixels or (None, None))
    family.pipeline.set_progress_bar_config(disable=True)
    image = family.pipeline("a cat", **call, output_type="np").images[0]
    assert image.shape[:2] == tuple(side * 2 for side in family.latent_shape[1:])
    saved = load_family(family.pipeline, resolution=16)
    assert (saved.student_call(1)["height"], saved.student_call(1)["width"]) == (16, 16)


@pytest.mark.parametrize(("resolution", "said"), [(None, False), (16, False), (32, True)])
def test_a_resolution_that_is_not_the_model_s_own_is_said(
    resolution: int | None, said: bool, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick_trainer(base, tmp_path, "rdm", resolution=resolution, max_steps=0, **QUICK).train()
    line = "resolution=32 is not the model's own, which is 16 x 16 pixels."
    assert capsys.readouterr().out.splitlines().count(line) == said


def test_a_run_at_another_resolution(base: Path, tmp_path: Path) -> None:
    trainer = quick_trainer(base, tmp_path, "rdm", resolution=32, max_steps=1, **QUICK)
    trainer.train()
    trainer.save_model()
    assert trainer.generate(["a cat"], generator=torch.Generator().manual_seed(0)).shape == (1, 3, 32, 32)
    assert json.loads((tmp_path / "student.json").read_text())["width"] == 32


def test_guidance_where_there_is_none(tmp_path: Path) -> None:
    schnell = tiny_flux(tmp_path / "flux", guidance_embeds=False)
    for setting in ("guidance_scale", "teacher_guidance_scale"):
        with pytest.raises(ValueError, match=f"{setting}=2.0 is set, but a FluxPipeline of this kind has no guidance"):
            quick_trainer(schnell, tmp_path, "rdm", resolution=16, **{**QUICK, setting: 2.0})
    dev = tiny_flux(tmp_path / "dev")  # It is told its guidance, so that a policy may have some, also with "rdm".
    quick_trainer(dev, tmp_path, "rdm", resolution=16, **{**QUICK, "guidance_scale": 3.5})


def test_a_learned_variance_that_no_student_s_scheduler_takes() -> None:
    pipe = tiny_unconditional()
    pipe.unet = UNet2DModel(**{**pipe.unet.config, "out_channels": 6})
    with pytest.raises(ValueError, match="makes 6 channels of 3: it also predicts a variance"):
        load_family(pipe)


def test_classes_that_a_dit_does_not_have(tmp_path: Path) -> None:
    family = load_family(tiny_dit(tmp_path))
    with pytest.raises(ValueError, match="'a cat' names no class of this model: write its number, 0 to 999"):
        family.encode(["a cat"])


def test_what_is_registered_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rdm_rl.families import FAMILIES, StableDiffusionFamily

    monkeypatch.setitem(FAMILIES, "StableDiffusionPipeline", StableDiffusionFamily)

    class Mine(StableDiffusionFamily):
        """A family of one's own."""

    register_family("StableDiffusionPipeline", Mine)
    assert type(load_family(tiny_sd(tmp_path))) is Mine
    with pytest.raises(TypeError, match="does not derive from"):
        register_family("Other", dict)  # type: ignore[arg-type]


def test_a_folder_called_teacher_is_not_the_embedded_one(base: Path, tmp_path: Path) -> None:
    from rdm_rl.digits.data import TEACHER_FOLDER
    from rdm_rl.student import base_of

    (tmp_path / TEACHER_FOLDER.name).symlink_to(base)
    quick_trainer(tmp_path / TEACHER_FOLDER.name, tmp_path / "run", "rdm", **QUICK).save_model(tmp_path / "student")
    assert base_of(tmp_path / "student") == TEACHER_FOLDER.name != "digits"
    quick_trainer(TEACHER_FOLDER, tmp_path / "run", "rdm", **QUICK).save_model(tmp_path / "of-the-digits")
    assert base_of(tmp_path / "of-the-digits") == "digits"


def test_where_an_adapter_is(tmp_path: Path) -> None:
    assert adapter_file("owner/name") == ("owner/name", None)
    assert adapter_file("owner/name/sub/a.safetensors") == ("owner/name", "sub/a.safetensors")
    (tmp_path / "one.safetensors").touch()
    assert adapter_file(str(tmp_path)) == (str(tmp_path), "one.safetensors")
    assert adapter_file(str(tmp_path / "one.safetensors")) == (str(tmp_path), "one.safetensors")
    (tmp_path / "two.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"2 other .safetensors files"):
        adapter_file(str(tmp_path))


def test_a_pipeline_class_of_one_s_own_is_loaded_by_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rdm_rl.families import FAMILIES, StableDiffusionFamily

    monkeypatch.setitem(FAMILIES, "CleanPipeline", StableDiffusionFamily)
    tiny_sd(tmp_path / "source").save_pretrained(tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "CleanPipeline", 1))
    with pytest.raises(
        ValueError, match="is a CleanPipeline, which is no class of diffusers: load the pipeline yourself"
    ):
        load_family(tmp_path / "model")


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning")
def test_a_sample_finds_the_base_or_asks_for_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = quick_trainer(base, tmp_path / "run", "rdm", **QUICK)
    trainer.save_model(tmp_path / "student")
    words = ["sample", "--student", str(tmp_path / "student"), "--prompt", "a cat", "--num_images", "1"]
    words += ["--output_dir", str(tmp_path / "images")]
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert f"is an adapter of a model called {base.name!r}: give its --model" in capsys.readouterr().err
    (tmp_path / base.name).symlink_to(base)
    assert main(words) == 0
    tiny_sdxl(tmp_path / "source").save_pretrained(tmp_path / "sdxl")
    tiny_sd3(tmp_path / "source").save_pretrained(tmp_path / "sd3")
    logged: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("diffusers.loaders.peft"), "handle", logged.append)
    for other, message in (
        ("sdxl", "does not fit this model: size mismatch"),
        ("sd3", "belong to no layer of the SD3Transformer2DModel"),
    ):
        assert main([*words, "--model", str(tmp_path / other)]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not [record for record in logged if "size mismatch" in record.getMessage()]
