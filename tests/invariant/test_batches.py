"""Configurations that must train identically, up to the order of float additions."""

from pathlib import Path

import pytest
import torch

from rdm_rl import RDMTrainer
from tests.helpers import tiny_trainer

pytestmark = pytest.mark.invariant


def trained(base: Path, folder: Path, **settings) -> RDMTrainer:
    rates = {"learning_rate": 3e-1, "fake_score_learning_rate": 1e-1, "lr_scheduler_type": "constant"}
    trainer = tiny_trainer(base, folder, warm_start="none", optim="sgd", **rates, **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize(("lora", "normalization"), [(True, "group"), (False, "sample")])
def test_accumulated_batches_equal_one_batch(lora: bool, normalization: str, base: Path, tmp_path: Path) -> None:
    settings = {
        "lora": lora,
        "dm_normalization": normalization,
        "max_steps": 2,
        "fake_score_warmup_steps": 0,
    }
    settings |= {"fake_score_updates_per_policy_update": 1}
    whole = trained(base, tmp_path / "whole", per_device_train_batch_size=8, **settings)
    parts = trained(base, tmp_path / "parts", per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings)
    start = tiny_trainer(base, tmp_path / "start", lora=lora)
    for role in ("policy", "fake_score"):
        states = [one.networks.state_dict(role).values() for one in (whole, parts, start)]
        one, two, before = (torch.cat([value.flatten() for value in state]) for state in states)
        moved = (one - before).abs().max()
        assert moved > 1e-4
        assert (one - two).abs().max() < 1e-3 * moved
    logs = [trainer.state.log_history[-1] for trainer in (whole, parts)]
    for name in ("policy/loss", "policy/grad_norm", "fake_score/loss", "fake_score/grad_norm", "rewards/rdm/mean"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-3)


def test_the_samples_themselves_are_the_same(base: Path, tmp_path: Path) -> None:
    whole = tiny_trainer(base, tmp_path, per_device_train_batch_size=8)
    parts = tiny_trainer(base, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    (one,) = [whole.generate_rollout(batch) for batch in whole.prompt_batches(3)]
    two = [parts.generate_rollout(batch) for batch in parts.prompt_batches(3)]
    assert list(one.batch.prompts) == [prompt for rollout in two for prompt in rollout.batch.prompts]
    assert one.batch.group_ids.tolist() == [group for rollout in two for group in rollout.batch.group_ids.tolist()]
    assert torch.equal(one.states[0], torch.cat([rollout.states[0] for rollout in two]))
    torch.testing.assert_close(one.sample, torch.cat([rollout.sample for rollout in two]), rtol=1e-4, atol=1e-4)
