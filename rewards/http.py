"""Rewards from a server: images and prompts go out as JSON over HTTP, values come back."""

import base64
import io
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import requests
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rdm_rl.rewards.protocol import RewardInfo

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_SHOWN = 300  # characters of an answer that an error message shows
_PASSING = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


class RewardServerError(RuntimeError):
    """A server gave no usable values; the message says which, with what status, and how its answer begins."""


class BadAnswer(ValueError):
    """What is wrong with an answer. :class:`Connection` adds whose answer it was."""


@dataclass(frozen=True, kw_only=True)
class Connection:
    """How to talk to a server: every request is a POST of JSON, and so is every answer.

    Connection errors, time-outs and the statuses 408, 429 and 5xx are tried again after ``backoff``, twice that, four
    times that and so on, never more than ``max_wait``. A ``Retry-After`` of the server lengthens the wait up to
    ``max_wait``. Redirects are not followed, because a POST may turn into a GET and a token may end at another host.

    The retries are not urllib3's: those know no deadline, do not cover a connection that breaks within the answer, and
    cap ``Retry-After`` in recent versions only.

    Args:
        url: Where to post, ``http://`` or ``https://``. The usual proxy variables of the environment apply.
        headers: Further headers. ``${NAME}`` in a value stands for that environment variable, read at each call:
            ``{"Authorization": "Bearer ${REWARD_TOKEN}"}``. What was read is never logged, and is blotted out of error
            messages.
        timeout: Longest wait for the connection, and for the server to send anything, in seconds.
        retries: How often a request is tried again.
        backoff: Wait before the first retry, in seconds.
        max_wait: Longest wait before a retry, in seconds.
        concurrency: Requests that one call has in flight at the same time.
        deadline: Time for all requests of a call together, in seconds, retries included; None for no limit.

    Raises:
        ValueError: If an option is out of range, the address is none, or an environment variable is not set.

    Example:
        >>> Connection(url="localhost:8000")
        Traceback (most recent call last):
        ...
        ValueError: url='localhost:8000' is no address of a server. Write it like 'http://127.0.0.1:8000/rewards'.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout: float = 60.0
    retries: int = 3
    backoff: float = 1.0
    max_wait: float = 30.0
    concurrency: int = 4
    deadline: float | None = 600.0

    def __post_init__(self) -> None:
        """Check what can be checked without the server."""
        if "@" in re.split("[/?#]", self.url.partition("//")[2] or self.url)[0]:
            raise ValueError('url contains a user name or a password. Use headers={"Authorization": "... ${NAME}"}.')
        try:
            parts = urlsplit(self.url)
            complete = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is no number, half an IPv6 address
            complete = False
        if not complete:
            raise ValueError(
                f"url={self.url!r} is no address of a server. Write it like 'http://127.0.0.1:8000/rewards'."
            )
        for name, low in (("retries", 0), ("backoff", 0), ("max_wait", 0), ("concurrency", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} is too small: use at least {low}.")
        if self.timeout <= 0 or (self.deadline is not None and self.deadline <= 0):
            raise ValueError(f"timeout={self.timeout} and deadline={self.deadline} must be positive seconds.")
        self._resolved_headers()

    @property
    def shown_url(self) -> str:
        """The address without its query, which may hold a key."""
        return urlsplit(self.url)._replace(query="", fragment="").geturl()

    def exchange(self, count: int, request: Callable[[int], Any], read: Callable[[int, Any], Answer]) -> list[Answer]:
        """What the server answers to some requests.

        Args:
            count: How many requests.
            request: Makes the body of a request from its index; called in a worker thread, shortly before it is sent.
            read: Reads the answer to the request of an index; raises :class:`BadAnswer` for an unusable one.

        Returns:
            What ``read`` returned, in the order of the requests.

        Raises:
            RewardServerError: At the first request that fails for good, or at the deadline.
        """
        headers, secrets = self._resolved_headers()
        call = _Call(self, headers, secrets)
        waiting: SimpleQueue[int] = SimpleQueue()
        for index in range(count):
            waiting.put(index)
        outcomes: SimpleQueue[tuple[int, Answer] | BaseException] = SimpleQueue()

        def work() -> None:
            # A session is not promised to be thread-safe, so each worker has its own, which keeps its connection open.
            try:
                with requests.Session() as session:
                    while not call.over.is_set():
                        index = waiting.get_nowait()
                        body = json.dumps(request(index), allow_nan=False).encode()
                        outcomes.put((index, call.post(session, body, partial(read, index))))
            except Empty:
                return
            except BaseException as error:
                outcomes.put(error)  # raised below, in the caller's thread

        answers: dict[int, Answer] = {}
        try:
            for _ in range(min(self.concurrency, count)):
                # Daemons, unlike the threads of a pool: one that still waits for an answer holds up neither the caller
                # after a failure nor the end of the program. Its own time-out ends it.
                threading.Thread(target=work, name="reward-request", daemon=True).start()
            while len(answers) < count:
                outcome = outcomes.get(timeout=call.remaining())
                if isinstance(outcome, BaseException):
                    raise outcome
                answers[outcome[0]] = outcome[1]
        except Empty:
            raise call.deadline_error() from None
        finally:
            call.over.set()
        return [answers[index] for index in range(count)]

    def _resolved_headers(self) -> tuple[dict[str, str], list[str]]:
        """The headers with the environment's values filled in, and what messages must not show."""
        secrets = [query] if (query := urlsplit(self.url).query) else []

        def value_of(match: re.Match[str]) -> str:
            value = os.environ.get(match[1], "").strip()
            if not value:
                raise ValueError(f"headers ask for the environment variable {match[1]}, which is not set. Set it.")
            secrets.append(value)
            return value

        headers = {name: _VARIABLE.sub(value_of, value) for name, value in self.headers.items()}
        for name, value in headers.items():
            # requests would complain too, but with the value in its message.
            if not value.isascii() or not value.isprintable() or value != value.strip():
                raise ValueError(f"The header {name} has a character that cannot be sent, such as a line break.")
        return {"Content-Type": "application/json", "Accept": "application/json", **headers}, secrets


