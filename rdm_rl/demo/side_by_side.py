"""Independent work side by side: a process for each piece, with its share of the cores.

Small networks gain little from a second thread, and two threads that wait for each other lose much on a machine that
has other work too; processes of their own gain all and lose no more than their share.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import Any

Pieces = Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]]


@contextmanager
def side_by_side(count: int) -> Iterator[Callable[[Pieces], dict[str, Any]]]:
    """Processes that stay for a while, as what can be called with pieces of work, one for each process at most.

    A piece is a function and its arguments, by name; all of them, and what is returned, can be pickled. What is called
    waits for all pieces, and returns what they returned, by name; if one raises, it raises that, and the others are
    ended. The first processes get the first pieces, and have imported what those need when the next come. A user's own
    ``OMP_NUM_THREADS`` wins over the share of the cores. Progress bars get a line each.

    Args:
        count: How many processes.

    Example:
        >>> with side_by_side(2) as run:
        ...     run({"two": (abs, (-2,)), "three": (abs, (-3,))}), run({"four": (abs, (-4,))})
        ({'two': 2, 'three': 3}, {'four': 4})
    """
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    others = {*multiprocessing.active_children()}
    with ExitStack() as stack:
        pools = []
        for position in range(count):
            # Pools of one, as a worker takes the environment of the moment in which it starts.
            pools.append(stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))))
            with _environment(OMP_NUM_THREADS=threads, TQDM_POSITION=str(position)):
                pools[-1].submit(int)

        def run(pieces: Pieces) -> dict[str, Any]:
            free = iter(pools)
            futures = {name: next(free).submit(function, *given) for name, (function, given) in pieces.items()}
            done, waiting = wait(futures.values(), return_when=FIRST_EXCEPTION)
            if waiting:
                for process in {*multiprocessing.active_children()} - others:
                    process.terminate()
            for future in done:
                future.result()
            return {name: future.result() for name, future in futures.items()}

        yield run


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """The process's environment with some variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
