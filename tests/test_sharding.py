"""Networks cut over two processes train as whole ones do, and what they leave is whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor

from rdm_rl import RDMTrainer
from rdm_rl.networks import sharding
from rdm_rl.networks.offload import OffloadedNetwork
from rdm_rl.networks.sharding import blocks, check_sharding
from rdm_rl.student import load_student
from tests.helpers import one_rollout, same, tiny_trainer
from tests.processes_worker import SHARDED, results, sharded_case, state_of, two_processes
from tests.tiny_pipelines import align_weights

Whole = dict[str, tuple[RDMTrainer, dict[str, Any]]]


@pytest.fixture(scope="module")
def launched(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_processes(tmp_path_factory, base)


@pytest.fixture(scope="module")
def other(launched: Path) -> Path:
    """The same pipeline with another network, as a separate teacher."""
    return launched / "other"


@pytest.fixture(scope="module")
def folder(launched: Path) -> Path:
    """Where the sharded runs are."""
    return launched / "sharding"


@pytest.fixture(scope="module")
def whole(base: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Every run in one process, which accumulates two batches."""
    runs, folder = {}, tmp_path_factory.mktemp("whole")
    for name in SHARDED:
        trainer = sharded_case(name, str(base), str(other), folder / name, gradient_accumulation_steps=2)
        align_weights(*(trainer.networks.module(role) for role in ("policy", "teacher", "fake_score")))
        batch = next(trainer.prompt_batches(0))
        rollout = trainer.generate_rollout(batch)
        trainer.train()
        runs[name] = trainer, {**state_of(trainer), "rollout": rollout.x_0}
    return runs


@pytest.fixture(scope="module")
def cut(launched: Path) -> list[dict[str, Any]]:
    """Every run in two processes with sharded networks."""
    return results(launched, "sharding")


def differences(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one)


each = pytest.mark.parametrize("name", SHARDED)


@each
@pytest.mark.invariant
def test_sharded_networks_train_as_whole_ones_do(name: str, whole: Whole, cut: list[dict[str, Any]]) -> None:
    """The forward pass is the same bit for bit; gradients are summed in another order.

    Measured: 9e-7, for weights that move by 5e-4 in an update.
    """
    expected, got = whole[name][1], cut[0][name]
    assert torch.equal(expected["rollout"], got["rollout"])
    for kind in ("weights", "average"):
        assert differences(expected[kind], got[kind]) < 1e-5, kind


def test_sharded_networks_are_evaluated_together(whole: Whole, cut: list[dict[str, Any]]) -> None:
    expected = pytest.approx(whole["shared"][0].evaluate(), rel=1e-3)
    assert cut[0]["evaluation"] == cut[1]["evaluation"] == expected


@each
def test_processes_agree_and_each_holds_half_of_a_frozen_network(name: str, cut: list[dict[str, Any]]) -> None:
    """A little more where an adapter, which stays whole, is on it."""
    first, second = (process[name] for process in cut)
    for kind in ("weights", "average", "optimizers", "log", "pictures"):
        assert same(first[kind], second[kind]), kind
    assert all(0.49 < one["share"] < (0.51 if name == "full" else 0.7) for one in (first, second))


@each
def test_the_saved_student_is_the_average(
    name: str, base: Path, folder: Path, whole: Whole, cut: list[dict[str, Any]]
) -> None:
    student = load_student(folder / name, base)
    trainer = whole[name][0]
    assert cut[0][name]["kind"] == "UNet2DConditionModel"
    if name == "full":
        weights, average = student.pipeline.unet.state_dict(), cut[0][name]["average"]
        assert same({key: weights[key] for key in average}, average)
    pictures = student.draw(["a", "b"], generator=torch.Generator().manual_seed(1), output_type="pt")
    torch.testing.assert_close(pictures, cut[0][name]["pictures"], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        trainer.generate(["a", "b"], generator=torch.Generator().manual_seed(1)), pictures, atol=1e-4, rtol=0
    )


@each
def test_a_whole_policy_is_a_plain_network(name: str, whole: Whole, cut: list[dict[str, Any]]) -> None:
    """With its adapter merged, as families without a loader of adapters save it."""
    expected = whole[name][0].networks.whole_policy().state_dict()
    assert differences(expected, cut[0][name]["whole_policy"]) < 1e-5


def test_a_sharded_run_resumes_as_if_it_had_not_stopped(cut: list[dict[str, Any]]) -> None:
    for process in cut:
        for kind in ("weights", "average", "optimizers"):
            assert same(process["resumed"][kind], process["full"][kind]), kind


