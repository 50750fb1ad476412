"""Starting from a student that is already distilled, and learning from a teacher with a style of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from rdm_rl import RDMTrainer
from rdm_rl.families.hub import adapter_file
from rdm_rl.files import fingerprint
from rdm_rl.student import SavedStudent, load_student
from tests.helpers import PROMPTS, QUICK, brightness, changed, latents, quick_trainer, randomize, snapshot, tiny_sd
from tests.tiny_pipelines import align_weights, tiny_dit, tiny_sd3, tiny_sdxl

SETTINGS = {**QUICK, "num_inference_steps": 2, "max_steps": 1}
T = torch.tensor([1.0, 0.5])
TEXTS = ["the digit 3", "the digit 4"]


def published_lora(folder: Path, rank: int = 6, alpha: int = 3, style: str = "peft", seed: int = 5) -> Path:
    """A LoRA of Stable Diffusion as the hub has them: of its own rank, scale, layers and format."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = tiny_sd(folder / "source")
        targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "time_emb_proj"]
        targets = targets[:4] if style == "attention" else targets
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
        pipe.unet.add_adapter(config)
    state = get_peft_model_state_dict(pipe.unet)
    if style == "kohya":  # The names and alphas of the LCM-LoRA and Hyper files.
        named = {}
        for name, value in state.items():
            module, part, _ = name.rsplit(".", 2)
            key = "lora_unet_" + module.replace(".", "_")
            named[f"{key}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = value.contiguous()
            named[f"{key}.alpha"] = torch.tensor(float(alpha))
        save_file(named, folder / "published.safetensors")
        return folder / "published.safetensors"
    metadata = pipe.unet.peft_config["default"].to_dict() if style == "peft" else None
    layers = convert_state_dict_to_diffusers(state) if style == "attention" else state
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    return folder


def stock_prediction(base: Path, lora: Path | None) -> Tensor:
    """What diffusers' own pipeline, with the adapter loaded by diffusers, predicts."""
    pipe = StableDiffusionPipeline.from_pretrained(base)
    if lora is not None:
        path, name = adapter_file(str(lora))
        pipe.load_lora_weights(path, weight_name=name)
    align_weights(pipe)
    states = pipe.encode_prompt(TEXTS, "cpu", 1, False)[0]
    with torch.no_grad():
        output: Tensor = pipe.unet(latents(2, 4, 8, 8), torch.tensor([999, 499]), encoder_hidden_states=states).sample
    return output


@pytest.fixture(scope="module")
def plain(base: Path) -> Tensor:
    """What the base predicts."""
    return stock_prediction(base, None)


def prediction(trainer: RDMTrainer, role: str) -> Tensor:
    """The raw output behind a role's x_0."""
    family, networks = trainer.networks.family_of(role), trainer.networks
    align_weights(family.pipeline, networks.module(role))
    with networks.role(role), torch.no_grad():
        return family.forward(networks.module(role), latents(2, 4, 8, 8), T, family.encode(TEXTS))


@pytest.mark.parametrize(
    ("style", "lora"), [("peft", True), ("attention", True), ("kohya", True), ("kohya", False)], ids=str
)
def test_the_policy_starts_as_the_published_student(
    style: str, lora: bool, base: Path, plain: Tensor, tmp_path: Path
) -> None:
    source = published_lora(tmp_path / "published", style=style, alpha=6 if style == "attention" else 3)
    given = {"policy_init": source, **({} if lora else {"peft_config": None})}
    trainer = quick_trainer(base, tmp_path / "run", "rdm", given=given, **SETTINGS)
    expected = stock_prediction(base, source)
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(prediction(trainer, "policy"), expected, rtol=0, atol=0 if lora else 1e-5)
    for role in ("teacher", "fake_score"):  # Both begin as the base.
        torch.testing.assert_close(prediction(trainer, role), plain, rtol=0, atol=0)
    trainer.train()
    assert not torch.equal(prediction(trainer, "policy"), expected)
    torch.testing.assert_close(prediction(trainer, "teacher"), plain, rtol=0, atol=0)

    trainer.save_model(tmp_path / "student")
    student = load_student(tmp_path / "student", base)
    assert torch.equal(*images_of_both(trainer, student))
    if lora:
        assert {one.shape[0] for name, one in student.pipeline.unet.state_dict().items() if "lora_A" in name} == {6}


@pytest.mark.parametrize("lora", [True, False])
def test_it_may_start_as_a_part_of_it(lora: bool, base: Path, tmp_path: Path) -> None:
    source = published_lora(tmp_path / "published")
    given = {"policy_init": source, **({} if lora else {"peft_config": None})}
    trainer = quick_trainer(base, tmp_path / "run", "rdm", given=given, policy_init_scale=0.5, **SETTINGS)
    pipe: Any = StableDiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(source, adapter_name="turbo")
    pipe.set_adapters(["turbo"], adapter_weights=[0.5])
    states = pipe.encode_prompt(TEXTS, "cpu", 1, False)[0]
    with torch.no_grad():
        expected = pipe.unet(latents(2, 4, 8, 8), torch.tensor([999, 499]), encoder_hidden_states=states).sample
    torch.testing.assert_close(prediction(trainer, "policy"), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("start", "reason"), [("none", "is not set"), ("network", "is a whole network")])
def test_only_a_lora_is_scaled(start: str, reason: str, base: Path, tmp_path: Path) -> None:
    given = {"policy_init": base} if start == "network" else {}
    with pytest.raises(ValueError, match=rf"policy_init_scale=0\.5 scales .* {reason}"):
        quick_trainer(base, tmp_path, "rdm", given=given, policy_init_scale=0.5, **SETTINGS)


def images_of_both(trainer: RDMTrainer, student: SavedStudent) -> tuple[Tensor, Tensor]:
    """What the trainer draws, and what plain diffusers does with what was saved."""
    align_weights(trainer.family.pipeline, trainer.networks.module("policy"), student.pipeline)
    ours = trainer.generate(TEXTS, generator=torch.Generator().manual_seed(1))
    theirs = student.draw(TEXTS, generator=torch.Generator().manual_seed(1), output_type="pt")
    return ours, theirs


def other_unet(tmp_path: Path, seed: int = 3) -> UNet2DConditionModel:
    return tiny_sd(tmp_path / f"unet{seed}", seed=seed).unet


@pytest.mark.parametrize("kind", ["pipeline", "network"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_whole_model_is_a_start(kind: str, lora: bool, base: Path, plain: Tensor, tmp_path: Path) -> None:
    pipe = tiny_sd(tmp_path / "source")
    pipe.unet = other_unet(tmp_path)
    (pipe if kind == "pipeline" else pipe.unet).save_pretrained(tmp_path / "distilled")
    if kind == "pipeline":  # As the best-known latent consistency model is published, with parts of its own.
        index = tmp_path / "distilled" / "model_index.json"
        index.write_text(index.read_text().replace("StableDiffusionPipeline", "LatentConsistencyModelPipeline", 1))
        tiny_sd(tmp_path / "another", seed=9).text_encoder.save_pretrained(tmp_path / "distilled" / "text_encoder")
    given = {"policy_init": tmp_path / "distilled", **({} if lora else {"peft_config": None})}
    trainer = quick_trainer(base, tmp_path / "run", "rdm", given=given, **SETTINGS)
    start = prediction(trainer, "policy")
    with torch.no_grad():
        states = trainer.family.encode(TEXTS).tensors["encoder_hidden_states"]
        expected = pipe.unet(latents(2, 4, 8, 8), torch.tensor([999, 499]), encoder_hidden_states=states).sample
    torch.testing.assert_close(start, expected, rtol=0, atol=0)
    assert not torch.allclose(start, plain, atol=1e-2)
    for role in ("teacher", "fake_score"):  # The fake score starts as the teacher, not as the few-step model.
        torch.testing.assert_close(prediction(trainer, role), plain, rtol=0, atol=0)
    own, teacher = trainer.networks.family.pipeline, trainer.networks.teacher_family.pipeline
    assert own.vae is teacher.vae
    assert own.text_encoder is teacher.text_encoder  # Loaded once.
    if not lora:  # A copy beside it would lie idle.
        assert trainer.networks.module("policy") is own.unet
    trainer.train()
    torch.testing.assert_close(prediction(trainer, "teacher"), plain, rtol=0, atol=0)
    assert not torch.equal(prediction(trainer, "policy"), start)

    trainer.save_model(tmp_path / "student")
    # The base's encoders around another network: no pipeline of a name has both, so the whole is saved.
    student = load_student(tmp_path / "student", "nothing")
    card = (tmp_path / "student" / "README.md").read_text(encoding="utf-8")
    assert "student of `distilled`" in card
    assert f"| teacher | {base.name} |" in card
    assert str(tmp_path) not in card
    torch.testing.assert_close(*images_of_both(trainer, student), rtol=0, atol=1e-4 if lora else 0)


def lcm_unet(base: Path) -> UNet2DConditionModel:
    """A latent consistency model, which is told its guidance."""
    config = dict(UNet2DConditionModel.load_config(base / "unet"))
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 32}).eval()


def test_a_latent_consistency_model_is_told_its_guidance(base: Path, tmp_path: Path) -> None:
    unet = lcm_unet(base)
    with torch.no_grad():  # Their embedding starts at zero.
        unet.time_embedding.cond_proj.weight.normal_(generator=torch.Generator().manual_seed(0))
    unet.save_pretrained(tmp_path / "lcm")
    given = {"policy_init": tmp_path / "lcm"}
    trainer = quick_trainer(base, tmp_path / "run", "rdm", given=given, **{**SETTINGS, "guidance_scale": 4.0})
    pipe = StableDiffusionPipeline.from_pretrained(base, unet=unet)
    pipe.scheduler = trainer.family.student_scheduler(2)
    align_weights(trainer.family.pipeline, pipe)
    expected = [
        pipe(
            TEXTS,
            num_inference_steps=2,
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(1),
            output_type="pt",
        ).images
        for scale in (4.0, 1.0)
    ]
    ours = trainer.generate(TEXTS, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours, expected[0])
    assert not torch.allclose(ours, expected[1], atol=1e-3)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("separate", [False, True], ids=["own-base", "other-teacher"])
def test_a_style_belongs_to_the_teacher_alone(
    lora: bool, separate: bool, base: Path, plain: Tensor, tmp_path: Path
) -> None:
    style = published_lora(tmp_path / "style")
    given: dict[str, Any] = {"teacher_adapter": style, **({} if lora else {"peft_config": None})}
    if separate:
        given["teacher"] = tiny_sd(tmp_path / "teacher")  # The same weights, in a pipeline of their own.
    trainer = quick_trainer(base, tmp_path / "run", "rdm", given=given, **SETTINGS)
    styled = stock_prediction(base, style)
    torch.testing.assert_close(prediction(trainer, "teacher"), styled, rtol=0, atol=0 if lora else 1e-5)
    for role in ("policy", "fake_score"):
        torch.testing.assert_close(prediction(trainer, role), plain, rtol=0, atol=0)
    frozen = {name: one for name, one in snapshot(trainer.networks.module("teacher")).items() if ".teacher." in name}
    assert bool(frozen) == lora
    trainer.train()
    torch.testing.assert_close(prediction(trainer, "teacher"), styled, rtol=0, atol=0 if lora else 1e-5)
    assert not changed(frozen, {name: snapshot(trainer.networks.module("teacher"))[name] for name in frozen})
    # The style is what R_dm asks for: without it the teacher and the fake score agree at the start.
    assert trainer.state.log_history[0]["rewards/rdm/gap"] > 0.05
    trainer.save_model(tmp_path / "student")
    if lora:
        saved = load_file(tmp_path / "student" / "pytorch_lora_weights.safetensors")
        assert not any("teacher" in name for name in saved)


def test_both_at_once_on_a_flow(tmp_path: Path) -> None:
    """Policy, fake score and teacher: three adapters on one transformer."""
    pipe = tiny_sd3(tmp_path / "source")
    pipe.save_pretrained(tmp_path / "base")
    for name, seed in (("few-step", 1), ("style", 2)):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            one = tiny_sd3(tmp_path / "source")
            one.transformer.add_adapter(LoraConfig(r=3, target_modules=["to_q", "to_v"], init_lora_weights=False))
        state = get_peft_model_state_dict(one.transformer)
        type(one).save_lora_weights(tmp_path / name, transformer_lora_layers=state)
    given = {"policy_init": tmp_path / "few-step", "teacher_adapter": tmp_path / "style"}
    given["peft_config"] = LoraConfig(r=2)
    trainer = quick_trainer(tmp_path / "base", tmp_path / "run", ["rdm", brightness()], given=given, **SETTINGS)
    x_t = latents(2, *trainer.family.latent_shape)
    with torch.no_grad():
        found = [
            trainer.networks.predict(role, x_t, T, trainer.family.encode(TEXTS))
            for role in ("policy", "teacher", "fake_score")
        ]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(found[first], found[second], atol=1e-3)
    trainer.train()
    again = trainer.networks.predict("teacher", x_t, T, trainer.family.encode(TEXTS))
    assert torch.equal(again, found[1])


def test_what_is_no_student_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with_text_encoder(tmp_path / "text")
    tiny_sd(tmp_path / "source").vae.save_pretrained(tmp_path / "vae")
    for name, message in (
        ("empty", "policy_init='.*empty' holds no pytorch_lora_weights"),
        ("text", "also adapts the text encoder"),
        ("vae", "policy_init='.*vae' is a AutoencoderKL, but the base's unet is a UNet2D"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            quick_trainer(base, tmp_path / "run", "rdm", given={"policy_init": tmp_path / name}, **SETTINGS)


def with_text_encoder(folder: Path) -> None:
    pipe = tiny_sd(folder / "source")
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    named = pipe.text_encoder.state_dict()
    text_encoder = {name.replace(".default", ""): value for name, value in named.items() if "lora_" in name}
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=text_encoder,
    )


@pytest.mark.usefixtures("onednn")
def test_a_distilled_student_survives_more_training(tmp_path: Path) -> None:
    """The complaint of this field: training a few-step model further breaks it. Here R_dm holds it where it is.

    The embedded digits, a two-step student of a short run, ten more updates for a reward: with ``rdm`` beside the
    reward the student's images move far less than with the reward alone at the same rate.
    """
    from rdm_rl.digits.data import TEACHER_FOLDER

    config = LoraConfig(r=8, lora_alpha=8)
    rows = PROMPTS
    common = {**QUICK, "num_inference_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4}
    first = quick_trainer(
        TEACHER_FOLDER,
        tmp_path / "first",
        "rdm",
        given={"peft_config": config},
        train_dataset=rows,
        **{**common, "warm_start": "ode", "warm_start_steps": 20, "warm_start_num_states": 32, "max_steps": 1},
    )
    first.train()
    first.save_model(tmp_path / "student")
    texts = [row["prompt"] for row in rows]

    def images(trainer: RDMTrainer) -> Tensor:
        align_weights(trainer.family.pipeline)
        return trainer.generate(texts, generator=torch.Generator().manual_seed(2))

    start = images(first)
    moved = {}
    for name, rewards, weights in (("rdm", ["rdm", brightness()], [1.0, 0.3]), ("reward", [brightness()], [1.0])):
        updates = 5 if "rdm" in rewards else 0
        trainer = quick_trainer(
            TEACHER_FOLDER,
            tmp_path / name,
            rewards,
            given={"policy_init": tmp_path / "student", "peft_config": config},
            train_dataset=rows,
            **{**common, "max_steps": 10, "reward_weights": weights, "fake_score_updates_per_policy_update": updates},
        )
        assert torch.equal(images(trainer), start)  # Untouched until the first update.
        trainer.train()
        moved[name] = (images(trainer) - start).square().mean().sqrt().item()
    assert 0 < moved["rdm"] < 0.5 * moved["reward"]


def test_a_small_update_survives_in_half_precision(tmp_path: Path) -> None:
    """Added to bfloat16 weights it would be rounded away; a pipeline that is saved whole has it in float32."""
    tiny_dit(tmp_path / "source").save_pretrained(tmp_path / "base")
    rows = [{"prompt": str(number)} for number in range(4)]
    given = {"peft_config": LoraConfig(r=4)}
    trainer = quick_trainer(
        tmp_path / "base", tmp_path / "run", "rdm", given=given, train_dataset=rows, bf16=True, **QUICK
    )
    before = snapshot(trainer.networks.module("policy"))
    with torch.no_grad():
        for name, parameter in trainer.networks.named_parameters("policy").items():
            if "lora_B" in name:
                parameter.normal_(std=3e-4, generator=torch.Generator().manual_seed(0))
    trainer.save_model(tmp_path / "student")
    merged = load_student(tmp_path / "student", "nothing").pipeline.transformer.state_dict()
    name = "transformer_blocks.0.attn1.to_q"
    base_weight = before[f"{name}.base_layer.weight"].float()
    factors = [snapshot(trainer.networks.module("policy"))[f"{name}.lora_{one}.policy.weight"] for one in "BA"]
    wanted = 2 * factors[0] @ factors[1]  # PEFT's default scale: alpha 8, rank 4.
    torch.testing.assert_close(merged[f"{name}.weight"] - base_weight, wanted, rtol=1e-3, atol=1e-7)
    after = snapshot(trainer.networks.module("policy"))
    assert not changed(
        {key: before[key] for key in before if "lora_" not in key}, {k: after[k] for k in before if "lora_" not in k}
    )


def test_a_style_has_solutions_and_images_of_its_own(base: Path, tmp_path: Path) -> None:
    names = set()
    for seed in (None, 5, 6):
        given = {} if seed is None else {"teacher_adapter": published_lora(tmp_path / f"style{seed}", seed=seed)}
        trainer = quick_trainer(base, tmp_path / "run", "rdm", given=given, **SETTINGS)
        names.add(fingerprint(trainer.networks.module("teacher")))
        randomize(trainer.networks)  # What is trained does not count.
        assert fingerprint(trainer.networks.module("teacher")) in names
    assert len(names) == 3


@pytest.mark.parametrize("what", ["policy_init", "teacher_adapter"])
def test_a_checkpoint_goes_on_with_the_models_it_was_made_with(what: str, base: Path, tmp_path: Path) -> None:
    if what == "policy_init":
        other_unet(tmp_path).save_pretrained(tmp_path / "part")
    else:
        published_lora(tmp_path / "part")
    settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 1}
    given = {what: tmp_path / "part"}
    quick_trainer(base, tmp_path / "run", "rdm", given=given, **settings).train()
    role = "policy" if what == "policy_init" else "teacher"
    with pytest.raises(ValueError, match=f"made with .*weights of the {role}="):
        quick_trainer(base, tmp_path / "run", "rdm", **{**settings, "max_steps": 2}).train(True)
    again = quick_trainer(base, tmp_path / "run", "rdm", given=given, **{**settings, "max_steps": 2})
    again.train(True)
    assert again.state.global_step == 2


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning")
def test_what_cannot_be_had_or_is_of_another_base(base: Path, tmp_path: Path) -> None:
    tiny_sdxl(tmp_path / "source").save_pretrained(tmp_path / "sdxl")
    lora = published_lora(tmp_path / "published")
    missing = "owner/no-such/lora.safetensors"
    for what in ("policy_init", "teacher_adapter"):
        with pytest.raises(OSError, match=f"{what}='{missing}' cannot be loaded: ") as unavailable:
            quick_trainer(base, tmp_path, "rdm", given={what: missing}, **SETTINGS)
        with pytest.raises(ValueError, match=f"{what}='.*published' does not fit this model: size mismatch") as foreign:
            quick_trainer(tmp_path / "sdxl", tmp_path, "rdm", given={what: lora}, **SETTINGS)
        assert "\n" not in f"{unavailable.value}{foreign.value}"
    with pytest.raises(ValueError, match=r"policy_init='.*sdxl' is a UNet2D.* another kind of model"):
        quick_trainer(base, tmp_path, "rdm", given={"policy_init": tmp_path / "sdxl"}, **SETTINGS)


def test_a_checkpoint_knows_what_its_networks_predict(base: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 1}
    quick_trainer(base, tmp_path / "run", "rdm", **settings).train()
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    with pytest.raises(ValueError, match=r"made with .*weights of the teacher="):
        quick_trainer(pipe, tmp_path / "run", "rdm", **{**settings, "max_steps": 2}).train(True)
