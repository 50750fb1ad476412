"""The front door, tried at random: whatever people bring is trained on for two updates or refused in one line.

What runs by default is small and the same every time; ``make long`` goes on from there.
"""

import gzip
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rdm_rl import RDMConfig
from rdm_rl.cli.main import main
from rdm_rl.cli.train import TrainArguments
from rdm_rl.rewards.protocol import RewardError
from rdm_rl.trainers.inherited import HONOURED
from rdm_rl.trainers.prompt_files import KINDS, read_prompts
from tests.helpers import WITHOUT_RDM, declare, quick_trainer, trained_weights

pytestmark = pytest.mark.filterwarnings("default")  # A setting that a library calls deprecated is no fault.
ALWAYS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
COMMON = {"deadline": None, "database": None, "suppress_health_check": ALWAYS, "print_blob": False}


def twice(cases: int, long_cases: int, **drawn: Any) -> Callable[[Callable[..., None]], tuple[Any, Any]]:
    """A property as two tests: a few cases, the same every time, and many."""

    def tests(prove: Callable[..., None]) -> tuple[Any, Any]:
        few = settings(max_examples=cases, derandomize=True, phases=[Phase.generate], **COMMON)(given(**drawn)(prove))
        phases = [Phase.generate, Phase.shrink]
        return few, pytest.mark.long(settings(max_examples=long_cases, phases=phases, **COMMON)(given(**drawn)(prove)))

    return tests


# ----- settings -----

TINY = {
    "dataset": "prompts.txt",
    "use_cpu": True,
    "disable_tqdm": True,
    "max_steps": 2,
    "num_inference_steps": 2,
    "per_device_train_batch_size": 2,
    "num_generations": 2,
    "fake_score_updates_per_policy_update": 1,
    "fake_score_warmup_steps": 0,
    "warm_start_steps": 1,
    "warm_start_num_states": 2,
    "warm_start_ode_steps": 2,
    "teacher_num_inference_steps": 2,
    "lora_r": 2,
    "lora_target_modules": ["to_q"],
    "logging_steps": 1,
    "save_strategy": "no",
}
# What would go to the network or elsewhere, or says how long the run is.
LEFT_ALONE = {"output_dir", "model_name_or_path", "dataset", "max_steps", "use_cpu", "num_train_epochs", "report_to"}
LEFT_ALONE |= {"push_to_hub", "hub_model_id", "hub_token", "hub_revision", "hub_private_repo", "reward_decoder"}
HINTS = {**get_type_hints(TrainArguments), **get_type_hints(RDMConfig)}
OURS = {each.name for kind in (TrainArguments, RDMConfig) for each in fields(kind)}
NAMES = sorted((HONOURED | OURS) & HINTS.keys() - LEFT_ALONE)


def choices(hint: Any) -> list[Any]:
    """The names that a type allows, however deep in it."""
    if get_origin(hint) is Literal:
        return [*get_args(hint)]
    return [choice for part in get_args(hint) for choice in choices(part)]


NUMBERS = st.sampled_from([0, 1, 2, 3, -1, 0.0, 0.5, 1.0, 2.0, 1e-3, -0.5, float("nan"), float("inf")])
WORDS = st.sampled_from(["", "no", "off", "true", "None", "1", "2.0", "1e-3", "rdm", "ink", "~/x", "nowhere/file.txt"])
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(WORDS, SCALARS, max_size=2))


