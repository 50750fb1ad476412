"""The example scripts run as they are, only shorter."""

import json
from pathlib import Path

import pytest
import torch

from rdm_rl.digits.data import load_digits
from rdm_rl.evaluation.curves import PANELS
from rdm_rl.rewards import registry
from tests.helpers import example

SHORT = ["--warm_start_steps", "1", "--warm_start_num_states", "8", "--fake_score_warmup_steps", "1"]


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.mark.usefixtures("onednn")
def test_custom_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("custom_reward").main(["--output_dir", str(tmp_path), "--max_steps", "1", *SHORT])
    assert (tmp_path / "student" / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "samples.png").is_file()
    assert "grey level of even digits" in capsys.readouterr().out


def test_the_rewards_of_the_custom_example() -> None:
    module = example("custom_reward")
    page = torch.zeros(2, 3, 32, 32)
    page[0, :, 2:8, 2:8] = page[0, :, 20:30, 20:30] = 1.0
    assert module.pieces(page, ["", ""]).tolist() == [2.0, 0.0]
    grey = torch.full((2, 3, 32, 32), module.BOLD)
    even, odd = module.bold_if_even(grey, ["", ""], [4, 5]).tolist()
    assert even == pytest.approx(0.0, abs=1e-6)
    assert odd == pytest.approx(module.THIN - module.BOLD)
    assert (module.pieces(load_digits("train").images[:50], [""] * 50) >= 1).all()


@pytest.mark.usefixtures("onednn")
def test_digits_redif(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--max_steps", "1", "--batch_size", "8", "--teacher_steps", "2", "--num_judged", "4"]
    example("digits_redif").main(["--output_dir", str(tmp_path), "--num_inference_steps", "4", *short])
    assert (tmp_path / "student" / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "samples.png").is_file()
    assert "after: teacher_mse" in capsys.readouterr().out


@pytest.mark.usefixtures("onednn")
def test_digits_gndmr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rdm_rl.digits.students.DigitsEvaluation.num_images", 20)
    monkeypatch.setattr("rdm_rl.digits.students.DigitsEvaluation.teacher_steps", 2)
    monkeypatch.setattr("rdm_rl.evaluation.curves.PANELS", PANELS[:2])
    module = example("digits_gndmr")
    words = ["--output_dir", str(tmp_path), "--reward", "ink", "--weight", "0.5", "--method", "dmdr"]
    module.main([*words, "--max_steps", "2", "--reward_start_step", "1", *SHORT])
    (entry,) = [one for one in json.loads((tmp_path / "log.json").read_text()) if "rewards/ink/lambda" in one]
    assert entry["rewards/ink/lambda"] == 0.25  # A mean: 0 in the cold start, then the constant weight.
    assert entry["rewards/ink/acted"] == 1
    assert entry["rewards/symmetry/lambda"] == entry["rewards/symmetry/acted"] == 0
    for name in ("report.html", "samples.png", "student/pytorch_lora_weights.safetensors"):
        assert (tmp_path / name).is_file()
