"""Calling a plain reward: what it may answer, what is a fault, and that a fault is never taken for a value."""

import asyncio
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rdm_rl import RDMTrainer
from rdm_rl.records import Direction, Experience, Judgement, LossOutput, Rollout
from rdm_rl.rewards.calling import PlainReward, RewardOutput, check_columns, needs, read_answer
from rdm_rl.rewards.model import RewardModel
from rdm_rl.rewards.protocol import RewardError
from rdm_rl.rewards.server import HTTPReward
from rdm_rl.trainers.checkpointing import read_checkpoint
from tests.helpers import (
    WITHOUT_RDM,
    StepAway,
    changed,
    declare,
    prompt_batch,
    quick_trainer,
    trained_weights,
)
from tests.reward_server import Reply, Request, serve

BOTH = pytest.mark.parametrize("kind", ["watched", "differentiable"])


def ask(
    function: Callable[..., Any],
    *,
    count: int = 4,
    per_group: int = 1,
    gradient: bool = False,
    columns: dict[str, list[Any]] | None = None,
    teacher_images: Tensor | None = None,
    inputs: Tensor | None = None,
    **settings: Any,
) -> RewardOutput:
    """What a reward makes of some images: image i is grey with the level i / 10, its prompt is "i"."""
    images = torch.arange(count).div(10).reshape(count, 1, 1, 1).expand(count, 3, 2, 2) if inputs is None else inputs
    batch = replace(
        prompt_batch(count, per_group=per_group), prompts=[str(index) for index in range(count)], columns=columns or {}
    )
    reward = PlainReward("own", function, **settings)
    return reward.start(images, batch, gradient=gradient, teacher_images=teacher_images)()