@st.composite
def some_settings(draw: Any) -> dict[str, Any]:
    """One to three settings with values that are often of the right kind, and often not."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    return {
        name: draw(st.one_of(VALUES, st.sampled_from(choices(HINTS[name]) or [True, 2, 0.5, "rdm"]))) for name in names
    }


def trains_or_explains(base: Path, capsys: pytest.CaptureFixture[str], drawn: dict[str, Any]) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "prompts.txt").write_text("a one\na two\n\na three\n", encoding="utf-8")
        run = {**TINY, "model_name_or_path": str(base), "output_dir": str(folder / "run"), **drawn}
        (folder / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
        capsys.readouterr()
        try:
            status: Any = main(["train", "--config", str(folder / "run.yaml")])
        except SystemExit as stopped:  # The parser has said what is wrong.
            status = stopped.code
        error = capsys.readouterr().err
        if status == 0:
            assert list((folder / "run").glob("**/*.safetensors")), drawn
        else:
            assert status == 2, (drawn, error)
            assert error.splitlines()[-1].startswith(("rdm-rl: ", "rdm-rl train: error: ")), (drawn, error)
            assert "Traceback" not in error


@twice(cases=12, long_cases=3000, drawn=some_settings())
def prove_settings(base: Path, capsys: pytest.CaptureFixture[str], drawn: dict[str, Any]) -> None:
    trains_or_explains(base, capsys, drawn)


test_settings, test_many_settings = prove_settings

# ----- prompt files -----

TEXT = st.text(st.sampled_from("ab ,;\t\"'\\{}[]:\n\r\u00e9\u4e2d\ufeff\x00#|.0"), max_size=40)
RECORDS = st.lists(
    st.dictionaries(st.sampled_from(["prompt", "caption", "n"]), st.one_of(TEXT, SCALARS), max_size=3), max_size=3
)
CONTENTS = st.one_of(
    TEXT,
    RECORDS.map(json.dumps),
    RECORDS.map(lambda rows: "\n".join(map(json.dumps, rows))),
    TEXT.map(lambda text: "prompt\n" + text),
    TEXT.map(lambda text: "prompt,n\n" + text),
)


@st.composite
def files(draw: Any) -> tuple[str, bytes]:
    """A file's name and what is in it."""
    suffix, text = draw(st.sampled_from(KINDS)), draw(CONTENTS)
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252"]))
    content = text.encode(encoding, errors="replace")
    content = content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content
    name = f"prompts{suffix.upper() if draw(st.booleans()) else suffix}"
    if draw(st.booleans()):
        return name + ".gz", gzip.compress(content)
    return name, content


@twice(cases=150, long_cases=20_000, drawn=files())
def prove_files(drawn: tuple[str, bytes]) -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder) / drawn[0]
        file.write_bytes(drawn[1])
        try:
            rows = read_prompts(file)
        except (ValueError, OSError) as error:
            assert drawn[0] in str(error)
            assert len(str(error).splitlines()) == 1
        else:
            assert rows
            assert all(isinstance(row["prompt"], str) and row["prompt"].strip() for row in rows)


test_prompt_files, test_many_prompt_files = prove_files

# ----- what rewards return -----

ANSWERS = st.sampled_from([None, 0.0, 1.5, -2, True, float("nan"), float("inf"), "good", [1.0], torch.tensor(0.5), 1j])
RETURNS = st.one_of(
    ANSWERS,
    st.lists(ANSWERS, max_size=6),
    st.lists(st.sampled_from([0.0, 1.0, None]), min_size=4, max_size=4),
    st.sampled_from([(4,), (4, 1), (1, 4), (3,), ()]).map(torch.ones),
    st.sampled_from([torch.float16, torch.int64, torch.bool, torch.complex64]).map(
        lambda kind: torch.ones(4, dtype=kind)
    ),
    st.just({"rewards": [1.0] * 4}),
)


@twice(
    cases=8,
    long_cases=400,
    returned=RETURNS,
    differentiable=st.booleans(),
    skip=st.booleans(),
    weight=st.sampled_from([1.0, 0.0, -1.0]),
)
def prove_returns(base: Path, returned: Any, differentiable: bool, skip: bool, weight: float) -> None:
    reward = declare(lambda images, prompts: returned, differentiable=differentiable, __name__="drawn")
    run = {**WITHOUT_RDM, "num_inference_steps": 2, "on_reward_error": "skip" if skip else "raise"}
    with TemporaryDirectory() as folder:
        trainer = quick_trainer(base, Path(folder), [reward], reward_weights=[weight], max_steps=2, **run)
        try:
            trainer.train()
        except (ValueError, RewardError) as error:
            assert "drawn" in str(error)
            assert len(str(error).splitlines()) == 1
        else:
            assert all(bool(weights.isfinite().all()) for weights in trained_weights(trainer).values())


test_returns, test_many_returns = prove_returns
