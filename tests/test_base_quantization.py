"""A frozen base stored in 8 bits: how far it is off, that adapters train on it, and what is refused."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rdm_rl import RDMTrainer
from rdm_rl.cli.plan.report import make_plan
from rdm_rl.cli.train import TrainArguments
from rdm_rl.families import Family, load_family
from rdm_rl.families.quantization import FrozenLinear, quantized_size, quantized_weights
from rdm_rl.files import plain_tensors
from rdm_rl.student import load_student
from rdm_rl.trainers import rdm_trainer
from tests.helpers import (
    CHECKPOINTING,
    PROMPTS,
    QUICK,
    WITHOUT_RDM,
    StopAfter,
    changed,
    declare,
    latents,
    log_numbers,
    quick_trainer,
    randomize,
    same,
    tiny_config,
    tiny_sd,
    tiny_trainer,
    trained_weights,
)
from tests.original_layout import original_tensors, save_single_file
from tests.tiny_pipelines import tiny_dit, tiny_qwen

# How far the tiny U-Net's output and the encoded prompts may be off, relative to their size. Measured in float32: 0.002
# and 0.010 with 8-bit integers, 0.013 and 0.054 with 8-bit floats; the gradient of the input about twice the output's.
ERRORS = {"int8": (0.006, 0.03), "fp8": (0.04, 0.12)}

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
kinds = pytest.mark.parametrize("kind", list(ERRORS))
pytestmark = pytest.mark.filterwarnings("ignore:::torchao")


def distance(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def stored_bytes(*modules: nn.Module) -> int:
    """What parameters and buffers of modules without adapters take, quantised or not."""
    tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return sum(part.nbytes for tensor in tensors for part in plain_tensors(tensor.data))


def output_and_gradient(family: Family, conditioning: Any) -> tuple[Tensor, Tensor]:
    x_t = latents(2, 4, 8, 8).requires_grad_()
    output = family.forward(family.network, x_t, torch.tensor([0.9, 0.2]), conditioning)
    (gradient,) = torch.autograd.grad(output.square().mean(), x_t)
    return output.detach(), gradient


@needs_torchao
@kinds
def test_a_quantised_base_predicts_almost_what_it_did(kind: Any, base: Path) -> None:
    plain, stored = load_family(base), load_family(base, quantization=kind)
    conditioning = plain.encode(["the digit 3", "the digit 4"])
    most, most_of_prompts = ERRORS[kind]
    (output, gradient), expected = (output_and_gradient(family, conditioning) for family in (stored, plain))
    assert 0 < distance(output, expected[0]) < most
    assert 0 < distance(gradient, expected[1]) < 3 * most
    encoded = stored.encode(["the digit 3", "the digit 4"]).tensors
    for name, tensor in conditioning.tensors.items():
        assert 0 < distance(encoded[name], tensor) < most_of_prompts


@needs_torchao
@kinds
def test_it_takes_the_bytes_that_are_planned(kind: Any, base: Path, tmp_path: Path) -> None:
    plain, stored = load_family(base), load_family(base, quantization=kind)
    for before, after in ((plain.network, stored.network), (plain.text_encoders[0], stored.text_encoders[0])):
        packed = [weight for weight in after.parameters() if is_traceable_wrapper_subclass(weight)]
        planned = [quantized_size(weight, kind) for weight in quantized_weights(before)]
        assert planned == [sum(part.nbytes for part in plain_tensors(weight)) for weight in packed]
    arguments = TrainArguments(model_name_or_path=str(base), dataset="digits", lora_r=4)
    plan = make_plan(base, arguments, tiny_config(tmp_path, base_quantization=kind))
    assert plan.kept["frozen networks"] == stored_bytes(stored.network) < stored_bytes(plain.network)
    assert plan.kept["text encoders"] == stored_bytes(*stored.text_encoders)
    assert plan.components["unet"].size == plan.kept["frozen networks"]
    assert plan.components["unet"].precision == "quantised"


def test_the_head_of_a_language_model_is_not_stored_so() -> None:
    encoder = tiny_qwen(8)
    stored = [*quantized_weights(encoder)]
    assert len(stored) == 7 * len(encoder.model.layers)
    assert all(weight is not encoder.lm_head.weight for weight in stored)


@needs_torchao
def test_two_loads_are_one_model(base: Path) -> None:
    first, second = (load_family(base, quantization="int8") for _ in range(2))
    assert first.border() == second.border() != load_family(base).border()
    assert first.encoder_fingerprint() == second.encoder_fingerprint()


@needs_torchao
def test_what_is_put_back_for_a_product_is_not_kept_for_the_backward_pass(base: Path) -> None:
    layers = [
        layer for layer in load_family(base, quantization="int8").network.modules() if type(layer) is FrozenLinear
    ]
    layer: Any = max(layers, key=lambda each: each.weight.numel())
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    with torch.no_grad():
        plain.weight.copy_(layer.weight.dequantize())
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    results = []
    for module in (plain, layer):
        inputs = latents(2, layer.in_features).requires_grad_()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = module(inputs)
        most = max(kept, default=0)
        results.append((output.detach(), torch.autograd.grad(output.square().sum(), inputs)[0]))
    torch.testing.assert_close(results[1], results[0])
    assert most < layer.weight.numel()


@needs_torchao
@pytest.mark.parametrize(
    ("kind", "settings"), [("int8", {}), ("fp8", {CHECKPOINTING: True})], ids=["int8", "fp8-checkpointing"]
)
def test_adapters_train_on_it_and_draw_on_the_plain_base(kind: Any, settings: Any, base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path, dm_normalization="group", base_quantization=kind, **settings)
    before, frozen = trained_weights(trainer), trainer.networks.fingerprints()
    trainer.train()
    trainer.save_model()
    assert changed(before, trained_weights(trainer)) == before.keys()
    assert trainer.networks.fingerprints() == frozen
    student = load_student(tmp_path, base)
    prompts = [row["prompt"] for row in PROMPTS[:2]]
    drawn = trainer.generate(prompts, generator=torch.Generator().manual_seed(0))
    assert (
        distance(student.draw(prompts, generator=torch.Generator().manual_seed(0), output_type="pt"), drawn)
        < ERRORS[kind][1]
    )


@needs_torchao
def test_resumed_equals_uninterrupted(base: Path, tmp_path: Path) -> None:
    def run(folder: str, *, resume: bool = False, stop: int | None = None) -> RDMTrainer:
        settings = {**QUICK, "save_strategy": "steps", "save_steps": 1, "base_quantization": "int8"}
        callbacks = [] if stop is None else [StopAfter(stop)]
        trainer = quick_trainer(base, tmp_path / folder, ["rdm"], given={"callbacks": callbacks}, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    assert run("parts", stop=1).state.global_step == 1
    resumed = run("parts", resume=True)
    assert same(trained_weights(resumed), trained_weights(whole))
    assert log_numbers(resumed) == log_numbers(whole)


@needs_torchao
@kinds
def test_the_ratio_on_unchanged_weights_is_exactly_1(kind: Any, base: Path, tmp_path: Path) -> None:
    def box(images: Tensor, prompts: list[str]) -> list[float]:
        return images.detach().mean((1, 2, 3)).tolist()

    settings = {**WITHOUT_RDM, "num_inference_steps": 3, "num_replayed_steps": 2, "reward_weighting": "fixed"}
    trainer = quick_trainer(base, tmp_path, [declare(box)], base_quantization=kind, **settings)
    randomize(trainer.networks, scale=0.02)
    trainer._make_experiences([trainer.generate_rollout(batch) for batch in trainer.prompt_batches(0)], 0)
    assert trainer.experiences
    for experience in trainer.experiences:
        x_0 = trainer.replay_step(experience.rollout, experience.step).detach()
        assert torch.equal(experience.directions["box"].recorded.at(x_0).log_ratio, torch.zeros(4))


def test_a_file_is_refused(tmp_path: Path) -> None:
    pipeline = tiny_sd(tmp_path / "source")
    file = save_single_file(original_tensors(pipeline), tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match="is one file, which diffusers does not quantise"):
        quick_trainer(file, tmp_path / "run", ["rdm"], base_quantization="int8", **QUICK)


def separate(base: Path) -> Mapping[str, Any]:
    return {"given": {"peft_config": None}}


def as_object(base: Path) -> Mapping[str, Any]:
    return {"given": {"teacher": tiny_sd(base.parent / "object")}}


def network(base: Path) -> Mapping[str, Any]:
    return {"given": {"policy_init": base}}


@pytest.mark.parametrize(
    ("settings", "installed", "error", "message"),
    [
        (separate, True, ValueError, "without a peft_config"),
        (as_object, True, ValueError, "model or teacher is a loaded pipeline"),
        (network, True, ValueError, "is a whole network"),
        (lambda base: {"shard": True}, True, ValueError, "shard=True cannot cut"),
        (lambda base: {"base_quantization": "nf4"}, True, ValueError, "needs a CUDA GPU.*Set 'int8' or 'fp8'"),
        (lambda base: {}, False, ImportError, r"pip install 'rdm-rl\[torchao\]'"),
    ],
    ids=["full", "object", "network", "shard", "device", "package"],
)
def test_what_cannot_work_is_refused_before_a_model_loads(
    settings: Callable[[Path], Mapping[str, Any]],
    installed: bool,
    error: type[Exception],
    message: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rdm_trainer, "load_networks", lambda *_, **__: pytest.fail("a model is being loaded"))
    monkeypatch.setattr("rdm_rl.families.quantization.find_spec", lambda _: installed or None)
    options = {**QUICK, "base_quantization": "int8", **settings(base)}
    with pytest.raises(error, match=f"base_quantization='.*{message}"):
        quick_trainer(base, tmp_path, ["rdm"], **options)


def test_so_is_a_model_whose_student_is_saved_whole(tmp_path: Path) -> None:
    tiny_dit().save_pretrained(tmp_path / "dit")
    with pytest.raises(ValueError, match="a DiTPipeline loads no LoRA"):
        load_family(tmp_path / "dit", quantization="int8")
