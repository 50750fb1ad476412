"""Logs that show what is going wrong, and logs that only look like it."""

from pathlib import Path

import pytest

from rdm_rl.trainers.health import SIGNS, signs
from tests.helpers import QUICK, quick_trainer, table_rows

LAG, LOSS = "fake_score/lag", "fake_score/fresh_loss"
LOGS: dict[str, tuple[dict[str, list[float]], set[str]]] = {
    "a lag that stays": ({LAG: [0.0, 0.2, 0.3, 0.2], LOSS: [1.0] * 4}, {"fake_score/lag / fake_score/fresh_loss"}),
    "a lag that scatters": ({LAG: [0.2, -0.1, 0.3, 0.2], LOSS: [1.0] * 4}, set()),
    "a lag of a large loss": ({LAG: [0.2] * 4, LOSS: [10.0] * 4}, set()),
    "groups of one value": ({"rewards/a/frac_zero_std": [0.1, 0.9, 1.0, 1.0]}, {"rewards/a/frac_zero_std"}),
    "groups of one value once": ({"rewards/a/frac_zero_std": [0.1, 0.9, 0.5, 1.0]}, set()),
    "constant samples": ({"rewards/a/std": [0.5, 0.4, 0.0, 0.0, 0.0]}, {"rewards/a/std"}),
    "a reward that was always constant": ({"rewards/a/std": [0.0] * 9}, set()),
    "a ratio that explodes": ({"rewards/rdm/log_ratio_max": [0.0, 0.1, 3.5]}, {"rewards/rdm/log_ratio_max"}),
    "a ratio that vanishes": ({"rewards/a/log_ratio_min": [0.0, -4.0]}, {"rewards/a/log_ratio_min"}),
    "ratios of the first update": ({"rewards/a/log_ratio_max": [0.0], "rewards/a/log_ratio_mean": [9.0]}, set()),
    "gradients out of range": ({"policy/grad_norm": [1.0] * 12 + [20.0, 30.0]}, {"policy/grad_norm"}),
    "one spike": ({"policy/grad_norm": [1.0] * 12 + [20.0]}, set()),
    "a short log": ({"fake_score/grad_norm": [1.0, 20.0, 30.0]}, set()),
}


@pytest.mark.parametrize("name", LOGS)
def test_what_a_log_shows(name: str) -> None:
    columns, shown = LOGS[name]
    count = max(map(len, columns.values()))
    rows = [{key: values[row] for key, values in columns.items() if row < len(values)} for row in range(count)]
    assert signs(rows).keys() == shown


def test_each_sign_is_said_once(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = quick_trainer(base, tmp_path, ["rdm"], **QUICK)
    for _ in range(6):
        trainer.log({"rewards/a/frac_zero_std": 1.0})
    (message,) = [record.message for record in caplog.records if "frac_zero_std" in record.message]
    assert "larger num_generations" in message


def test_every_sign_is_on_its_page() -> None:
    page = " ".join(cell for row in table_rows("when_training_goes_wrong.md") for cell in row)
    for sign in SIGNS:
        name = sign.metrics.replace("rewards/*", "rewards/<name>").replace("*", "policy").replace("m[ai][xn]", "max")
        assert f"`{name}`" in page, name
