"""Many processes: the same run as one process, and a word where there are fewer than asked for."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from torch import Tensor

from rdm_rl import RDMConfig
from rdm_rl.trainers.checkpointing import checkpoint_damage, checkpoints
from rdm_rl.trainers.processes import check_processes, processes_asked_for, shared_failures
from tests.helpers import same
from tests.processes_worker import ROOT, gndmr, launch, results, state_of, two_processes

# Of the samples of one update, this is the number of the first micro-batch of one process alone.
OF_THE_FIRST_BATCH = {"fake_score/lag"}


def largest_difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def launched(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes, which train, and then train once more with a reward that fails on one of them."""
    return two_processes(tmp_path_factory, base)


@pytest.fixture(scope="module")
def two(launched: Path) -> tuple[list[dict[str, Any]], Path]:
    """What two processes end with, and where."""
    return results(launched, "processes"), launched / "processes"


@pytest.fixture(scope="module")
def one(launched: Path) -> dict[str, Any]:
    """What one process ends with that accumulates the gradients of two batches."""
    return torch.load(launched / "alone" / "0.pt", weights_only=False)


@pytest.mark.invariant
def test_one_process_and_two_train_the_same_weights(one: Any, two: Any) -> None:
    """Sums in another order are all that differs. Measured: 1e-7 for weights that move by 5e-4 in an update."""
    alone, (together, _) = one, two
    assert [process["world"] for process in together] == [2, 2]
    for name in ("weights", "average"):
        assert largest_difference(alone[name], together[0][name]) < 1e-5


def test_processes_agree_bit_for_bit(two: Any) -> None:
    first, second = two[0]
    for name in ("weights", "average", "optimizers", "log"):
        assert same(first[name], second[name]), name
    assert [process["main"] for process in (first, second)] == [True, False]


def test_processes_evaluate_together(one: Any, two: Any) -> None:
    alone, (first, second) = one["evaluation"], two[0]
    assert first["evaluation"] == second["evaluation"] == pytest.approx(alone, rel=1e-3)


def test_groups_are_whole_and_the_batch_is_the_same(one: Any, two: Any) -> None:
    alone, (first, second) = one, two[0]
    assert not set(first["group_ids"]) & set(second["group_ids"])
    for name in ("sample_ids", "group_ids"):
        assert first[name] + second[name] == alone[name]


