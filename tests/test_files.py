"""Names of what caches keep: everything that determines the content is in them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rdm_rl import RDMTrainer
from rdm_rl.files import fingerprint, load_tensors, read_json, save_tensors
from rdm_rl.noise_schedule import FlowMatching
from rdm_rl.student import public_name
from rdm_rl.trainers.setup import teacher_fingerprint, teacher_key
from tests.helpers import QUICK, StepAway, quick_trainer, same, tiny_sd


def test_every_weight_and_fact_counts(tmp_path: Path) -> None:
    unet = tiny_sd(tmp_path / "a").unet
    name = fingerprint(unet, steps=4)
    assert name == fingerprint(tiny_sd(tmp_path / "b").unet, steps=4)
    assert name != fingerprint(unet, steps=5)
    weights = list(unet.parameters())
    for weight in (weights[0], weights[-1], max(weights, key=torch.numel)):
        before = weight.data.flatten()[-2].clone()
        weight.data.view(-1)[-2] += 1e-3
        assert name != fingerprint(unet, steps=4)
        weight.data.view(-1)[-2] = before
    assert name == fingerprint(unet, steps=4)


def test_facts_may_be_sets_tensors_and_records() -> None:
    names = [
        fingerprint(None, one={"a", "b"}, schedule=FlowMatching(shift=shift), levels=torch.ones(2) * level)
        for shift, level in ((1.0, 1.0), (3.0, 1.0), (1.0, 2.0), (1.0, 1.0))
    ]
    assert len(set(names)) == 3
    assert names[0] == names[3]


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text('{"steps": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"training.json' is no JSON, or cut off: [^\n]*$"):
        read_json(tmp_path / "training.json")
    (tmp_path / "README.md").write_text("---\ntags: [a\n---\n", encoding="utf-8")
    assert public_name(str(tmp_path)) == tmp_path.name


def test_tensors_come_back_with_their_facts(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(1)}
    save_tensors(tmp_path / "kept.safetensors", tensors, prompts="a")
    assert same(load_tensors(tmp_path / "kept.safetensors"), (tensors, {"prompts": "a"}))


@pytest.mark.parametrize(
    "hurt",
    [
        lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        lambda content: content[:-4],
        lambda _: b"",
    ],
    ids=["a flipped bit", "cut off", "empty"],
)
def test_a_damaged_file_of_tensors_is_named(hurt: Callable[[bytes], bytes], tmp_path: Path) -> None:
    file = tmp_path / "kept.safetensors"
    save_tensors(file, {"a": torch.ones(8)})
    file.write_bytes(hurt(file.read_bytes()))
    with pytest.raises(ValueError, match=r"kept\.safetensors' (is damaged|has changed).*Delete it"):
        load_tensors(file)


def other_prompts(trainer: RDMTrainer) -> None:
    trainer.family.pipeline.text_encoder.get_input_embeddings().weight.data[57] += 1e-3


CHANGES = {
    "prompt encoder": other_prompts,
    "shift": lambda trainer: setattr(trainer.family, "schedule", FlowMatching(shift=3.0)),
    "prediction type": lambda trainer: setattr(trainer.family, "prediction_type", "v_prediction"),
    "precision": lambda trainer: setattr(trainer.args, "bf16", True),
    "teacher": lambda trainer: next(trainer.networks.module("teacher").parameters()).data.add_(1e-3),
    "its configuration": lambda trainer: trainer.family.network.register_to_config(act_fn="gelu"),
    "decoder's scale": lambda trainer: trainer.family.decoder.register_to_config(scaling_factor=2.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_the_teachers_work_changes_its_name(
    change: Callable[[Any], None], base: Path, tmp_path: Path
) -> None:
    trainer = quick_trainer(base, tmp_path, StepAway(), **QUICK)

    def name() -> str:
        teacher = teacher_fingerprint(trainer.networks, trainer.args, trainer.family.decoder)
        return teacher_key(teacher, trainer.networks, None, steps=4)

    before = name()
    assert before == name()
    change(trainer)
    assert before != name()