# ----- answers -----


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([1, 2.5, True], [1, 2.5, 1]),
        ((0.5, None, -1), [0.5, None, -1]),
        ([torch.tensor(1.5), None, torch.tensor(2, dtype=torch.int64)], [1.5, None, 2]),
        ([np.float64(0.25), np.int32(3), 0], [0.25, 3, 0]),
        (np.array([1.0, 2.0, 3.0]), [1, 2, 3]),
        (torch.tensor([1, 2, 3]), [1, 2, 3]),
        (torch.tensor([0.5, 1, 2], dtype=torch.float64), [0.5, 1, 2]),
        (torch.tensor([0.5, 1, 2], dtype=torch.bfloat16), [0.5, 1, 2]),
        ([None, None, None], [None, None, None]),
    ],
    ids=str,
)
def test_every_documented_answer_is_read(answer: Any, expected: list[float | None]) -> None:
    values = read_answer(answer, 3)
    assert values.dtype == torch.float32
    assert [None if value != value else value for value in values.tolist()] == expected


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ("0.5", TypeError, "returned str, not a list"),
        (b"12", TypeError, "returned bytes"),
        ({"a": 1.0, "b": 2.0}, TypeError, "returned dict"),
        ({1.0, 2.0}, TypeError, "returned set"),
        (None, TypeError, "returned NoneType"),
        (0.5, TypeError, "returned float"),
        ((value for value in (1.0, 2.0)), TypeError, "returned generator"),
        (["0.5", "0.7"], TypeError, "returned str '0.5' among its values"),
        ([1.0, [2.0]], TypeError, "returned list"),
        ([1j, 2j], TypeError, "returned complex"),
        ([torch.zeros(1), torch.zeros(1)], TypeError, "returned Tensor"),
        (torch.zeros(2, dtype=torch.complex64), TypeError, "complex numbers"),
        ([torch.tensor(1j), 1.0], TypeError, "complex numbers"),
        (torch.zeros(2, 1), ValueError, r"shape \(2, 1\) for 2 samples"),
        (torch.tensor(1.0), ValueError, r"shape \(\) for 2 samples"),
        (torch.zeros(3), ValueError, r"shape \(3,\)"),
        ([1.0], ValueError, "1 values for 2 samples"),
        ([], ValueError, "0 values for 2 samples"),
        (np.zeros((1, 2)), ValueError, r"shape \(1, 2\)"),
        (np.array(["a", "b"]), TypeError, "numpy.str_"),
    ],
    ids=lambda value: None if isinstance(value, Generator) else str(value),  # Its text is its address.
)
def test_what_is_no_answer_is_a_fault_of_all_samples(answer: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_answer(answer, 2)
    with pytest.raises(RewardError, match=rf"'own' failed on 2 sample\(s\).*{message}"):
        ask(lambda images, prompts: answer, count=2)
    output = ask(lambda images, prompts: answer, count=2, on_error="skip")
    assert (output.faults, output.applicable.tolist()) == (2, [False, False])


@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_complex_numbers_of_numpy_are_refused() -> None:
    with pytest.raises(TypeError):
        read_answer([np.complex64(1 + 2j)], 1)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("wrap", [list, torch.tensor, np.array, lambda values: [torch.tensor(one) for one in values]])
def test_what_is_not_finite_is_a_fault_of_that_sample(wrong: float, wrap: Callable[[list[float]], Any]) -> None:
    answer = wrap([0.25, wrong, 0.5, 0.75])
    with pytest.raises(
        RewardError, match=r"'own' failed on 1 sample\(s\) of the prompt\(s\) '1': ValueError: its valu"
    ):
        ask(lambda images, prompts: answer)
    output = ask(lambda images, prompts: answer, on_error="skip")
    assert output.faults == 1
    assert output.applicable.tolist() == [True, False, True, True]
    assert output.values[output.applicable].tolist() == [0.25, 0.5, 0.75]


def test_not_applicable_is_no_fault() -> None:
    output = ask(lambda images, prompts: [None, 1.0, None, 2.0])
    assert output.faults == 0
    assert output.applicable.tolist() == [False, True, False, True]
    assert output.gradient is None


# ----- gradients -----


def test_the_gradient_is_that_of_each_sample_where_it_applies() -> None:
    def reward(images: Tensor, prompts: list[str]) -> list[Tensor | None]:
        values = [(int(prompt) + 1) * image.square().sum() for image, prompt in zip(images, prompts, strict=True)]
        return [None if prompt == "2" else value for value, prompt in zip(values, prompts, strict=True)]

    images = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    output = ask(declare(reward, differentiable=True), gradient=True, inputs=images)
    factors = torch.tensor([1.0, 2.0, 0.0, 4.0]).view(4, 1, 1, 1)
    torch.testing.assert_close(output.gradient, 2 * factors * images)
    assert output.applicable.tolist() == [True, True, False, True]
    for batch_size in (1, 3):
        again = ask(reward, gradient=True, inputs=images, batch_size=batch_size)
        torch.testing.assert_close(again.gradient, output.gradient)
    assert not images.requires_grad


def test_a_sample_that_is_not_applicable_cannot_spoil_gradients() -> None:
    """sqrt has an infinite slope at 0, where sample 0 is: its own gradient is not looked at."""

    def reward(images: Tensor, prompts: list[str]) -> list[Tensor | None]:
        values = images.mean((1, 2, 3)).sqrt()
        return [None, *values[1:]]

    output = ask(declare(reward, differentiable=True), gradient=True)
    assert output.faults == 0
    assert not output.gradient[0].any()
    assert (output.gradient[1:] > 0).all()


def test_a_gradient_that_is_not_finite_is_a_fault() -> None:
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((1, 2, 3)).sqrt()  # Image 0 is black.

    declare(reward, differentiable=True)
    with pytest.raises(RewardError, match=r"1 sample\(s\) of the prompt\(s\) '0': ValueError: its gradient is NaN or"):
        ask(reward, gradient=True)
    output = ask(reward, gradient=True, on_error="skip")
    assert (output.faults, output.applicable.tolist()) == (1, [False, True, True, True])
    assert output.gradient.isfinite().all()
    assert not output.gradient[0].any()
    assert ask(reward).faults == 0  # Its value is fine.


@pytest.mark.parametrize("graph", [True, False], ids=["with graph", "without graph"])
def test_a_constant_has_no_gradient(graph: bool) -> None:
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((1, 2, 3)) * 0 + 1 if graph else torch.ones(len(images))

    output = ask(declare(reward, differentiable=True), gradient=True)
    assert torch.equal(output.values, torch.ones(4))
    assert torch.equal(output.gradient, torch.zeros(4, 3, 2, 2))


def without_graph(images: Tensor, prompts: list[str]) -> Tensor:
    return images.detach().mean((1, 2, 3))


def test_values_without_a_graph_are_no_gradients() -> None:
    with pytest.raises(RewardError, match="no graph to its inputs"):
        ask(declare(without_graph, differentiable=True), gradient=True)


def test_values_without_a_graph_are_no_gradients_in_batches_of_one() -> None:
    with pytest.raises(RewardError, match="no graph to its inputs"):
        ask(declare(without_graph, differentiable=True), gradient=True, batch_size=1)


def test_a_graph_to_weights_alone_is_no_gradient() -> None:
    network = nn.Linear(12, 1)

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        return network(images.detach().flatten(1)).squeeze(1)

    with pytest.raises(RewardError, match="no graph to its inputs"):
        ask(declare(reward, differentiable=True), gradient=True)


def test_no_gradient_reaches_the_rewards_weights() -> None:
    network = nn.Linear(12, 1)

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        return network(images.flatten(1)).squeeze(1)

    output = ask(declare(reward, differentiable=True), gradient=True)
    torch.testing.assert_close(output.gradient.flatten(1), network.weight.detach().expand(4, 12))
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not output.values.requires_grad


def test_only_who_is_asked_for_gradients_builds_a_graph() -> None:
    seen = []

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        seen.append((images.requires_grad, torch.is_grad_enabled()))
        return images.mean((1, 2, 3))

    declare(reward, differentiable=True)
    with torch.no_grad():
        ask(reward, gradient=True)
    with torch.enable_grad():
        ask(reward, gradient=False)
    assert seen == [(True, True), (False, False)]


# ----- what it is called with -----


def test_columns_go_to_those_who_name_them() -> None:
    columns = {"digit": [0, 1, 2, 3], "style": ["a", "b", "c", "d"]}
    seen: list[dict[str, Any]] = []

    def nothing(images: Tensor, prompts: list[str]) -> list[float]:
        seen.append({})
        return [0.0] * len(images)

    def one(images: Tensor, prompts: list[str], digit: list[int]) -> list[float]:
        seen.append({"digit": digit})
        return [0.0] * len(images)

    def optional(images: Tensor, prompts: list[str], *, style: Any = None, absent: Any = 5) -> list[float]:
        seen.append({"style": style, "absent": absent})
        return [0.0] * len(images)

    def everything(images: Tensor, prompts: list[str], **given: Any) -> list[float]:
        seen.append(given)
        return [0.0] * len(images)

    class WithState:
        def __call__(self, images: Tensor, prompts: list[str], style: list[str]) -> list[float]:
            seen.append({"style": style})
            return [0.0] * len(images)

    for reward in (nothing, one, optional, everything, WithState()):
        ask(reward, columns=columns, batch_size=3)
    assert seen[0::2] == [
        {},
        {"digit": [0, 1, 2]},
        {"style": ["a", "b", "c"], "absent": 5},
        {"digit": [0, 1, 2], "style": ["a", "b", "c"]},
        {"style": ["a", "b", "c"]},
    ]
    assert seen[3] == {"digit": [3]}


def test_columns_of_a_network_reward_are_those_of_its_method() -> None:
    class Own(RewardModel):
        def load(self) -> nn.Module:
            return nn.Identity()

        def rewards(self, network: nn.Module, images: Tensor, prompts: list[str], *, digit: list[int]) -> Tensor:
            return torch.tensor(digit, dtype=torch.float32)

    reward = Own("folder")
    assert needs(reward).required == {"digit"}
    assert ask(reward, columns={"digit": [3, 1, 4, 1], "other": [0] * 4}).values.tolist() == [3, 1, 4, 1]


def test_missing_columns_are_named() -> None:
    def reward(
        images: Tensor, prompts: list[str], digit: list[int], colour: list[str], size: int = 3
    ) -> list[float]: ...

    with pytest.raises(ValueError, match=r"'own' reads the column\(s\) colour, but .* has only prompt, digit"):
        check_columns("own", reward, ["digit"])
    check_columns("own", reward, ["digit", "colour"])
    with pytest.raises(TypeError, match=r"must take \(images, prompts"):
        needs(lambda images: [0.0])
    with pytest.raises(TypeError, match="'prompts' first, as a reward of TRL does"):
        needs(lambda prompts, completions, **columns: [0.0])
    with pytest.raises(ValueError, match="wants_teacher_images = True"):
        check_columns("own", lambda images, prompts, teacher_images: [0.0], [])
    with pytest.raises(ValueError, match="teacher_images mean something else"):
        check_columns("own", reward, ["digit", "colour", "teacher_images"])


@pytest.mark.parametrize("name", ["images", "prompts"])
def test_columns_cannot_have_the_names_of_the_arguments(name: str) -> None:
    """Otherwise a reward that takes every column fails at the first update: it gets two values for the argument."""
    with pytest.raises(ValueError, match=name):
        check_columns("own", lambda images, prompts, **columns: [0.0], [name])


def test_missing_columns_of_a_reward_that_names_them_elsewhere() -> None:
    with pytest.raises(ValueError, match="caption"):
        check_columns("http", HTTPReward("http://127.0.0.1:1/", columns=["caption"]), ["digit"])


@pytest.mark.parametrize(("batch_size", "expected"), [(None, [6]), (1, [1] * 6), (4, [4, 2]), (9, [6])])
def test_batches_are_as_large_as_allowed(batch_size: int | None, expected: list[int]) -> None:
    sizes: list[int] = []
    prompts_seen: list[str] = []

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        assert isinstance(prompts, list)
        assert images.shape == (len(prompts), 3, 2, 2)
        sizes.append(len(prompts))
        prompts_seen.extend(prompts)
        return images.mean((1, 2, 3))

    output = ask(reward, count=6, batch_size=batch_size)
    assert sizes == expected
    assert prompts_seen == list("012345")
    torch.testing.assert_close(output.values, torch.arange(6) / 10)


@pytest.mark.parametrize(("batch_size", "expected"), [(None, [6]), (1, [2, 2, 2]), (3, [2, 2, 2]), (5, [4, 2])])
def test_groups_stay_whole_if_asked(batch_size: int | None, expected: list[int]) -> None:
    groups: list[list[int]] = []

    def reward(images: Tensor, prompts: list[str], group_ids: list[int]) -> Tensor:
        groups.append(group_ids)
        return images.mean((1, 2, 3))

    ask(declare(reward, whole_groups=True), count=6, per_group=2, batch_size=batch_size)
    assert [len(one) for one in groups] == expected
    assert [one for call in groups for one in call] == [0, 0, 1, 1, 2, 2]


def test_a_reward_cannot_change_what_others_see() -> None:
    def reward(images: Tensor, prompts: list[str], digit: list[int]) -> list[float]:
        images.zero_()
        prompts.clear()
        digit.clear()
        return [1.0] * len(images)

    images, columns = torch.rand(4, 3, 2, 2), {"digit": [0, 1, 2, 3]}
    before = images.clone()
    ask(reward, inputs=images, columns=columns)
    assert torch.equal(images, before)
    assert columns == {"digit": [0, 1, 2, 3]}


def test_a_reward_cannot_change_the_teachers_images() -> None:
    def reward(images: Tensor, prompts: list[str], teacher_images: Tensor) -> list[float]:
        teacher_images.zero_()
        return [1.0] * len(images)

    teacher_images = torch.rand(4, 3, 2, 2)
    before = teacher_images.clone()
    ask(declare(reward, wants_teacher_images=True), teacher_images=teacher_images)
    assert torch.equal(teacher_images, before)


def test_unknown_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="use 'images' or 'latents'"):
        PlainReward("own", declare(lambda images, prompts: [0.0], inputs="pixels"))


