"""The laboratory of benchmarks/lab: exact teachers, replicates side by side, and the arms' mathematics."""

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

LAB = Path(__file__).parents[1] / "benchmarks" / "lab"


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(LAB))
    return import_module("run")


@pytest.fixture
def problems(lab: ModuleType) -> ModuleType:
    return import_module("problems")


@pytest.mark.parametrize("name", ["mixture-2", "mixture-16", "digits"])
def test_the_exact_denoiser_is_tweedies_formula(problems: ModuleType, name: str) -> None:
    problem = problems.PROBLEMS[name]([3, 4])
    draw = torch.Generator().manual_seed(0)
    x_0 = problem.sample(5, draw).double()
    t = 0.1 + 0.8 * torch.rand(x_0.shape[:3], generator=draw).double()
    x_t = problems.SCHEDULE.perturb(x_0, torch.randn(x_0.shape, generator=draw), t).requires_grad_()
    alpha, sigma = (1 - t)[..., None], t[..., None]
    # log p_t, as it stands in a textbook, and its gradient by autograd.
    offsets = x_t[:, :, :, None] - alpha[..., None] * problem.centres[:, :, None].double()
    variance = (alpha * problem.std) ** 2 + sigma**2
    exponent = -offsets.square().sum(-1) / (2 * variance)
    dimensions = x_t.shape[-1]
    log_p = (problem.weights[:, :, None].double().log() + exponent).logsumexp(-1) - dimensions / 2 * variance[
        ..., 0
    ].log()
    (score,) = torch.autograd.grad(log_p.sum(), x_t)
    torch.testing.assert_close(
        problem.denoise(x_t.detach().float(), t.float()).double(),
        (x_t + sigma**2 * score) / alpha,
        rtol=1e-3,
        atol=1e-3,
    )


def test_samples_have_the_modes_shares(problems: ModuleType) -> None:
    problem = problems.gaussian_mixture([5], 16)
    samples = problem.sample(20_000, torch.Generator().manual_seed(0))
    assert (problems.mode_shares(samples, problem) - problem.weights).abs().max() < 0.02


def test_energy_distance_is_that_of_its_definition(problems: ModuleType) -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(6, 3, generator=draw), 1 + torch.randn(5, 3, generator=draw)

    def mean_distance(left: Tensor, right: Tensor, pairs: int) -> float:
        return float(sum((a - b).norm() for a in left for b in right) / pairs)

    within = mean_distance(second, second, 20)
    wanted = (2 * mean_distance(first, second, 30) - mean_distance(first, first, 30) - within) / within
    assert problems.energy_distance(first, second).item() == pytest.approx(wanted, rel=1e-4)


def test_replicates_side_by_side_learn_as_if_alone(lab: ModuleType) -> None:
    networks, replicates = import_module("networks"), import_module("replicates")
    draw = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(2, 3, 4, 5, generator=draw), torch.rand(2, 3, 4, generator=draw)
    together = networks.Networks([7, 8], 5, 3)
    alone = [networks.Networks([seed], 5, 3) for seed in (7, 8)]
    for update in range(3):
        for index, network in enumerate([together, *alone]):
            rows = slice(None) if index == 0 else slice(index - 1, index)
            optimizer = torch.optim.SGD(network.parameters(), 0.1)
            loss = (network(x_t[rows], t[rows]) - update).square().mean()
            replicates.minimise(loss, optimizer, 2 if index == 0 else 1)
    for index, network in enumerate(alone):
        for both, single in zip(together.parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(both[index : index + 1], single)


def test_the_group_residual_is_taken_off_as_far_as_it_is_no_accident(lab: ModuleType) -> None:
    arms = import_module("arms")
    x_0 = torch.zeros(4, 1, 1, 2)
    # Errors of (3, 0) +- (1, 0) in the first group, and of (0, 1) +- (0, 5) in the second.
    fake_x_0 = torch.tensor([[4.0, 0], [2.0, 0], [0, 6.0], [0, -4.0]]).view(1, 4, 1, 1, 2)
    group_ids = torch.tensor([0, 0, 1, 1])
    # Of two samples q = 1, |mean|^2 = 9: eight ninths of the mean go. In the second group q = 25 > 1: nothing does.
    wanted = fake_x_0 - torch.tensor([[8 / 3, 0], [8 / 3, 0], [0, 0], [0, 0]]).view(1, 4, 1, 1, 2)
    torch.testing.assert_close(arms.without_group_residual(x_0, fake_x_0, group_ids), wanted)


def test_a_projected_direction_has_no_part_along_the_residual(lab: ModuleType) -> None:
    arms = import_module("arms")
    x_0, fake_x_0 = torch.zeros(1, 1, 1, 2), torch.tensor([3.0, 4.0]).view(1, 1, 1, 1, 2)
    direction = torch.tensor([5.0, 0.0]).view(1, 1, 1, 1, 2)
    # <A, r> / <r, r> = 15 / 25.
    wanted = torch.tensor([5 - 9 / 5, -12 / 5]).view(1, 1, 1, 1, 2)
    torch.testing.assert_close(arms.projected(direction, x_0, fake_x_0), wanted)


def test_sgmd_pushes_by_the_gap_and_the_pull(lab: ModuleType) -> None:
    x_0, teacher, fake = (torch.tensor(values).view(1, 1, 1, 2) for values in ([0.0, 0.0], [1.0, 3.0], [1.0, 1.0]))
    # The gap (0, 2) over its scale 2, and a tenth of (1, 1) over the noise 0.5.
    push = import_module("arms").sgmd_push(x_0, teacher, fake, torch.tensor([0.5]), 0.1)
    torch.testing.assert_close(push.flatten(), torch.tensor([0.2, 1.2]))


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_goes_on_where_it_was_and_prints_its_table(
    lab: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], steps: int
) -> None:
    replicates = import_module("replicates")
    for name, value in {"PRETRAINING_UPDATES": 2, "FAKE_SCORE_WARM_UP": 1, "WARM_START_UPDATES": 2}.items():
        monkeypatch.setattr(replicates, name, value)
    monkeypatch.setattr(lab, "BUDGETS", (1, 1000))
    monkeypatch.setattr(
        lab, "marks_of", lambda arm, steps, long: {"start": 0, "budget 1": 1, "budget 1000": 2, "updates 1000": 2}
    )
    arms = ["dmd", "sgmd", "dmd, projection", "none, stratified", "dmd, R = 4", *(["dmd, anchor"] if steps > 1 else [])]
    arguments = ["run.py", "--output_dir", str(tmp_path), "--problems", "mixture-2", "--steps", str(steps)]
    monkeypatch.setattr("sys.argv", [*arguments, "--seeds", "1", "2", "--arms", *arms])
    lab.main()
    files = sorted(tmp_path.glob("*.json"))
    assert len(files) == len(arms)
    result = json.loads(files[0].read_text())
    assert [len(values) for values in result["results"]["budget 1000"].values()] == [2, 2, 2]
    written = [file.stat().st_mtime_ns for file in files]
    capsys.readouterr()
    lab.main()
    assert [file.stat().st_mtime_ns for file in files] == written
    assert f"### mixture-2, K = {steps}" in capsys.readouterr().out