def test_checkpoints_fit_any_number_of_processes(
    base: Path, other: Path, folder: Path, tmp_path: Path, whole: Whole
) -> None:
    """What two processes with sharded networks saved goes on in one, whole."""
    expected = whole["full"][1]["weights"]
    alone = sharded_case("full", str(base), str(other), tmp_path, gradient_accumulation_steps=2)
    alone.train(folder / "full" / "checkpoint-1")
    assert differences(expected, state_of(alone)["weights"]) < 1e-5


def test_a_process_with_cached_teacher_images_waits_for_none(cut: list[dict[str, Any]]) -> None:
    """It got here, so it did not: the sharded teacher ran on both processes, though one had all images."""
    for process in cut:
        assert torch.equal(*process["teacher_images"])


def test_one_process_cannot_shard(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rdm_rl.trainers.rdm_trainer.load_networks", None)  # It is not reached.
    with pytest.raises(ValueError, match=r"shard=True spreads the networks .*only one.*torchrun"):
        tiny_trainer(base, tmp_path, shard=True)


def test_weights_that_autocast_casts_are_not_kept_if_they_are_sharded(base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path, bf16=True)
    for shard in (False, True):
        trainer.args.shard = shard
        with trainer.networks.autocast():
            assert torch.is_autocast_enabled("cpu")
            assert torch.is_autocast_cache_enabled() is not shard


def test_old_torch_cannot_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding.torch, "__version__", "2.6.0+cpu")
    with pytest.raises(RuntimeError, match=r"needs torch 2\.7 or newer; this is 2\.6\.0"):
        check_sharding(2)
    monkeypatch.setattr(sharding.torch, "__version__", "2.10.1")
    check_sharding(2)


def test_blocks_of_full_size_networks() -> None:
    """No block of SD1.5's UNet or of FLUX is so large that gathering it would undo the sharding."""
    with torch.device("meta"):
        networks = UNet2DConditionModel(cross_attention_dim=768), FluxTransformer2DModel()
    for network in networks:
        seen: set[Any] = set()
        sizes = []
        for block in [*blocks(network), network]:
            own = [one for one in block.parameters() if one not in seen]
            seen.update(own)
            sizes.append(sum(one.numel() for one in own))
        total = sum(one.numel() for one in network.parameters())
        assert sum(sizes) == total
        assert max(sizes) < total / 15
        assert sizes[-1] < total / 100  # What no block holds.


# ----- a teacher on the CPU -----


def test_an_offloaded_teacher_changes_nothing_and_leaves(base: Path, tmp_path: Path) -> None:
    settings = {"lora": False, "warm_start": "none", "num_inference_steps": 1}
    plain = tiny_trainer(base, tmp_path / "plain", **settings)
    offloaded = tiny_trainer(base, tmp_path / "offloaded", offload=["teacher"], **settings)
    align_weights(plain.networks.module("teacher"))  # What comes to the device is a copy.
    teacher = offloaded.networks.module("teacher")
    weights = next(teacher.parameters())
    waiting = weights.data_ptr()
    where = []
    for role in ("policy", "teacher"):
        offloaded.networks.module(role).register_forward_hook(lambda *_: where.append(weights.data_ptr() != waiting))
    direction = offloaded.compute_rewards(one_rollout(offloaded), 0)["rdm"].direction
    assert where[-1], "it came when it was asked"
    assert weights.data_ptr() != waiting
    offloaded.networks.release_teacher()
    assert weights.data_ptr() == waiting
    assert torch.equal(direction.values, plain.compute_rewards(one_rollout(plain), 0)["rdm"].direction.values)

    where.clear()
    for trainer in (plain, offloaded):
        trainer.train()
    assert weights.data_ptr() == waiting
    assert not where[-1], "it is away during the policy's update"
    assert any(where)
    assert same(plain.networks.state_dict("policy"), offloaded.networks.state_dict("policy"))


def test_a_trained_network_cannot_be_offloaded() -> None:
    with pytest.raises(ValueError, match="Only a frozen network"):
        OffloadedNetwork(torch.nn.Linear(1, 1), torch.device("cpu"))


def test_a_teacher_that_cannot_be_offloaded(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to move"):
        tiny_trainer(base, tmp_path, offload=["teacher"])
    with pytest.raises(ValueError, match="Leave one out"):
        tiny_trainer(base, tmp_path, lora=False, offload=["teacher"], shard=True)
