"""The demo, from the warm start to the report."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rdm_rl.demo.report import read_rows
from rdm_rl.demo.run import STUDENTS, evaluate_students, run_demo
from rdm_rl.demo.side_by_side import Pieces, side_by_side
from rdm_rl.evaluation.curves import PANELS
from rdm_rl.scenes.students import ScenesEvaluation


@contextmanager
def in_turn(count: int) -> Iterator[Callable[[Pieces], dict[str, Any]]]:
    """What the pieces return, without the processes, which are slow to start."""
    yield lambda pieces: {name: function(*given) for name, (function, given) in pieces.items()}


def test_a_piece_that_fails_ends_the_others() -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match="invalid literal"), side_by_side(2) as run:
        run({"bad": (int, ("x",)), "endless": (time.sleep, (600,))})
    assert time.monotonic() - start < 300


@pytest.mark.usefixtures("onednn")
def test_the_demo_writes_what_it_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ScenesEvaluation, "num_images", 20)
    monkeypatch.setattr(ScenesEvaluation, "teacher_steps", 3)
    monkeypatch.setattr("rdm_rl.demo.run.side_by_side", in_turn)
    at_once = {**STUDENTS["GNDMR"].settings, "reward_start_step": 1}
    monkeypatch.setitem(STUDENTS, "GNDMR", replace(STUDENTS["GNDMR"], settings=at_once))
    monkeypatch.setattr("rdm_rl.evaluation.curves.PANELS", PANELS[:2])  # All take as long to draw as all the rest.
    short = {
        "max_steps": 2,
        "warm_start_steps": 1,
        "warm_start_num_states": 8,
        "warm_start_ode_steps": 2,
        "fake_score_warmup_steps": 1,
        "per_device_train_batch_size": 8,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    folder = tmp_path / "out"
    assert run_demo(folder, seed=3, **short) == folder / "report.html"
    for name in ("warm-start", "dmd", "gndm", "gndmr"):
        student = folder / f"student-{name}"
        assert (student / "pytorch_lora_weights.safetensors").is_file()
        assert (student / "scheduler" / "scheduler_config.json").is_file()
    for name in ("samples.png", "curves.png", "metrics.json", "report.md"):
        assert (folder / name).stat().st_size > 0
    rows = {row.name: row for row in read_rows(folder / "metrics.json")}
    assert rows["teacher, 3 steps"].network_evaluations == 6
    assert rows["GNDMR, 1 step"].network_evaluations == 1
    assert [rows[name].kind for name in ("warm start, 1 step", "real images")] == ["baseline", "data"]
    assert "GNDM, 1 step" in capsys.readouterr().out

    evaluate_students([folder / "student-gndm"], [3])
    assert "student-gndm" in capsys.readouterr().out
    with pytest.raises(ValueError, match="rdm-rl evaluate"):
        evaluate_students([folder], [3])