# ----- time -----


def test_coroutines_of_all_batches_run_together() -> None:
    """Each waits until all have begun, and the last to begin answers first."""
    begun = 0
    everyone = asyncio.Event()

    async def reward(images: Tensor, prompts: list[str]) -> Tensor:
        nonlocal begun
        begun += 1
        if begun == 3:
            everyone.set()
        await asyncio.wait_for(everyone.wait(), 20)
        for _ in range(10 - 3 * int(prompts[0])):
            await asyncio.sleep(0)
        return images.mean((1, 2, 3))

    output = ask(reward, count=6, batch_size=2)
    torch.testing.assert_close(output.values, torch.arange(6) / 10)


def test_declared_limits_hold_for_local_rewards() -> None:
    in_flight, most, sizes = 0, 0, []

    async def reward(images: Tensor, prompts: list[str]) -> Tensor:
        nonlocal in_flight, most
        in_flight, most = in_flight + 1, max(most, in_flight + 1)
        sizes.append(len(prompts))
        await asyncio.sleep(0.01)
        in_flight -= 1
        return images.mean((1, 2, 3))

    declare(reward, batch_size=2, concurrency=3)
    torch.testing.assert_close(ask(reward, count=10).values, torch.arange(10) / 10)
    assert (most, sizes) == (3, [2] * 5)
    ask(reward, count=3, batch_size=1)
    assert sizes[5:] == [1] * 3


