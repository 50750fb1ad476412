"""The script on page one is the recipe whose numbers stand beside it."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import rdm_rl
from rdm_rl.demo.run import LORA_RANK, TEACHER_FOLDER, Evaluation, demo_config, training_prompts
from rdm_rl.student import load_student
from tests.helpers import ROOT, table_rows

SCRIPT = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[0]


def test_the_script_is_the_demo_s_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    class Noted:
        def __init__(self, **settings: Any) -> None:
            made.update(settings)

        def train(self) -> None: ...

        save_model = train

    monkeypatch.setattr(rdm_rl, "RDMTrainer", Noted)
    exec(compile(SCRIPT, "README.md", "exec"), {})
    script, demo = made["args"], demo_config(1, "runs/digits", use_cpu=made["args"].use_cpu)
    surroundings = {"save_strategy", "disable_tqdm", "logging_steps", "logging_dir", "adapter_pass"}
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


@pytest.mark.long
def test_the_script_gives_the_row_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(SCRIPT, "README.md", "exec"), {})
    student = load_student("runs/digits", TEACHER_FOLDER)
    evaluation = Evaluation(0)
    (row,) = (
        row
        for row in evaluation.judge({"student, 1 step": evaluation.draw(student.pipeline, 1)})
        if row.name.startswith("student")
    )
    table = {cells[0]: cells for cells in table_rows("../README.md") if len(cells) > 6}
    titles, printed = table["sampler"], table["student, 1 step"]
    for name in ("distance to data", "distance to teacher", "precision", "recall", "coverage"):
        (place,) = (place for place, title in enumerate(titles) if title.split(" ↑")[0].split(" ↓")[0] == name)
        # Another processor rounds otherwise, and 60 updates carry it on.
        tolerance = 1.0 if name.startswith("distance") else 0.03
        measured = getattr(row, name.replace(" ", "_"))
        assert measured == pytest.approx(float(printed[place].strip("*")), abs=tolerance), name
