"""What is saved works in plain diffusers, in a process that has never heard of this library, bit for bit.

Weights are brought to aligned memory on both sides (``align_weights``): with weights that are mapped from a file, a
single image may differ in its last bits on some processors.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from rdm_rl import RDMTrainer
from rdm_rl.manifest import read_manifest
from rdm_rl.student import load_student, save_student
from tests.helpers import QUICK, changed, randomize, tiny_sd, tiny_trainer, with_onednn
from tests.tiny_pipelines import align_weights, tiny_dit, tiny_sd3

PROMPTS = ["the digit 3", "the digit 4", "the digit 5"]

# Runs alone: only torch, safetensors and diffusers.
PLAIN = """
import json, sys
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from peft import LoraConfig
from safetensors.torch import save_file

def generators():
    return {"one": torch.Generator().manual_seed(3), "list": [torch.Generator().manual_seed(s) for s in (3, 4, 5)]}

images = {}
for case in json.load(open(sys.argv[1])):
    if case["lora"]:
        pipe = DiffusionPipeline.from_pretrained(case["base"])
        pipe.load_lora_weights(case["student"], weight_name="pytorch_lora_weights.safetensors")
        pipe.scheduler = LCMScheduler.from_pretrained(case["student"], subfolder="scheduler")
    else:
        pipe = DiffusionPipeline.from_pretrained(case["student"])
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
            parameter.data = parameter.data.clone()
    for name, generator in generators().items():
        settings = {"num_inference_steps": case["steps"], "guidance_scale": 1.0, "output_type": "pt"}
        images[case["name"] + "/" + name] = pipe(case["prompts"], generator=generator, **settings).images.contiguous()
assert "rdm_rl" not in sys.modules
save_file(images, sys.argv[2])
"""


@dataclass(frozen=True)
class Case:
    """One kind of student."""

    prediction_type: str
    zero_snr: bool
    steps: int
    lora: bool = True

    @property
    def name(self) -> str:
        kind = "lora" if self.lora else "full"
        return f"{kind}-{self.prediction_type}{'-zero_snr' if self.zero_snr else ''}-{self.steps}"


# tests/test_family_contract.py crosses all numbers of steps with all prediction types, in one process.
CASES = [
    Case("epsilon", False, 1),
    Case("v_prediction", False, 3),
    Case("v_prediction", True, 4),
    Case("v_prediction", False, 4, lora=False),
]


def images(trainer: RDMTrainer) -> dict[str, torch.Tensor]:
    align_weights(trainer.family.pipeline)
    return {
        "one": trainer.generate(PROMPTS, generator=torch.Generator().manual_seed(3)),
        "list": trainer.generate(PROMPTS, generator=[torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]),
    }


@pytest.fixture(scope="module")
@with_onednn()  # As in the other process.
def both(bases: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict, dict]:
    """Images of every case: by our trainer, by plain diffusers in another process, and by ours before training."""
    folder = tmp_path_factory.mktemp("students")
    ours, before, description = {}, {}, []
    for case in CASES:
        base = bases(case.prediction_type, **({"rescale_betas_zero_snr": True} if case.zero_snr else {}))
        trainer = tiny_trainer(
            base,
            folder / case.name,
            lora=case.lora,
            num_inference_steps=case.steps,
            warm_start="none",
            fake_score_warmup_steps=0,
            fake_score_updates_per_policy_update=1,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            max_steps=1,
        )
        before[case.name] = images(trainer)["one"]
        trainer.train()
        trainer.save_model()
        align_weights(trainer.family.pipeline)
        ours |= {f"{case.name}/{name}": value for name, value in images(trainer).items()}
        place = {"base": str(base), "student": str(folder / case.name), "name": case.name, "prompts": PROMPTS}
        description.append({**asdict(case), **place})
    (folder / "cases.json").write_text(json.dumps(description))
    # An empty folder and an empty path: the repository cannot be imported by accident.
    command = [sys.executable, "-c", PLAIN, str(folder / "cases.json"), str(folder / "images.safetensors")]
    (folder / "empty").mkdir()
    result = subprocess.run(
        command, cwd=folder / "empty", env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return ours, load_file(folder / "images.safetensors"), before


def test_plain_diffusers_makes_our_images(both: tuple[dict, dict, dict]) -> None:
    for case in CASES:
        for generator in ("one", "list"):
            ours, plain = (images[f"{case.name}/{generator}"] for images in both[:2])
            assert torch.equal(ours, plain), f"{case.name}/{generator}"
            assert ours.shape == (3, 3, 16, 16)
            assert ours.min() >= 0
            assert ours.max() <= 1
            assert not torch.allclose(ours, both[2][case.name], atol=1e-3), "an untrained student would show nothing"


def trained(base: Path, folder: Path, **settings) -> RDMTrainer:
    quick = {**QUICK, "ema_decay": 0.999, "num_inference_steps": 2}
    trainer = tiny_trainer(base, folder, **{**quick, "learning_rate": 1e-2, **settings})
    trainer.train()
    return trainer


def policy(trainer: RDMTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.networks.state_dict("policy").items()}


def saved_policy(trainer: RDMTrainer, folder: Path) -> dict[str, torch.Tensor]:
    """The policy's weights as a fresh trainer reads them back from a saved student."""
    trainer.save_model(folder)
    again = tiny_trainer(
        trainer.models.name, folder / "again", warm_start="none", given={"policy_init": folder}, max_steps=0
    )
    return policy(again)