@pytest.mark.parametrize("asynchronous", [False, True])
def test_nothing_begins_after_a_failure_that_stops_the_run(asynchronous: bool) -> None:
    seen: list[str] = []

    def plain(images: Tensor, prompts: list[str]) -> Tensor:
        seen.extend(prompts)
        return images.mean((1, 2, 3)) if prompts[0] != "2" else 1 / 0

    async def coroutine(images: Tensor, prompts: list[str]) -> Tensor:
        values = plain(images, prompts)
        await asyncio.sleep(20 if prompts[0] == "1" else 0)
        return values

    declare(coroutine, concurrency=2)
    with pytest.raises(RewardError, match=r"1 sample\(s\) of the prompt\(s\) '2': ZeroDivisionError"):
        ask(coroutine if asynchronous else plain, count=6, batch_size=1)
    assert seen == ["0", "1", "2"]


def test_coroutines_may_share_a_limit_over_updates() -> None:
    """What belongs to an event loop, such as a lock or a client with open connections, is used again and again."""
    limit = asyncio.Semaphore(1)

    async def reward(images: Tensor, prompts: list[str]) -> Tensor:
        async with limit:
            await asyncio.sleep(0)
        return images.mean((1, 2, 3))

    own, images = PlainReward("own", reward, batch_size=1), torch.rand(4, 3, 2, 2)
    for _ in range(2):
        output = own.start(images, prompt_batch(4), gradient=False)()
        torch.testing.assert_close(output.values, images.mean((1, 2, 3)))