def test_rewards_and_statistics_are_of_all_processes(one: Any, two: Any) -> None:
    alone, together = one["log"], two[0][0]["log"]
    assert len(alone) == len(together) == 3  # The fake score's warm-up, and two updates.
    for expected, got in zip(alone, together, strict=True):
        assert expected.keys() == got.keys()
        for name in expected.keys() - OF_THE_FIRST_BATCH:
            assert got[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name


def test_torchrun_gets_no_warning(two: Any) -> None:
    assert not [text for process in two[0] for text in process["warnings"] if "processes" in text]


def test_processes_wait_as_long_as_is_set(two: Any) -> None:
    """Where they meet first, all later runs of a process meet, too."""
    assert [process["timeout"] for process in two[0]] == [150.0, 150.0]


def test_one_process_saves(two: Any) -> None:
    folder = two[1] / "run"
    assert (folder / "pytorch_lora_weights.safetensors").is_file()
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize(
    "cut",
    [
        {"gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ],
    ids=["batches as before", "all at once", "smaller batches"],
)
def test_a_run_goes_on_in_one_process(cut: dict[str, int], base: Path, two: Any, tmp_path: Path) -> None:
    together, folder = two
    trainer = gndmr(str(base), tmp_path, **cut, save_strategy="no")
    trainer.train(folder / "run" / "checkpoint-1")
    got = state_of(trainer)
    for name in ("weights", "average"):
        assert largest_difference(got[name], together[0][name]) < 1e-5
    assert len(got["log"]) == 3


def test_a_run_goes_on_in_two_processes(one: Any, two: Any) -> None:
    first, second = (process["resumed"] for process in two[0])
    assert same(first, second)
    for name in ("weights", "average"):
        assert largest_difference(first[name], one[name]) < 1e-5


def test_but_not_with_another_number_of_samples(base: Path, two: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"samples of an update=8 .now 4., num_processes=2 .now 1.*set gradient_acc\w+=2"
    ):
        gndmr(str(base), tmp_path).train(two[1] / "run" / "checkpoint-1")


def test_all_leave_out_an_update_that_one_cannot_make(launched: Path) -> None:
    first, second = results(launched, "faults")
    assert first["skipped"] == second["skipped"] == [True, True, False]
    assert same(first["weights"], second["weights"])
    assert len(first["said"]) == 2
    assert "the direction of the reward 'left_right'" in first["said"][0]
    assert "its loss is nan" in first["said"][1]
    assert not second["said"], "one process speaks for all"


def test_all_save_and_end_on_a_signal_that_one_gets(launched: Path) -> None:
    first, second = results(launched, "signalled")
    assert first == second
    assert (first["status"], first["steps"]) == (143, 2)
    (saved,) = checkpoints(launched / "signalled" / "run")
    assert saved.name == "checkpoint-2"
    assert not checkpoint_damage(saved)


def test_a_failure_on_one_process_ends_the_others(launched: Path) -> None:
    errors = (launched / "errors.txt").read_text(encoding="utf-8")
    assert "The reward 'fragile' failed" in errors
    assert "the reward's server is gone" in errors
    assert "Process 1 of 2 failed: RewardError: The reward 'fragile' failed" in errors, "of the other one"
    seconds = (launched / "ended").stat().st_mtime - (launched / "failing").stat().st_mtime
    assert seconds < 200  # Waiting for a process that is gone takes 30 minutes.


@pytest.mark.parametrize(
    ("speak", "message"),
    [({0, 2}, "Process 1, 3 of 4 ended or hung"), ({0, 1, 2, 3}, "Another process ended or hung")],
    ids=["two are silent", "all wait"],
)
def test_those_that_waited_say_who_is_missing(
    speak: set[int], message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    store = torch.distributed.HashStore()
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: store)
    monkeypatch.setattr("rdm_rl.trainers.processes.SECONDS_TO_SPEAK", 0.2)

    def wait(rank: int) -> str:
        with pytest.raises(RuntimeError) as caught, shared_failures(rank, 4):
            raise RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1000ms")
        return str(caught.value)

    with ThreadPoolExecutor() as pool:
        assert all(text.startswith(message) for text in pool.map(wait, speak))
    assert capfd.readouterr().err.count(message) == len(speak), "even if the launcher ends them in the next moment"


@pytest.mark.long
def test_a_process_that_hangs_ends_the_run(base: Path, tmp_path: Path) -> None:
    """With its number, ``ddp_timeout`` after it stopped, and the launcher's 30 seconds."""
    status, errors = launch("hang", str(base), "", str(tmp_path))
    assert status != 0
    assert "Process 1 of 2 ended or hung, and left no word" in errors
    assert time.time() - (tmp_path / "hanging").stat().st_mtime < 10 + 30 + 30


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("--config_file two.yaml script.py --num_processes 7", 2),
        ("--cpu --num-processes=1 script.py --num_processes 7", 1),
        ("--cpu script.py", None),
        ("--config_file nowhere.yaml script.py", None),
    ],
)
def test_the_number_is_read_from_the_command_of_the_launching_process(
    words: str, asked: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two.yaml").write_text(
        "num_processes: 2\ndistributed_type: MULTI_CPU\nuse_cpu: true\n", encoding="utf-8"
    )
    command = ["python", "-m", "accelerate.commands.launch", *words.split()]
    launcher = SimpleNamespace(cmdline=lambda: command, cwd=lambda: str(tmp_path))
    monkeypatch.setattr(psutil.Process, "parent", lambda _: launcher)
    assert processes_asked_for() == asked
    if asked == 2:
        with pytest.warns(UserWarning, match=r"asked for 2 processes, but started 1.*torchrun --nproc_per_node 2"):
            check_processes(1)
    else:
        check_processes(1)  # Warnings are errors here.


def test_nothing_is_said_without_accelerate_launch() -> None:
    assert processes_asked_for() is None
    check_processes(1)  # Warnings are errors here.


def test_processes_that_would_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started, but 1 train together.*Set use_cpu=True"):
        check_processes(1)
    check_processes(2)


@pytest.mark.parametrize(
    ("variable", "name"),
    [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "accelerate's FSDP plugin")],
)
def test_foreign_sharding_is_refused(variable: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=f"asks for {name} .*cannot hold them.*shard=True"):
        RDMConfig(output_dir=str(tmp_path), use_cpu=True)


@pytest.mark.parametrize(
    ("name", "processes", "machines"), [("one_gpu", 1, 1), ("eight_gpus", 8, 1), ("two_nodes", 16, 2)]
)
def test_the_configurations_are_what_accelerate_takes(name: str, processes: int, machines: int) -> None:
    """As far as that can be seen without GPUs: accelerate accepts them, and would start processes on GPUs."""
    file = ROOT / "examples" / "accelerate_configs" / f"{name}.yaml"
    args = launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
    args, _, _ = _validate_launch_command(args)
    assert (args.num_processes, args.num_machines, args.multi_gpu) == (processes, machines, processes > 1)
    assert not args.use_fsdp
    assert not args.use_deepspeed
    assert name in file.read_text(encoding="utf-8").split("\ncompute_environment")[0]  # Its command is in its header.
