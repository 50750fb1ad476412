"""Where the time of updates goes: the passes of each role, the rewards, and the rest."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers.trainer_callback import TrainerCallback

if TYPE_CHECKING:
    from rdm_rl.trainers.rdm_trainer import RDMTrainer

REST = "everything else"


@dataclass
class Section:
    """What a part of the updates has cost.

    Args:
        seconds: Time spent in it, and in no section within it.
        calls: How often it was entered.
        samples: Samples that went through a network.
    """

    seconds: float = 0.0
    calls: int = 0
    samples: int = 0


@dataclass
class SectionClock:
    """Exclusive times of sections that nest: a section stands still while one within it runs.

    Args:
        synchronize: Waits for what a device has still to do; called where a section begins and ends.

    Example:
        >>> clock = SectionClock(lambda: None)
        >>> with clock.section("update"), clock.section("pass", samples=8):
        ...     pass
        >>> clock.sections["pass"].samples, clock.sections["update"].calls
        (8, 1)
    """

    synchronize: Callable[[], None]
    sections: dict[str, Section] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)
    _since: float = 0.0

    @contextmanager
    def section(self, name: str, samples: int = 0) -> Iterator[None]:
        """Time what happens in the context."""
        section = self.sections.setdefault(name, Section())
        section.calls += 1
        section.samples += samples
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        self.synchronize()
        now = time.perf_counter()
        if self._open:
            self.sections[self._open[-1]].seconds += now - self._since
        self._since = now


class ProfileCallback(TrainerCallback):
    """Times some updates, prints a table of where they went, and writes a trace of one more for chrome://tracing.

    The first update is left out, as it allocates. Timing waits for the device at every pass, so a GPU is slower while
    it lasts; what is trained stays the same.

    Args:
        trainer: Whose updates.
        updates: How many.
    """

    def __init__(self, trainer: "RDMTrainer", updates: int) -> None:
        """Wait for the second update."""
        self.trainer, self.updates = trainer, updates
        self.clock = SectionClock(torch.cuda.synchronize if trainer.device.type == "cuda" else lambda: None)
        self.begun = self.done = 0
        self._role = ""
        self._restore: list[Callable[[], None]] = []
        self._update = ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to time, or to trace."""
        self.begun += 1
        if self.begun == 2:
            self._watch()
        if 2 <= self.begun <= self.updates + 1:
            self._update.enter_context(self.clock.section(REST))
        elif self.begun == self.updates + 2:
            profile = torch.profiler.profile()
            file = Path(args.output_dir) / f"trace-{self.trainer.accelerator.process_index}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            self._update.callback(profile.export_chrome_trace, str(file))  # After it has ended.
            self._update.enter_context(profile)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End it, and report after the last timed update."""
        self._update.close()
        if 2 <= self.begun <= self.updates + 1:
            self.done += 1
            if self.done == self.updates:
                self._report()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report if the run was too short."""
        if 0 < self.done < self.updates:
            self._report()

    def _report(self) -> None:
        """Take the clocks away and print the table."""
        for restore in self._restore:
            restore()
        if self.trainer.accelerator.is_main_process:
            tqdm.write(self.table())

    def table(self) -> str:
        """The sections, the longest first, for each update."""
        total = sum(section.seconds for section in self.clock.sections.values())
        lines = [f"{'part of an update':38} {'ms':>9} {'share':>6} {'calls':>6} {'samples':>8}"]
        for name, section in sorted(self.clock.sections.items(), key=lambda item: -item[1].seconds):
            per_update = (section.seconds * 1000 / self.done, section.seconds / total)
            counts = (section.calls / self.done, section.samples / self.done)
            lines.append(f"{name:38} {per_update[0]:9.1f} {per_update[1]:6.1%} {counts[0]:6.4g} {counts[1]:8.4g}")
        lines.append(f"{f'an update (mean of {self.done})':38} {total * 1000 / self.done:9.1f}")
        return "\n".join(lines)

    def _watch(self) -> None:
        """Put clocks around passes, backward passes, optimisers, decoding and rewards."""
        trainer, section = self.trainer, self.clock.section

        def forward(call: Callable[..., Any]) -> Callable[..., Any]:
            def timed(network: Any, x_t: Any, *arguments: Any, **named: Any) -> Any:
                kind = "forward, for a gradient" if torch.is_grad_enabled() else "forward"
                with section(f"{self._role}: {kind}", len(x_t)):
                    return call(network, x_t, *arguments, **named)

            return timed

        def role(call: Callable[..., Any]) -> Callable[..., Any]:
            @contextmanager
            def noted(role: Any) -> Iterator[None]:
                before, self._role = self._role, role
                with call(role):
                    yield
                self._role = before

            return noted

        def as_section(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
            def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
                def timed(*arguments: Any, **named: Any) -> Any:
                    with section(name):
                        return call(*arguments, **named)

                return timed

            return wrap

        self._replace(trainer.family, "forward", forward)
        self._replace(trainer.family, "decode", as_section("decoding"))
        self._replace(trainer.networks, "role", role)
        for trained, optimizer in trainer.optimizers.items():
            self._replace(optimizer, "backward", as_section(f"{trained}: backward"))
            self._replace(optimizer, "step", as_section(f"{trained}: optimiser"))
        for name, reward in trainer.rewards.items():
            self._replace(reward, "judge", as_section(f"reward {name}"))

    def _replace(self, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Wrap a method of one object until the last update is done."""
        setattr(owner, name, wrap(getattr(owner, name)))
        self._restore.append(lambda: delattr(owner, name))