class Asynchronous:
    async def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        await asyncio.sleep(0)
        return images.square().sum((1, 2, 3))


def test_coroutines_may_have_gradients() -> None:
    output = ask(declare(Asynchronous(), differentiable=True), gradient=True, batch_size=3)
    expected = 2 * torch.arange(4).div(10).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    torch.testing.assert_close(output.gradient, expected)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_batches_that_have_answered_survive_one_that_hangs(asynchronous: bool) -> None:
    over = threading.Event()

    def plain(images: Tensor, prompts: list[str]) -> Tensor:
        if prompts[0] == "2":
            over.wait(20)
        return images.mean((1, 2, 3))

    async def coroutine(images: Tensor, prompts: list[str]) -> Tensor:
        while prompts[0] == "2" and not over.is_set():
            await asyncio.sleep(0.01)
        return images.mean((1, 2, 3))

    output = ask(coroutine if asynchronous else plain, count=6, batch_size=2, timeout=0.2, on_error="skip")
    over.set()
    # One after the other, the third batch never begins; together, it does.
    expected = [True, True, False, False, asynchronous, asynchronous]
    assert output.applicable.tolist() == expected
    assert output.faults == expected.count(False)


def test_one_coroutine_that_fails_leaves_the_others_alone() -> None:
    async def reward(images: Tensor, prompts: list[str]) -> Tensor:
        await asyncio.sleep(0)
        return images.mean((1, 2, 3)) if prompts[0] != "2" else 1 / 0

    output = ask(reward, count=6, batch_size=2, on_error="skip")
    assert output.applicable.tolist() == [True, True, False, False, True, True]


def test_the_caller_is_free_while_a_reward_works() -> None:
    told = threading.Event()

    def reward(images: Tensor, prompts: list[str]) -> list[float]:
        return [1.0 if told.wait(20) else 0.0] * len(images)

    wait = PlainReward("own", reward).start(torch.rand(2, 3, 2, 2), prompt_batch(2), gradient=False)
    told.set()
    assert wait().values.tolist() == [1.0, 1.0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_reward_that_exits_is_no_time_out(asynchronous: bool) -> None:
    def plain(images: Tensor, prompts: list[str]) -> Tensor:
        raise SystemExit(3)

    async def coroutine(images: Tensor, prompts: list[str]) -> Tensor:
        raise asyncio.CancelledError

    with pytest.raises(RewardError, match="RuntimeError: it ended without an answer"):
        ask(coroutine if asynchronous else plain, timeout=20)


def test_a_network_is_released_after_the_backward_pass() -> None:
    events = []

    class Own(RewardModel):
        def load(self) -> nn.Module:
            return nn.Linear(12, 1)

        def rewards(self, network: nn.Module, images: Tensor, prompts: list[str]) -> Tensor:
            values = network(images.flatten(1)).squeeze(1)
            if values.requires_grad:
                values.register_hook(lambda _: events.append("backward"))
            return values

        def release(self) -> None:
            events.append("release")

    ask(Own("folder"), gradient=True, batch_size=2)
    assert events == ["backward", "backward", "release"]


def test_errors_name_the_first_prompts_once() -> None:
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        raise OSError("no space left")

    with pytest.raises(RewardError) as caught:
        ask(reward, count=6, last_checkpoint=lambda: Path("run/checkpoint-9"))
    assert str(caught.value).startswith(
        "The reward 'own' failed on 6 sample(s) of the prompt(s) '0', '1', '2', '3', ..."
    )
    assert "OSError: no space left" in str(caught.value)
    assert "'run/checkpoint-9'" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


# ----- in a run -----

ROWS = [{"prompt": "good"}, {"prompt": "bad"}]


def raises(values: Tensor) -> Any:
    raise ZeroDivisionError("out of order")


# What is read as no answer, and what as no finite value, is above.
MISBEHAVIOURS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "raises": (raises, "ZeroDivisionError: out of order"),
    "wrong length": (lambda values: values[1:], r"shape \(1,\) for 2 samples"),
    "nan": (lambda values: values * torch.nan, "its value is NaN or infinite"),
}


