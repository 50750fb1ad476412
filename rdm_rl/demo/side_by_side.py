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


def side_by_side(pieces: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]]) -> dict[str, Any]:
    """What functions return for their arguments, each called in a process of its own.

    A user's own ``OMP_NUM_THREADS`` wins over the share of the cores. Progress bars get a line each.

    Args:
        pieces: The function and its arguments, by name; all of them, and what is returned, can be pickled.

    Raises:
        Exception: What the first function that fails raises; the others are ended.

    Example:
        >>> side_by_side({"two": (abs, (-2,)), "three": (abs, (-3,))})
        {'two': 2, 'three': 3}
    """
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(pieces))))
    others = {*multiprocessing.active_children()}
    with ExitStack() as stack:
        futures = {}
        for position, (name, (function, arguments)) in enumerate(pieces.items()):
            # A pool of one, as the worker takes the environment of the moment in which it starts.
            pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            stack.enter_context(pool)
            with _environment(OMP_NUM_THREADS=threads, TQDM_POSITION=str(position)):
                futures[name] = pool.submit(function, *arguments)
        done, waiting = wait(futures.values(), return_when=FIRST_EXCEPTION)
        if waiting:
            for process in {*multiprocessing.active_children()} - others:
                process.terminate()
        for future in done:
            future.result()
        return {name: future.result() for name, future in futures.items()}


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
