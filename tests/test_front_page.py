"""The script on page one is the recipe whose numbers stand beside it."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import rdm_rl
from rdm_rl.scenes.students import LORA_RANK, TEACHER_FOLDER, ScenesEvaluation, scenes_config, training_prompts
from rdm_rl.student import load_student
from tests.helpers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPT = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)[0]


def test_the_script_is_the_demo_s_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    class Noted:
        def __init__(self, **settings: Any) -> None:
            made.update(settings)

        def train(self) -> None: ...

        save_model = train

    monkeypatch.setattr(rdm_rl, "RDMTrainer", Noted)
    exec(compile(SCRIPT, "README.md", "exec"), {})
    script, demo = made["args"], scenes_config("runs/scenes", use_cpu=made["args"].use_cpu)
    surroundings = {"save_strategy", "disable_tqdm", "logging_steps", "logging_dir"}
    differing = {
        each.name
        for each in fields(demo)
        if each.name not in surroundings and str(getattr(script, each.name)) != str(getattr(demo, each.name))
    }
    assert not differing
    assert made["train_dataset"] == training_prompts()
    assert made["peft_config"].r == made["peft_config"].lora_alpha == LORA_RANK
    assert made["model"] == TEACHER_FOLDER
    assert made["reward_funcs"] == "rdm"


@pytest.mark.usefixtures("onednn")
@pytest.mark.long
def test_the_script_gives_the_figures_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(SCRIPT, "README.md", "exec"), {})
    student = load_student("runs/scenes", TEACHER_FOLDER)
    evaluation = ScenesEvaluation(0)
    row = evaluation.judge_images(evaluation.draw(student.pipeline, 1).images, name="student")
    printed = re.search(
        r"a distance to the teacher of ([\d.]+) and shows ([\d.]+) % as asked", " ".join(README.split())
    )
    assert printed is not None
    # Another processor rounds otherwise, and 48 updates carry it on.
    assert row.distance_to_teacher == pytest.approx(float(printed[1]), abs=1.0)
    assert 100 * row.accuracy == pytest.approx(float(printed[2]), abs=3.0)