@pytest.fixture
def hanging() -> Iterator[Callable[[Tensor], Any]]:
    """Hangs until the test is over."""
    over = threading.Event()
    yield lambda values: over.wait(60)
    over.set()


def moody(kind: str, misbehave: Callable[[Tensor], Any], healthy_calls: int = 0) -> Callable[..., Any]:
    """A reward that misbehaves on the prompt "bad" after so many calls; each call gets one prompt's two samples."""
    calls = 0

    def reward(images: Tensor, prompts: list[str]) -> Any:
        nonlocal calls
        calls += 1
        assert len(set(prompts)) == 1
        values = images.mean((1, 2, 3)) + 100
        return misbehave(values) if prompts[0] == "bad" and calls > healthy_calls else values

    return declare(reward, differentiable=kind == "differentiable", __name__="moody")


class Recorder(RDMTrainer):
    """Remembers the directions of every update, and what was made of them."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.seen: list[tuple[Rollout, dict[str, Judgement]]] = []
        self.combined: list[Direction] = []
        super().__init__(*arguments, **named)

    def compute_rewards(self, rollout: Rollout, step: int) -> dict[str, Judgement]:
        self.seen.append((rollout, super().compute_rewards(rollout, step)))
        return self.seen[-1][1]

    def compute_policy_loss(self, experience: Experience) -> LossOutput:
        self.combined.append(self.weighting.combine(experience.directions))
        return super().compute_policy_loss(experience)


def moody_trainer(base: Path, folder: Path, kind: str, reward: Callable[..., Any], **settings: Any) -> Any:
    return quick_trainer(
        base,
        folder,
        [StepAway(), reward],
        train_dataset=ROWS,
        kind=Recorder,
        reward_weights=[1.0, 0.0 if kind == "watched" else 2.0],
        **{**WITHOUT_RDM, "reward_weighting": "fixed", "reward_batch_size": 2, **settings},
    )


@BOTH
@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_a_fault_stops_the_run_and_names_the_last_checkpoint(name: str, kind: str, base: Path, tmp_path: Path) -> None:
    misbehave, reason = MISBEHAVIOURS[name]
    reward = moody(kind, misbehave, healthy_calls=2)
    trainer = moody_trainer(base, tmp_path, kind, reward, save_strategy="steps", save_steps=1)
    with pytest.raises(RewardError, match=reason) as caught:
        trainer.train()
    message, saved = str(caught.value), tmp_path / "checkpoint-1"
    assert "The reward 'moody' failed on 2 sample(s) of the prompt(s) 'bad': " in message
    assert f"The last checkpoint is {str(saved)!r}" in message
    # The update that failed has left no trace in the policy.
    assert trainer.state.global_step == 1
    assert not changed(read_checkpoint(saved)[0]["policy"], trainer.networks.state_dict("policy"))


@BOTH
def test_a_hanging_reward_stops_the_run(
    kind: str, hanging: Callable[[Tensor], Any], base: Path, tmp_path: Path
) -> None:
    reward = moody(kind, hanging, healthy_calls=2)
    settings = {"save_strategy": "steps", "save_steps": 1, "reward_timeout": 0.3}
    with pytest.raises(RewardError, match=r"'bad': TimeoutError: no answer within 0\.3 seconds") as caught:
        moody_trainer(base, tmp_path, kind, reward, **settings).train()
    assert str(tmp_path / "checkpoint-1") in str(caught.value)


@BOTH
def test_a_fault_before_the_first_checkpoint_says_so(kind: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="No checkpoint was written yet"):
        moody_trainer(base, tmp_path, kind, moody(kind, raises)).train()


def test_a_resumed_run_names_the_checkpoint_it_came_from(base: Path, tmp_path: Path) -> None:
    moody_trainer(base, tmp_path, "watched", moody("watched", raises, 99), save_strategy="steps", save_steps=2).train()
    trainer = moody_trainer(base, tmp_path, "watched", moody("watched", raises), max_steps=3)
    with pytest.raises(RewardError) as caught:
        trainer.train(resume_from_checkpoint=True)
    assert str(tmp_path / "checkpoint-2") in str(caught.value)


@BOTH
def test_a_mended_run_ends_as_if_nothing_had_happened(kind: str, base: Path, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "reward_weighting": "adaptive"}
    whole = moody_trainer(base, tmp_path / "whole", kind, moody(kind, raises, 99), **settings)
    whole.train()
    with pytest.raises(RewardError):
        moody_trainer(base, tmp_path / "broken", kind, moody(kind, raises, 2), **settings).train()
    mended = moody_trainer(base, tmp_path / "broken", kind, moody(kind, raises, 99), **settings)
    mended.train(resume_from_checkpoint=True)
    assert not changed(trained_weights(whole), trained_weights(mended))


def bad_gradient(values: Tensor) -> Tensor:
    """Finite values whose gradient is 0 times infinity."""
    return (values * 0).sqrt()


def check_that_skipped_samples_are_absent(trainer: Recorder, kind: str) -> None:
    """Absent from the log's mean, from the direction, and from what the policy is moved by; but counted."""
    trainer.train()
    assert trainer.state.global_step == 2
    for (rollout, directions), combined, row in zip(
        trainer.seen, trainer.combined, trainer.state.log_history, strict=True
    ):
        good = torch.tensor([prompt == "good" for prompt in rollout.batch.prompts])
        assert good.sum() == 2
        one, away = directions["moody"], directions["away"].direction
        assert torch.equal(~one.rewards.isnan(), good)
        assert row["rewards/moody/faults"] == 2
        assert row["rewards/moody/applicable"] == 0.5
        values = trainer.family.decode(rollout.sample).mean((1, 2, 3)) + 100
        assert row["rewards/moody/mean"] == pytest.approx(values[good].mean().item(), rel=1e-6)
        assert row["rewards/moody/std"] == pytest.approx(values[good].std(correction=0).item(), rel=0.1)
        assert row["rewards/away/applicable"] == 1
        assert torch.equal(combined.values[~good], away.values[~good])
        if kind == "differentiable":
            assert torch.equal(one.direction.applicable, good)
            assert not torch.equal(combined.values[good], away.values[good])
        else:
            assert not one.direction.applicable.any()
            assert torch.equal(combined.values, away.values)


