"""The averaged policy: a known sequence, and a context that leaves no trace."""

import pytest
import torch
from torch import nn

from rdm_rl.trainers.optimization import PolicyAverage


def test_average_of_a_known_sequence() -> None:
    """The decay after n earlier updates is (1 + n) / (10 + n), but at most the final one."""
    weight = nn.Parameter(torch.zeros(1))
    average = PolicyAverage({"weight": weight}, decay=0.3)
    expected = 0.0
    for update in range(20):
        weight.data.fill_(float(update))
        average.step()
        decay = min((1 + update) / (10 + update), 0.3) if update else 0.0
        expected = decay * expected + (1 - decay) * update
        assert average.tensors()["weight"].item() == pytest.approx(expected, rel=1e-5)
    assert average.updates == 20


def test_the_context_leaves_no_trace() -> None:
    weight = nn.Parameter(torch.zeros(3))
    average = PolicyAverage({"weight": weight}, decay=0.9)
    for value in (1.0, 2.0):
        weight.data.fill_(value)
        average.step()
    with pytest.raises(RuntimeError), average.applied():
        assert torch.equal(weight, average.tensors()["weight"])
        assert not torch.equal(weight, torch.full((3,), 2.0))
        raise RuntimeError
    assert torch.equal(weight, torch.full((3,), 2.0))


def test_a_loaded_average_goes_on_as_the_saved_one() -> None:
    weight = nn.Parameter(torch.zeros(2))
    one, two = (PolicyAverage({"weight": weight}, decay=0.9) for _ in range(2))
    for value in (1.0, 2.0, 3.0):
        weight.data.fill_(value)
        one.step()
    two.load({"weight": one.tensors()["weight"].clone()}, one.updates)
    weight.data.fill_(7.0)
    one.step()
    two.step()
    assert torch.equal(one.tensors()["weight"], two.tensors()["weight"])
