"""The profile of updates."""

import json
from pathlib import Path

import pytest

from rdm_rl.trainers.profiling import ProfileCallback, SectionClock
from tests.helpers import QUICK, brightness, changed, quick_trainer, trained_weights


def test_a_section_stands_still_while_one_within_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 4.0, 6.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = SectionClock(lambda: None)
    with clock.section("update"), clock.section("pass", samples=8):
        pass
    assert {name: section.seconds for name, section in clock.sections.items()} == {"update": 3.0, "pass": 3.0}


@pytest.mark.parametrize("lora", [True, False])
def test_a_profiled_run_trains_the_same(base: Path, tmp_path: Path, lora: bool, capsys: pytest.CaptureFixture) -> None:
    settings = {**QUICK, "max_steps": 4, "reward_weights": [1.0, 0.5], "logging_strategy": "no"}
    given = {} if lora else {"peft_config": None}
    plain = quick_trainer(base, tmp_path / "plain", ["rdm", brightness()], given=given, **settings)
    trainer = quick_trainer(base, tmp_path / "profiled", ["rdm", brightness()], given=given, **settings)
    profile = ProfileCallback(trainer, updates=2)
    trainer.add_callback(profile)
    plain.train()
    trainer.train()
    assert not changed(trained_weights(plain), trained_weights(trainer))
    sections = profile.clock.sections
    # Two updates of 4 samples.
    for name in ("teacher: forward", "fake_score: forward", "policy: forward, for a gradient"):
        assert sections[name].samples == 8, name
    assert sections["policy: backward"].calls == sections["fake_score: backward"].calls == 2
    assert {"reward rdm", "reward brightness", "everything else"} <= sections.keys()
    assert "policy: backward" in capsys.readouterr().out
    assert json.loads((tmp_path / "profiled" / "trace-0.json").read_text())["traceEvents"]
    assert "forward" not in vars(trainer.family)


def test_a_run_that_is_too_short_reports_what_it_has(base: Path, tmp_path: Path) -> None:
    trainer = quick_trainer(base, tmp_path, ["rdm"], **{**QUICK, "max_steps": 2})
    profile = ProfileCallback(trainer, updates=5)
    trainer.add_callback(profile)
    trainer.train()
    assert profile.done == 1
    assert "(mean of 1)" in profile.table()