@BOTH
@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_a_fault_that_is_skipped_is_counted_and_never_a_value(
    name: str, kind: str, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reward = moody(kind, MISBEHAVIOURS[name][0])
    with caplog.at_level("WARNING", logger="rdm_rl"):
        check_that_skipped_samples_are_absent(moody_trainer(base, tmp_path, kind, reward, on_reward_error="skip"), kind)
    warnings = [one.getMessage() for one in caplog.records if "'moody' failed on 2 sample(s)" in one.getMessage()]
    assert len(warnings) == 2
    assert all("'bad'" in one and "not applicable" in one for one in warnings)


@BOTH
def test_a_hang_that_is_skipped(kind: str, base: Path, tmp_path: Path) -> None:
    async def patient(images: Tensor, prompts: list[str]) -> Any:
        if prompts[0] == "bad":
            await asyncio.sleep(3)
        return images.mean((1, 2, 3)) + 100

    declare(patient, differentiable=kind == "differentiable", __name__="moody")
    settings = {"on_reward_error": "skip", "reward_timeout": 0.5}
    check_that_skipped_samples_are_absent(moody_trainer(base, tmp_path, kind, patient, **settings), kind)


def test_a_bad_gradient_stops_the_run(base: Path, tmp_path: Path) -> None:
    trainer = moody_trainer(base, tmp_path, "differentiable", moody("differentiable", bad_gradient))
    with pytest.raises(RewardError, match=r"'moody' failed on 2 sample\(s\).*'bad'.*its gradient is NaN or infinite"):
        trainer.train()


def test_a_bad_gradient_that_is_skipped(base: Path, tmp_path: Path) -> None:
    reward = moody("differentiable", bad_gradient)
    trainer = moody_trainer(base, tmp_path, "differentiable", reward, on_reward_error="skip")
    check_that_skipped_samples_are_absent(trainer, "differentiable")


def test_a_gradient_that_overflows_in_the_decoder_is_a_fault(base: Path, tmp_path: Path) -> None:
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        values = images.sum((1, 2, 3))
        return (values - values.detach()) * 3e38  # Finite at the images, but not at the latents.

    declare(reward, differentiable=True, __name__="steep")
    trainer = quick_trainer(base, tmp_path, reward, reward_weighting="fixed", **WITHOUT_RDM)
    trainer.rewards["steep"].context.decoder.decode = lambda x_0: 100 * x_0[:, :3]
    with pytest.raises(RewardError, match=r"'steep'.*overflows on the way through the decoder"):
        trainer.train()


def test_a_run_without_any_value_goes_on(base: Path, tmp_path: Path) -> None:
    """All samples of all updates fail: no mean is logged, and the policy is that of the other reward alone."""
    reward = declare(lambda images, prompts: 1 / 0, differentiable=True, __name__="broken")
    outcomes = []
    for index, (rewards, weights) in enumerate([([StepAway(), reward], [1.0, 2.0]), ([StepAway()], [1.0])]):
        trainer = quick_trainer(
            base, tmp_path / str(index), rewards, reward_weights=weights, on_reward_error="skip", **WITHOUT_RDM
        )
        trainer.train()
        outcomes.append(trained_weights(trainer))
        if index == 0:
            for row in trainer.state.log_history:
                assert (row["rewards/broken/faults"], row["rewards/broken/applicable"]) == (4, 0)
                assert "rewards/broken/mean" not in row
                assert row["rewards/broken/lambda"] == 0
    assert not changed(*outcomes)


def accumulating(base: Path, folder: Path, reward: Callable[..., Any], **settings: Any) -> RDMTrainer:
    """Two micro-batches in an update, each with the samples of one prompt."""
    return quick_trainer(
        base,
        folder,
        [StepAway(), reward],
        train_dataset=ROWS,
        reward_weights=[1.0, 0.0],
        max_steps=1,
        **{**WITHOUT_RDM, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **settings},
    )


def test_the_mean_is_over_those_who_have_a_value_in_any_micro_batch(base: Path, tmp_path: Path) -> None:
    def reward(images: Tensor, prompts: Sequence[str]) -> list[float | None]:
        return [None if prompt == "bad" else 0.75 for prompt in prompts]

    trainer = accumulating(base, tmp_path, declare(reward, __name__="picky"))
    trainer.train()
    assert trainer.state.log_history[0]["rewards/picky/applicable"] == 0.5
    assert trainer.state.log_history[0]["rewards/picky/mean"] == 0.75


def test_faults_of_all_micro_batches_are_counted(base: Path, tmp_path: Path) -> None:
    reward = declare(lambda images, prompts: 1 / 0, __name__="broken")
    trainer = accumulating(base, tmp_path, reward, on_reward_error="skip")
    trainer.train()
    assert trainer.state.log_history[0]["rewards/broken/faults"] == 4


# ----- over HTTP -----


def grades(request: Request) -> Reply:
    values = {"good": 0.25, "none": None}
    return Reply({"rewards": [values.get(prompt) for prompt in request.body["prompts"]]})


def http_trainer(base: Path, folder: Path, url: str, rows: list[dict[str, Any]], **settings: Any) -> RDMTrainer:
    reward = HTTPReward(url, columns=["digit"], retries=0, timeout=5)
    return quick_trainer(
        base,
        folder,
        [StepAway(), reward],
        train_dataset=rows,
        reward_weights=[1.0, 0.0],
        **{**WITHOUT_RDM, "reward_batch_size": 2, **settings},
    )


def test_a_server_is_watched(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "good", "digit": 3}, {"prompt": "none", "digit": 4}]
    with serve(grades) as server:
        trainer = http_trainer(base, tmp_path, server.url, rows)
        trainer.train()
    for row in trainer.state.log_history:
        assert (row["rewards/http/mean"], row["rewards/http/applicable"], row["rewards/http/faults"]) == (0.25, 0.5, 0)
    digits = {"good": 3, "none": 4}
    for request in server.requests:
        prompts = request.body["prompts"]
        assert request.body["columns"] == {"digit": [digits[prompt] for prompt in prompts]}
    assert len(server.requests) == 4


