"""The README and the pages in docs: their examples run, their links lead somewhere, and they describe what exists.

A python block runs in an empty folder, in the namespace of the blocks before it on the same page. A comment right
before a block, invisible in the rendered page, changes that:

    <!-- not run: reason -->                            the block is only compiled
    <!-- in tests: max_steps=200 => max_steps=2; ... -->  text that is replaced, to make a long example short
"""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import CodeType

import pytest

from rdm_rl.cli import main as cli
from rdm_rl.cli.reference import settings_tables, with_tables
from rdm_rl.evaluation.sampler_metrics import SamplerMetrics
from rdm_rl.rewards import registry
from rdm_rl.trainers.methods import METHODS
from tests.helpers import ROOT, table_rows, tiny_trainer

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMENT_BEFORE = re.compile(r"<!-- (not run|in tests): ((?:(?!-->).)*) -->\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A python block of a page, as it is to be run."""

    page: Path
    line: int
    code: str
    run: bool = True

    def compile(self) -> CodeType:
        return compile("\n" * self.line + self.code, str(self.page.relative_to(ROOT)), "exec")


@dataclass
class Page:
    """A page's text without its code, and its python blocks."""

    path: Path
    prose: str = ""
    blocks: list[Block] = field(default_factory=list)


def read(path: Path) -> Page:
    text, page = path.read_text(encoding="utf-8"), Page(path)
    for match in FENCE.finditer(text):
        if match[1] != "python":
            continue
        comment, code = COMMENT_BEFORE.search(text[: match.start()]), match[2]
        skipped = comment is not None and comment[1] == "not run"
        if comment is not None and not skipped:
            for change in comment[2].split(";"):
                old, new = (part.strip() for part in change.split("=>"))
                assert old in code, f"{path.name}: {old!r} is to be shortened in tests but is not in the block"
                code = code.replace(old, new)
        page.blocks.append(Block(path, text[: match.start()].count("\n") + 1, code, not skipped))
    page.prose = FENCE.sub("", text)
    return page


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def slugs(path: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ +(.+)$", read(path).prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def names_in_first_column(page: str) -> set[str]:
    return {name for cells in table_rows(page) for name in re.findall(r"`([^`]+)`", cells[0])}


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    namespace = {"__name__": "docs"}
    for block in read(path).blocks:
        code = block.compile()
        if block.run:
            exec(code, namespace)


def test_the_family_on_the_page_is_the_library_s() -> None:
    first = read(ROOT / "docs" / "add_a_family.md").blocks[0]
    assert first.code == (ROOT / "rdm_rl" / "families" / "pixart.py").read_text(encoding="utf-8")
    assert len(first.code.splitlines()) < 100


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_links_lead_somewhere(path: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", read(path).prose):
        if target.startswith(("https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and anchor not in slugs(file)):
            broken.append(target)
    assert not broken


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, queue = set(), [ROOT / "README.md"]
    while queue:
        path = queue.pop()
        if path in seen:
            continue
        seen.add(path)
        targets = re.findall(r"\]\(([^)\s#]+\.md)", read(path).prose)
        files = ((path.parent / target).resolve() for target in targets if not target.startswith("https://"))
        queue += [file for file in files if file in PAGES]
    assert set(PAGES) <= seen


def test_metrics_page_describes_exactly_what_a_run_logs(base: Path, tmp_path: Path) -> None:
    def box(images, prompts):
        return images.mean((1, 2, 3)).tolist()

    rewards = ["rdm", "ink", "box"]
    settings = {"pathwise_steps": "any", "num_iterations": 2, "num_replayed_steps": 2, "beta": 0.1, "max_steps": 4}
    settings |= {"first_step_anchor": 0.05, "reward_weighting": "fixed", "eval_strategy": "steps", "eval_steps": 4}
    settings |= {"teacher_num_inference_steps": 2, "eval_features": ["tests.tiny_rewards:COLOUR"]}
    trainer = tiny_trainer(base, tmp_path, given={"reward_funcs": ["rdm", "ink", box]}, **settings)
    trainer.train()
    logged = {key for entry in trainer.state.log_history for key in entry} - {"step", "phase_step"}
    logged = {key.replace("eval_colour", "eval_<features>") for key in logged}
    described = names_in_first_column("metrics.md")
    assert logged <= {name.replace("<name>", reward) for name in described for reward in rewards}
    # The other way round: a name that no run logs is a leftover. Evaluation numbers have no slash.
    for name in described:
        if "/" in name:
            assert {name.replace("<name>", reward) for reward in rewards} & logged, name


def test_metrics_page_describes_every_evaluation_number() -> None:
    assert {one.name for one in fields(SamplerMetrics)} - {"name", "kind"} <= names_in_first_column("metrics.md")


def test_the_tables_of_settings_are_those_of_their_declarations() -> None:
    page = ROOT / "docs" / "reference.md"
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == len(settings_tables())
    assert with_tables(text) == text  # `python -m rdm_rl.cli.reference docs/reference.md` writes them anew.


def test_reference_lists_every_command_and_flag() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    (commands,) = [action for action in cli._parser()._actions if isinstance(action.choices, dict)]
    words = {f"rdm-rl {name}" for name in commands.choices}
    words |= {
        option
        for command in commands.choices.values()
        for action in command._actions
        for option in action.option_strings
        if option not in ("-h", "--help")
    }
    assert not [word for word in sorted(words) if f"`{word}`" not in text]


def test_methods_are_described() -> None:
    for page in ("README.md", "docs/method.md", "docs/reference.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert not [name for name in METHODS if f"`{name}`" not in text], page