def test_the_averaged_policy_is_what_is_saved(base: Path, tmp_path: Path) -> None:
    averaged, without = trained(base, tmp_path / "a"), trained(base, tmp_path / "c", ema_decay=0.0)
    last = policy(averaged)
    assert not changed(last, policy(without)), "averaging must not change the run"
    with averaged.averaged_policy():
        average = policy(averaged)
    assert not changed(last, policy(averaged)), "looking at the average must not change the run"
    assert changed(last, average) == last.keys()
    assert not changed(saved_policy(averaged, tmp_path / "as"), average)
    assert not torch.equal(images(averaged)["one"], images(without)["one"]), "the average draws"
    averaged.args.save_ema = False
    assert not changed(saved_policy(averaged, tmp_path / "bs"), last)
    assert torch.equal(images(averaged)["one"], images(without)["one"])
    assert not changed(saved_policy(without, tmp_path / "cs"), last)


def test_policy_init_continues_a_saved_student_of_its_own_rank_and_scale(base: Path, tmp_path: Path) -> None:
    first = trained(base, tmp_path / "first")
    first.save_model(tmp_path / "student")
    given = {"policy_init": tmp_path / "student", "peft_config": LoraConfig(r=2, lora_alpha=8)}
    second = tiny_trainer(base, tmp_path / "second", warm_start="none", given=given)
    assert torch.equal(images(second)["one"], images(first)["one"])
    settings = [second.networks.family.network.peft_config[role] for role in ("policy", "fake_score")]
    assert [(one.r, one.lora_alpha) for one in settings] == [(4, 4), (2, 8)]
    fake_score = second.networks.state_dict("fake_score")
    assert all(value.abs().sum() == 0 for name, value in fake_score.items() if "lora_B" in name)
    second.train()
    assert not torch.equal(images(second)["one"], images(first)["one"])


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_folder_of_a_student(lora: bool, base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path / "run", lora=lora, num_inference_steps=3, teacher_guidance_scale=2.5)
    randomize(trainer.networks)
    trainer.save_model(tmp_path / "student")
    files = {path.relative_to(tmp_path / "student").as_posix() for path in (tmp_path / "student").rglob("*")}
    assert {"README.md", "scheduler/scheduler_config.json", "manifest.json"} <= files
    assert ("pytorch_lora_weights.safetensors" in files) == lora
    assert ("unet/diffusion_pytorch_model.safetensors" in files) != lora
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    scheduler = LCMScheduler.from_pretrained(tmp_path / "student", subfolder="scheduler")
    assert scheduler.config.original_inference_steps == 3
    card = (tmp_path / "student" / "README.md").read_text()
    assert "num_inference_steps=3" in card
    assert "guidance_scale=1.0" in card
    assert "2.5" in card
    student = load_student(tmp_path / "student", base)
    assert isinstance(student.pipeline, StableDiffusionPipeline)
    assert student.call == {"num_inference_steps": 3, "guidance_scale": 1.0}
    assert len(student.draw(PROMPTS, generator=torch.Generator().manual_seed(3))) == 3
    listed = read_manifest(tmp_path / "student")["files"]
    assert {*listed, "manifest.json"} == {name for name in files if (tmp_path / "student" / name).is_file()}
    (tmp_path / "student" / "README.md").write_text("my own card")
    load_student(tmp_path / "student", base)
    weights = "pytorch_lora_weights.safetensors" if lora else "unet/diffusion_pytorch_model.safetensors"
    content = bytearray((tmp_path / "student" / weights).read_bytes())
    content[-5] ^= 1
    (tmp_path / "student" / weights).write_bytes(content)
    with pytest.raises(ValueError, match=f"{weights} has changed"):
        load_student(tmp_path / "student", base)


def test_a_student_in_a_runs_folder_is_its_own_files_alone(base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "notes.safetensors").touch()
    trainer.save_model()
    assert {*read_manifest(tmp_path)["files"]} == {
        *("README.md", "student.json", "base.json", "training.json", "scheduler/scheduler_config.json"),
        *("pytorch_lora_weights.safetensors", "kohya_lora.safetensors"),
    }


@pytest.mark.parametrize(
    ("make", "lora", "settings", "size"),
    [
        (tiny_sd, True, {}, (16, 16)),
        (tiny_sd, False, {"resolution": 32}, (32, 32)),
        (tiny_sd3, True, {}, (16, 16)),
        (tiny_dit, True, {}, (16, 16)),  # Saved whole.
    ],
    ids=["lora", "full", "flow", "dit"],
)
def test_code_on_the_model_card_runs_as_printed(
    make: Callable[[Path], DiffusionPipeline], lora: bool, settings: dict, size: tuple[int, int], tmp_path: Path
) -> None:
    make(tmp_path / "sources").save_pretrained(tmp_path / "base")
    rows = [{"prompt": "1"}]  # Of a DiT, a class.
    trainer = tiny_trainer(tmp_path / "base", tmp_path / "run", lora=lora, train_dataset=rows, **settings)
    trainer.save_model(tmp_path / "student")
    code = (tmp_path / "student" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    for folder in ("base", "student"):
        code = code.replace(f"path/to/the/{folder}/{folder}", str(tmp_path / folder))
    assert "path/to" not in code
    names: dict = {}
    exec(code, names)
    assert names["image"].size == size


def test_a_name_on_the_hub_is_printed_as_it_is(base: Path, tmp_path: Path) -> None:
    networks = tiny_trainer(base, tmp_path / "run").networks
    save_student(tmp_path, networks, num_inference_steps=2, base="owner/base", name="me/student", facts={})
    card = (tmp_path / "README.md").read_text()
    assert 'from_pretrained("owner/base")' in card
    assert 'load_lora_weights("me/student", ' in card
    assert "base_model: owner/base" in card
    assert "path/to" not in card


def test_no_student_no_pipeline(tmp_path: Path) -> None:
    save_file({}, tmp_path / "something.safetensors")
    with pytest.raises(FileNotFoundError, match="holds no student"):
        load_student(tmp_path, "owner/name")
