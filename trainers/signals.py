"""Signals that end a run in good order: the update is finished, a checkpoint is written, and the status says why."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

# A launcher that is ended itself (torchrun in a cluster's job) sends its processes a second signal at once.
SAME_SIGNAL_SECONDS = 5.0


class TrainingStopped(SystemExit):
    """A signal has ended the training. Uncaught, it ends the process with 128 + the signal's number: SIGTERM gives 143.

    Args:
        number: The signal.
        message: What was saved, and how to go on.
    """

    def __init__(self, number: int, message: str = "") -> None:
        """Set the status."""
        super().__init__(128 + number)
        self.number, self.message = number, message

    def __str__(self) -> str:
        """What was saved, and how to go on."""
        return self.message


class StopSignals:
    """Takes signals for the length of a context, in the main thread; elsewhere they keep their usual effect.

    The first one is noted, or before :meth:`begin_updates` ends the training with :class:`TrainingStopped`. A second
    one has its usual effect, and so has one that nobody heeded until the end of the context. What the process was
    started to ignore, as by ``nohup``, stays ignored.

    Args:
        names: The signals: ``SIGTERM``, say.
        speaks: Whether this process says that it has taken a signal.
    """

    def __init__(self, names: Sequence[str], *, speaks: bool = True) -> None:
        """Take none yet."""
        self.number = 0
        self._names, self._speaks = names, speaks
        self._before: dict[int, Any] = {}
        self._noted_at = 0.0
        self._waits = self._heeded = False

    def __enter__(self) -> "StopSignals":
        """Take the signals."""
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in self._names):
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: of a handler that is not Python's.
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the signals their usual effect back."""
        self._restore()
        if self.number and not self._heeded and error is None:
            os.kill(os.getpid(), self.number)

    def begin_updates(self) -> None:
        """From here on there is an update to be finished and a checkpoint to be written."""
        self._waits = True

    def heed(self) -> None:
        """The signal is acted on."""
        self._heeded = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._noted_at = number, time.monotonic()
            if not self._waits:
                self._heeded = True
                raise TrainingStopped(number)
            if self._speaks:  # Past Python's buffers, which may be in use.
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: finishing the update and saving. A second signal ends at once.\n".encode())
        elif "LOCAL_RANK" not in os.environ or time.monotonic() - self._noted_at > SAME_SIGNAL_SECONDS:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()
