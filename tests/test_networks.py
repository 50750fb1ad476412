"""Three roles on one base: each is who it says it is, and gradients arrive where they should and nowhere else."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from rdm_rl.families import load_family
from rdm_rl.networks.added import add_adapters_to_weights
from rdm_rl.networks.roles import AdapterNetworks, Networks, SeparateNetworks
from rdm_rl.records import Conditioning
from tests.helpers import changed, latents, randomize, same, snapshot, tiny_sd

T = torch.tensor([1.0, 0.5])


def adapters(folder: Path, config: LoraConfig | None = None, seed: int = 0) -> AdapterNetworks:
    generator = torch.Generator().manual_seed(seed)
    return AdapterNetworks(load_family(tiny_sd(folder)), config or LoraConfig(r=4, lora_alpha=4), generator)


def separate(folder: Path) -> SeparateNetworks:
    return SeparateNetworks(load_family(tiny_sd(folder)))


@pytest.fixture(scope="module", params=[adapters, separate], ids=["lora", "full"])
def networks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Networks:
    """Policy and fake score with weights of their own, which no test changes."""
    made: Networks = request.param(tmp_path_factory.mktemp("networks"))
    randomize(made)
    return made


@pytest.fixture
def checkpointed(networks: Networks, tmp_path: Path) -> Networks:
    """Others with the same weights, which recompute their activations."""
    made = (adapters if isinstance(networks, AdapterNetworks) else separate)(tmp_path)
    randomize(made)
    made.enable_activation_checkpointing()
    return made


def conditioning(networks: Networks) -> Conditioning:
    return networks.family.encode(["the digit 3", "the digit 4"])


def ask(networks: Networks, role: str, seed: int = 1, **options: float) -> Tensor:
    return networks.predict(role, latents(2, 4, 8, 8, seed=seed), T, conditioning(networks), **options)


def gradients(networks: Networks, role: str) -> dict[str, Tensor]:
    """The gradients of a role, taken away from it."""
    found = {}
    for name, parameter in networks.named_parameters(role).items():
        if parameter.grad is not None:
            found[name], parameter.grad = parameter.grad.clone(), None
    return found


def test_teacher_is_the_untouched_base(networks: Networks, tmp_path: Path) -> None:
    untouched = load_family(tiny_sd(tmp_path / "again"))
    x_t = latents(2, 4, 8, 8, seed=1)
    expected = untouched.predict_x_0(untouched.network, x_t, T, untouched.encode(["the digit 3", "the digit 4"]))
    assert torch.equal(ask(networks, "teacher"), expected)
    for role in ("policy", "fake_score"):
        assert not torch.allclose(ask(networks, role), expected, atol=1e-3)
    assert not torch.allclose(ask(networks, "policy"), ask(networks, "fake_score"), atol=1e-3)
    assert torch.equal(ask(networks, "teacher"), expected)


@pytest.mark.parametrize("make", [adapters, separate])
@pytest.mark.invariant
def test_untrained_roles_equal_the_base(make: Callable[[Path], Networks], tmp_path: Path) -> None:
    made = make(tmp_path)
    for role in ("policy", "fake_score"):
        torch.testing.assert_close(ask(made, role), ask(made, "teacher"), rtol=0, atol=1e-5)


def test_adapters_start_different_and_reproducible(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    first, second, other = (adapters(tmp_path / str(index), seed=seed) for index, seed in enumerate((0, 0, 1)))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first.state_dict("policy"), second.state_dict("policy"))
    assert changed(first.state_dict("policy"), other.state_dict("policy"))
    policy, fake_score = (list(first.state_dict(role).values()) for role in ("policy", "fake_score"))
    assert any(not torch.equal(one, two) for one, two in zip(policy, fake_score, strict=True))


def test_parameters_are_split_between_the_roles(networks: Networks) -> None:
    policy, fake_score = (set(map(id, networks.parameters(role))) for role in ("policy", "fake_score"))
    assert policy
    assert len(policy) == len(fake_score)
    assert not policy & fake_score
    assert networks.parameters("teacher") == []
    assert all(parameter.requires_grad for role in ("policy", "fake_score") for parameter in networks.parameters(role))
    teacher = {id(one) for one in networks.module("teacher").parameters()} - policy - fake_score
    assert teacher
    frozen = [one for one in networks.module("teacher").parameters() if id(one) in teacher]
    assert not any(one.requires_grad for one in frozen)


def test_a_loss_reaches_its_own_role_only(networks: Networks) -> None:
    expected = {}
    for role, other in (("policy", "fake_score"), ("fake_score", "policy")):
        ask(networks, role).square().mean().backward()
        expected[role] = gradients(networks, role)
        assert expected[role].keys() == networks.named_parameters(role).keys()
        assert gradients(networks, other) == {}
        assert all(one.grad is None for one in networks.module("teacher").parameters())
    policy, fake_score = ask(networks, "policy"), ask(networks, "fake_score")
    (policy.square().mean() + fake_score.square().mean()).backward()
    for role in ("policy", "fake_score"):
        assert same(gradients(networks, role), expected[role])


def test_other_roles_between_forward_and_backward(networks: Networks) -> None:
    ask(networks, "policy").square().mean().backward()
    expected = gradients(networks, "policy")
    for between in ((), ("teacher",), ("fake_score",), ("teacher", "fake_score", "policy")):
        for leave_gradients_on in (False, True):
            x_0 = ask(networks, "policy")
            for role in between:
                with torch.set_grad_enabled(leave_gradients_on):
                    ask(networks, role, seed=2)
            x_0.square().mean().backward()
            assert same(gradients(networks, "policy"), expected), (between, leave_gradients_on)
            assert gradients(networks, "fake_score") == {}


def test_activation_checkpointing_gives_the_same_gradients(networks: Networks, checkpointed: Networks) -> None:
    ask(networks, "policy").square().mean().backward()
    expected = gradients(networks, "policy")
    runs: list[int] = []
    checkpointed.module("policy").down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: runs.append(1))
    for between, inside in (
        ((), "policy"),
        ((), None),
        (("teacher",), None),
        (("fake_score",), None),
        (("teacher", "fake_score"), "fake_score"),
        (("fake_score", "teacher"), "teacher"),
    ):
        x_0 = ask(checkpointed, "policy")
        for role in between:
            ask(checkpointed, role, seed=2)
        forward_runs = len(runs)
        with nullcontext() if inside is None else checkpointed.role(inside):
            x_0.square().mean().backward()
        assert len(runs) > forward_runs, "nothing was recomputed, so this test shows nothing"
        assert same(gradients(checkpointed, "policy"), expected), (between, inside)
        assert gradients(checkpointed, "fake_score") == {}


def test_activation_checkpointing_of_both_roles_at_once(networks: Networks, checkpointed: Networks) -> None:
    found = []
    for made in (networks, checkpointed):
        (ask(made, "policy") * ask(made, "fake_score")).mean().backward()
        found.append({role: gradients(made, role) for role in ("policy", "fake_score")})
    assert same(*found)


def test_adapters_that_are_added_to_the_weights_act_as_those_beside_them(tmp_path: Path) -> None:
    beside, inside = adapters(tmp_path), adapters(tmp_path)
    for networks in (beside, inside):
        randomize(networks)
    add_adapters_to_weights(inside.family.network)
    assert same({"teacher": ask(beside, "teacher")}, {"teacher": ask(inside, "teacher")})
    for role in ("policy", "fake_score"):
        seen = []
        for networks in (beside, inside):
            prediction = ask(networks, role)
            prediction.square().mean().backward()
            seen.append((prediction.detach(), gradients(networks, role)))
        torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            assert torch.equal(ask(inside, role), seen[1][0]), "a replay is what the rollout was"


def test_weights_in_half_precision_have_their_adapters_beside(tmp_path: Path) -> None:
    network = adapters(tmp_path).family.network
    layers = [layer for layer in network.modules() if hasattr(layer, "lora_A")]
    layers[0].base_layer.to(torch.bfloat16)
    add_adapters_to_weights(network)
    assert ["forward" in vars(layer) for layer in layers] == [False, *[True] * (len(layers) - 1)]


def test_roles_nest_and_survive_errors(networks: Networks) -> None:
    expected = {role: ask(networks, role) for role in ("policy", "teacher", "fake_score")}
    with networks.role("policy"), pytest.raises(RuntimeError), networks.role("fake_score"):
        raise RuntimeError
    with networks.role("fake_score"):
        for role, x_0 in expected.items():
            assert torch.equal(ask(networks, role), x_0)


def test_nothing_ever_changes_requires_grad(checkpointed: Networks) -> None:
    networks = checkpointed
    modules = [networks.module(role) for role in ("policy", "teacher", "fake_score")]
    before = [[one.requires_grad for one in module.parameters()] for module in modules]
    with networks.role("fake_score"), networks.role("teacher"):
        ask(networks, "policy").mean().backward()
        ask(networks, "teacher", guidance_scale=3.0)
    gradients(networks, "policy")
    assert [[one.requires_grad for one in module.parameters()] for module in modules] == before


def test_unknown_role_is_refused(networks: Networks) -> None:
    with pytest.raises(ValueError, match="role 'student' is unknown; use one of policy, teacher, fake_score"):
        ask(networks, "student")


def test_weights_travel_and_what_does_not_fit_is_refused(networks: Networks, tmp_path: Path) -> None:
    lora = isinstance(networks, AdapterNetworks)
    other = (adapters if lora else separate)(tmp_path / "other")
    before = snapshot(other.module("teacher"))
    for role in ("policy", "fake_score"):
        other.load_state_dict(role, networks.state_dict(role))
        assert same(other.state_dict(role), networks.state_dict(role))
        assert torch.equal(ask(other, role), ask(networks, role))
    base = {name for name in before if "lora_" not in name}
    assert not base & changed(before, snapshot(other.module("teacher")))

    state = networks.state_dict("policy")
    name = sorted(state)[0]
    with pytest.raises(ValueError, match="1 weights differ in name or shape"):
        other.load_state_dict("policy", {**state, name: state[name][:1]})
    with pytest.raises(ValueError, match="Use the same model, peft_config and policy_init"):
        other.load_state_dict("policy", {key: value for key, value in state.items() if key != name})


def test_targets_of_the_user_win(tmp_path: Path) -> None:
    made = adapters(tmp_path, LoraConfig(r=2, target_modules=["to_q"]))
    assert all(".to_q." in name for name in made.named_parameters("policy"))
    everywhere = adapters(tmp_path / "default")
    assert {"conv_in", "conv_out"} <= {name.split(".")[0] for name in everywhere.named_parameters("policy")}


@pytest.mark.parametrize("targets", [["0"], ["nowhere"], "attentions"])
def test_targets_that_cannot_have_adapters_are_named_in_one_line(targets: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"target_modules \(\w+\) cannot all have adapters") as raised:
        adapters(tmp_path, LoraConfig(r=2, target_modules=targets))
    assert "\n" not in str(raised.value)


def test_a_separate_teacher_is_asked(tmp_path: Path) -> None:
    family, teacher = load_family(tiny_sd(tmp_path / "a")), load_family(tiny_sd(tmp_path / "b", "v_prediction", seed=1))
    made = AdapterNetworks(family, LoraConfig(r=2), torch.Generator(), teacher_family=teacher)
    x_t, prompts = latents(2, 4, 8, 8, seed=1), conditioning(made)
    assert torch.equal(ask(made, "teacher"), teacher.predict_x_0(teacher.network, x_t, T, prompts))
    torch.testing.assert_close(ask(made, "policy"), family.predict_x_0(family.network, x_t, T, prompts))


def test_what_would_change_the_base_is_refused(tmp_path: Path) -> None:
    pipeline = tiny_sd(tmp_path)
    for settings, message in (
        ({"lora_dropout": 0.1}, "Set lora_dropout=0"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"modules_to_save": ["conv_out"]}, "modules_to_save=.'conv_out'"),
        ({"bias": "all"}, "bias='all'"),
    ):
        with pytest.raises(ValueError, match=message):
            AdapterNetworks(load_family(pipeline), LoraConfig(r=2, **settings), torch.Generator())
    AdapterNetworks(load_family(pipeline), LoraConfig(r=2), torch.Generator())
    with pytest.raises(ValueError, match="already has adapters"):
        load_family(pipeline)