def test_a_server_that_fails_stops_the_run_or_is_skipped(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "good", "digit": 3}, {"prompt": "bad", "digit": 4}]

    def behave(request: Request) -> Reply:
        return Reply(b"broken", status=500) if "bad" in request.body["prompts"] else grades(request)

    with serve(behave) as server:
        with pytest.raises(
            RewardError, match=r"'http' failed on 2 sample\(s\) of the prompt\(s\) 'bad'.*500"
        ) as caught:
            http_trainer(base, tmp_path, server.url, rows).train()
        assert "No checkpoint was written yet" in str(caught.value)
        trainer = http_trainer(base, tmp_path, server.url, rows, on_reward_error="skip")
        trainer.train()
    for row in trainer.state.log_history:
        assert (row["rewards/http/mean"], row["rewards/http/applicable"], row["rewards/http/faults"]) == (0.25, 0.5, 2)


def test_a_server_that_hangs_is_cut_off_by_the_trainers_limit(base: Path, tmp_path: Path) -> None:
    with serve(lambda request: Reply({"rewards": [1.0, 1.0]}, pause=60)) as server:
        trainer = http_trainer(base, tmp_path, server.url, [{"prompt": "bad", "digit": 4}], reward_timeout=0.3)
        with pytest.raises(RewardError, match=r"'http' failed .*'bad': TimeoutError: no answer within 0\.3 seconds"):
            trainer.train()
