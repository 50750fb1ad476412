"""Several adapters on one network, which PEFT takes for a mistake."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sharing_a_base() -> Iterator[None]:
    """Without PEFT's warning of a second adapter on one model: here roles share their base on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
        yield