class _Call:
    """The requests of one call: they end together."""

    def __init__(self, connection: Connection, headers: Mapping[str, str], secrets: Sequence[str]) -> None:
        self.connection = connection
        self.headers = headers
        self.secrets = secrets
        self.over = threading.Event()
        self.end = None if connection.deadline is None else time.monotonic() + connection.deadline
        self.last_failure = ""
        # Without an `auth` of ours requests would replace our Authorization by what ~/.netrc has for the host.
        self.auth = (lambda request: request) if "authorization" in map(str.lower, headers) else None

    def remaining(self) -> float | None:
        """Seconds until the deadline, at least 0; None if there is none."""
        return None if self.end is None else max(self.end - time.monotonic(), 0.0)

    def post(self, session: requests.Session, body: bytes, read: Callable[[Any], Answer]) -> Answer:
        """The answer to one request, retried as the connection says."""
        connection = self.connection
        for attempt in range(connection.retries + 1):
            remaining = self.remaining()
            if remaining == 0:
                break
            cause: BaseException | None = None
            asked_wait = 0.0
            try:
                response = session.post(
                    connection.url,
                    data=body,
                    headers=self.headers,
                    auth=self.auth,
                    timeout=connection.timeout if remaining is None else min(connection.timeout, remaining),
                    allow_redirects=False,
                )
            except requests.RequestException as error:
                cause = _system_error(error)
                failure = f"{connection.shown_url} gave no answer ({type(cause).__name__}: {cause})."
                passing = isinstance(error, _PASSING)
            else:
                failure = f"{connection.shown_url} answered with status {response.status_code}"
                if 200 <= response.status_code < 300:
                    try:
                        return read(self._decoded(response))
                    except BadAnswer as error:
                        raise self._error(f"{failure}, but {error}. {self._beginning(response)}") from None
                if 300 <= response.status_code < 400:
                    failure += ", a redirect, which is not followed: set url to the final address"
                failure += f". {self._beginning(response)}"
                passing = response.status_code in (408, 429) or response.status_code >= 500
                asked_wait = _retry_after(response.headers.get("Retry-After"))
            if not passing:
                raise self._error(failure) from cause
            self.last_failure = failure
            if attempt == connection.retries:
                raise self._error(f"{failure} Tried {attempt + 1} times (retries={connection.retries}).") from cause
            delay = min(max(connection.backoff * 2.0 ** min(attempt, 60), asked_wait), connection.max_wait)
            remaining = self.remaining()
            if self.over.is_set() or (remaining is not None and delay >= remaining):
                break
            logger.warning("%s Trying again in %.1f s.", self._without_secrets(failure), delay)
            if self.over.wait(delay):
                break
        raise self.deadline_error()

    def deadline_error(self) -> RewardServerError:
        """That the time for all requests is over, and what went wrong last."""
        connection = self.connection
        last = f" The last failure: {self.last_failure}" if self.last_failure else ""
        return self._error(
            f"{connection.shown_url} did not answer all requests within deadline={connection.deadline} s. Raise the "
            f"deadline, or send less at a time.{last}"
        )

    def _decoded(self, response: requests.Response) -> Any:
        """The JSON of an answer."""
        try:
            return json.loads(response.content)
        except (ValueError, RecursionError):
            raise BadAnswer("the body is no JSON") from None

    def _beginning(self, response: requests.Response) -> str:
        """How the body of an answer begins."""
        # Secrets go before the text is cut, or the cut could leave a part of one.
        text = self._without_secrets(response.content.decode("utf-8", "replace"))
        return f"The body begins: {text[:_SHOWN]!r}." if text else "The body is empty."

    def _error(self, message: str) -> RewardServerError:
        return RewardServerError(self._without_secrets(message))

    def _without_secrets(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


def _system_error(error: BaseException) -> BaseException:
    """What happened below requests and urllib3, whose errors quote the whole address, and so a key in its query."""
    while type(error).__module__.partition(".")[0] in ("requests", "urllib3"):
        inner = error.__cause__ or error.__context__
        if inner is None:
            break
        error = inner
    return error


def _retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks for: a number or a date; 0 if it is absent or neither."""
    if value is None:
        return 0.0
    if value.strip().isdecimal():
        return float(value)
    try:
        return parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0


def finite_number(value: object, name: str) -> float:
    """A JSON value that must be a finite number.

    Args:
        value: The value.
        name: What it is, for the message.

    Returns:
        The number.

    Raises:
        BadAnswer: If it is anything else; booleans and texts are no numbers.

    Example:
        >>> finite_number(3, "score")
        3.0
    """
    # Python's reader lets NaN and Infinity through, and whole numbers beyond any float; this comparison does not.
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    raise BadAnswer(f"{name} is {str(value)[:_SHOWN]!r} ({type(value).__name__}) and no finite number")


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """Images as bytes, rounded to the nearest of 256 levels.

    Args:
        images: Images, shape (N, 3, H, W), in [0, 1]; values outside are clamped.

    Returns:
        The pixels, shape (N, H, W, 3), in 0 to 255, on the CPU.

    Raises:
        ValueError: If the shape is another one, or a value is NaN or infinite.

    Example:
        >>> to_pixels(torch.full((1, 3, 1, 1), 0.5)).tolist()
        [[[[128, 128, 128]]]]
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have the shape {tuple(images.shape)}; a reward takes (N, 3, H, W).")
    if not bool(images.isfinite().all()):
        raise ValueError(
            "images contain NaN or infinite values, which no pixel can show. The sampler that made them failed."
        )
    levels = images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    pixels: NDArray[np.uint8] = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pixels


def encode_png(pixels: NDArray[np.uint8]) -> str:
    """An image as the base64 text of a PNG file, without loss.

    Args:
        pixels: The image, shape (H, W, 3), in 0 to 255.

    Returns:
        The text, without line breaks.

    Example:
        >>> encode_png(np.zeros((1, 1, 3), np.uint8))[:11]
        'iVBORw0KGgo'
    """
    file = io.BytesIO()
    # Level 1: on smooth pictures the default takes up to four times as long, for files a fifth smaller.
    Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def wanted_columns(names: Sequence[str], columns: Mapping[str, Sequence[Any]], count: int) -> dict[str, Sequence[Any]]:
    """The columns that a reward reads, checked.

    Args:
        names: The columns that it reads.
        columns: The columns that it was given.
        count: The number of samples.

    Returns:
        The columns in ``names``.

    Raises:
        ValueError: If one is missing or has another length.

    Example:
        >>> wanted_columns(["text"], {"text": ["a"], "other": [1]}, 1)
        {'text': ['a']}
    """
    for name in names:
        if name not in columns:
            raise ValueError(
                f"The reward reads the column {name!r}, which the data set has not. Add it, or leave it out."
            )
        if len(columns[name]) != count:
            raise ValueError(f"The column {name!r} has {len(columns[name])} entries for {count} images.")
    return {name: columns[name] for name in names}


class HTTPReward:
    """The values that a server of your own computes, in whatever units it chooses.

    ``docs/reward_protocol.md`` describes the protocol, with an example server. The images are sent as PNG files, so the
    server gets them rounded to 256 levels. An answer that is not as the protocol says is an error, never a value.

    It holds no state between calls, so threads and processes may share it or copies of it.

    Args:
        url: Where to post.
        columns: Columns of the data set to send along. Their entries must be texts, numbers, booleans, None, or lists
            and dictionaries of those.
        batch_size: Images in a request.
        connection: Options of :class:`Connection`: ``headers`` (tokens come from the environment), ``timeout``,
            ``retries``, ``backoff``, ``max_wait``, ``concurrency``, ``deadline``.

    Raises:
        ValueError: If an option is out of range or names an environment variable that is not set.

    Example:
        >>> HTTPReward("http://127.0.0.1:8000/rewards", columns=["caption"], timeout=10).info.columns
        ('caption',)
    """

    name = "http"
    differentiable = False
    info: RewardInfo = RewardInfo(
        description="What a server of your own answers: plain JSON over HTTP.",
        units="the server's",
        expected_range="the server's",
    )

    def __init__(self, url: str, *, columns: Sequence[str] = (), batch_size: int = 8, **connection: Any) -> None:
        """Check the options; nothing is sent yet."""
        if isinstance(columns, str):
            raise ValueError(f"columns={columns!r} is one text. Write a list of names: [{columns!r}].")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is too small: use at least 1.")
        self.columns = self.required_columns = tuple(columns)
        self.batch_size = batch_size
        self.connection = Connection(url=url, **connection)
        self.info = replace(self.info, columns=self.columns)

    def __call__(self, images: Tensor, prompts: list[str], **columns: Any) -> list[float | None]:
        """The values of some images.

        Args:
            images: Images, shape (N, 3, H, W), in [0, 1].
            prompts: Their prompts, length N.
            columns: The data set's columns, each of length N; those in ``info.columns`` must be among them.

        Returns:
            One value for each image, finite; None where the server says that it does not apply.

        Raises:
            RewardServerError: If the server gives no usable values.
            ValueError: If the arguments do not fit together, or a column holds what JSON cannot.
        """
        count = len(prompts)
        pixels = to_pixels(images)
        if len(pixels) != count:
            raise ValueError(f"{len(pixels)} images for {count} prompts.")
        sent = {name: list(column) for name, column in wanted_columns(self.columns, columns, count).items()}
        for name, column in sent.items():
            try:
                json.dumps(column, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(f"The column {name!r} cannot be sent as JSON: {error}.") from error
        chunks = [slice(start, start + self.batch_size) for start in range(0, count, self.batch_size)]

        def request(index: int) -> dict[str, Any]:
            chunk = chunks[index]
            return {
                "prompts": list(prompts[chunk]),
                "images": [encode_png(one) for one in pixels[chunk]],
                "columns": {name: column[chunk] for name, column in sent.items()},
            }

        def read(index: int, answer: Any) -> list[float | None]:
            values = answer.get("rewards") if isinstance(answer, dict) else None
            expected = len(prompts[chunks[index]])
            if not isinstance(values, list):
                raise BadAnswer('it holds no list "rewards"')
            if len(values) != expected:
                raise BadAnswer(f'"rewards" has {len(values)} entries for {expected} images')
            return [None if value is None else finite_number(value, f"rewards[{i}]") for i, value in enumerate(values)]

        return [value for part in self.connection.exchange(len(chunks), request, read) for value in part]
