"""Rewards from servers: a model of your own behind plain JSON over HTTP, and a vision-language model as a judge.

Each call is one request. Which images go into it, how many requests are in flight, and what becomes of a failure is
:mod:`rdm_rl.rewards.calling`'s business, as for every reward.
"""

import asyncio
import base64
import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from functools import partial
from string import Formatter
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import httpx2
from PIL import Image
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt
from torch import Tensor

from rdm_rl.pixels import to_pil
from rdm_rl.rewards.protocol import RewardInfo

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
ResponseFormat = Literal["json_object", "json_schema"]

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_SHOWN = 300  # characters of an answer that an error message shows
_LARGEST_BODY = 4 * 2**20  # bytes: a million values, or the longest answer of a judge
_PIECE = 8  # so many characters of a secret in a row are not shown either
# One character of a text, plain or in an escape of JSON, Python, an address or HTML.
_CHARACTER = re.compile(
    r"(?:\\u([0-9a-f]{4})|(?:\\x|%)([0-9a-f]{2})|&#x([0-9a-f]{1,6});|&#(\d{1,7});|\\?(.))", re.IGNORECASE | re.DOTALL
)
_CLIENTS: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx2.AsyncClient] = WeakKeyDictionary()

INSTRUCTION = """\
Rate how well this image shows what the prompt asks for, and how well it is made.

Prompt: {prompt}

{low} means that it has nothing to do with the prompt or cannot be recognised, {high} that it shows everything the \
prompt asks for and has no visible flaw. """
NUMBER_ONLY = "Answer with one number from {low} to {high} and nothing else."
JSON_ONLY = 'Answer with a JSON object {{"score": x}}, where x is a number from {low} to {high}, and nothing else.'

# The field of a request that makes the server enforce JSON.
_SCHEMA = {"type": "object", "properties": {"score": {"type": "number"}}, "required": ["score"]}
_STRICT = {"name": "rating", "schema": {**_SCHEMA, "additionalProperties": False}, "strict": True}
_FORMATS: dict[ResponseFormat | None, dict[str, Any]] = {
    None: {},
    "json_object": {"response_format": {"type": "json_object"}},
    "json_schema": {"response_format": {"type": "json_schema", "json_schema": _STRICT}},
}

# The last number of a text. The end of the scale may follow it ("7/10", "7 out of 10"), which would otherwise be taken
# for the rating. No other digit may come after it: a text whose last digits are no plain number ("7,5", "0-10", "90%",
# "3rd", "0 to 10") has no last number, rather than an earlier one.
LAST_NUMBER = re.compile(
    r"""
    (?<![\w.+/\u2212\u2013-]) (?<!\d[,:]) (?<!\d\sto\s)      # not within a word, a range, a longer number
    ([+-]?\d+(?:\.\d+)?)                                       # the number
    (?:[\s*_]*(?:/|\b(?:out\s+)?of\b)[\s*_]*(\d+(?:\.\d+)?))?  # of how many; * and _ are bold face in Markdown
    (?![\w%]) \D* \Z
    """,
    re.VERBOSE,
)


class RewardServerError(RuntimeError):
    """A server gave no usable values; the message says which, with what status, and how its answer begins."""


class BadAnswer(ValueError):
    """What is wrong with an answer. :class:`Connection` adds whose answer it was."""


class _Passing(RewardServerError):
    """A failure that may pass, and how many seconds the server asks to wait."""

    wait = 0.0


@dataclass(frozen=True, kw_only=True)
class Connection:
    """How to talk to a server: every request is a POST of JSON, and so is every answer.

    Connection errors, time-outs and the statuses 408, 429 and 5xx are tried again after ``backoff``, twice that, four
    times that and so on, never more than ``max_wait``. A ``Retry-After`` of the server lengthens the wait up to
    ``max_wait``. Redirects are not followed, because a POST may turn into a GET and a token may end at another host. An
    answer must not be compressed, as the request says, and is read no further than 4 MiB.

    Args:
        url: Where to post, ``http://`` or ``https://``. The usual proxy variables of the environment apply.
        headers: Further headers. ``${NAME}`` in a value stands for that environment variable, read at each request:
            ``{"Authorization": "Bearer ${REWARD_TOKEN}"}``. What was read is never logged, and is blotted out of error
            messages, in any spelling and also in part; so is a value of 8 or more characters that stands here itself.
        timeout: Longest wait for the connection, and for the server to send anything, in seconds.
        retries: How often a request is tried again.
        backoff: Wait before the first retry, in seconds.
        max_wait: Longest wait before a retry, in seconds.
        concurrency: Requests in flight at the same time.
        deadline: Time for a request, its retries included, in seconds; None for no limit.

    Raises:
        ValueError: If an option is out of range, the address is none, or an environment variable is not set.
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
            raise ValueError(f"url={self.url!r} is no address of a server, such as 'http://host:8000/rewards'.")
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

    async def post(self, request: Callable[[], Any], read: Callable[[Any], Answer]) -> Answer:
        """What the server answers to a request.

        Args:
            request: Makes the request's body; called in a thread, because pictures take time to encode.
            read: Reads the answer; raises :class:`BadAnswer` for an unusable one.

        Raises:
            RewardServerError: If the request fails for good, or not all is done by the deadline.
        """
        headers, secrets = self._resolved_headers()
        last = ""

        def remember(state: RetryCallState) -> None:
            nonlocal last
            last = str(state.outcome and state.outcome.exception())
            logger.warning("%s Trying again in %.1f s.", last, state.upcoming_sleep)

        again = AsyncRetrying(
            stop=stop_after_attempt(self.retries + 1),
            retry=retry_if_exception_type(_Passing),
            wait=self._wait,
            before_sleep=remember,
            reraise=True,
        )
        try:
            async with asyncio.timeout(self.deadline):
                body = await asyncio.to_thread(lambda: json.dumps(request(), allow_nan=False).encode())
                return await again(self._post_once, body, headers, secrets, read)
        except _Passing as error:
            tried = f"Tried {self.retries + 1} times (retries={self.retries})."
            raise RewardServerError(f"{error} {tried}") from error.__cause__
        except TimeoutError:
            raise RewardServerError(
                f"{self.shown_url} did not answer within deadline={self.deadline} s. Raise the deadline, or send less "
                f"at a time.{last and f' The last failure: {last}'}"
            ) from None

    async def _post_once(
        self, body: bytes, headers: dict[str, str], secrets: Sequence[str], read: Callable[[Any], Answer]
    ) -> Answer:
        try:
            async with _client().stream(
                "POST", self.url, content=body, headers=headers, timeout=self.timeout
            ) as response:
                answer = await _read_body(response)
        except httpx2.RequestError as error:
            kind = _Passing if isinstance(error, httpx2.TransportError) else RewardServerError
            why = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise kind(_without(secrets, f"{self.shown_url} gave no answer ({why}).")) from error
        # Secrets go before the text is cut, or the cut could leave a part of one.
        text = _without(secrets, answer[: 100 * _SHOWN].decode("utf-8", "replace"))
        beginning = f"The body begins: {text[:_SHOWN]!r}." if text else "The body is empty."
        failure = f"{self.shown_url} answered with status {response.status_code}"
        if response.is_success:
            try:
                _check_body(answer, response.headers.get("Content-Encoding", "identity"))
                return read(_decoded(answer, "the body"))
            except BadAnswer as error:
                raise RewardServerError(_without(secrets, f"{failure}, but {error}. {beginning}")) from None
        if response.is_redirect:
            failure += ", a redirect, which is not followed: set url to the final address"
        failure = _without(secrets, f"{failure}. {beginning}")
        if response.status_code not in (408, 429) and response.status_code < 500:
            raise RewardServerError(failure)
        passing = _Passing(failure)
        passing.wait = retry_after(response.headers.get("Retry-After", ""))
        raise passing

    def _wait(self, state: RetryCallState) -> float:
        """Seconds before the next try."""
        error = state.outcome and state.outcome.exception()
        asked = error.wait if isinstance(error, _Passing) else 0.0
        return min(max(self.backoff * 2.0 ** min(state.attempt_number - 1, 60), asked), self.max_wait)

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
        secrets += [value for value in self.headers.values() if len(value) >= _PIECE and not _VARIABLE.search(value)]
        for name, value in headers.items():
            # The client would complain too, but with the value in its message.
            if not value.isascii() or not value.isprintable() or value != value.strip():
                raise ValueError(f"The header {name} has a character that cannot be sent, such as a line break.")
        plain = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        return {**plain, **headers}, secrets


def _client() -> httpx2.AsyncClient:
    """The client of the running event loop: its connections stay open from one request to the next."""
    loop = asyncio.get_running_loop()
    if loop not in _CLIENTS:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        _CLIENTS[loop] = httpx2.AsyncClient(limits=limits)
    return _CLIENTS[loop]


def _hide_queries(record: logging.LogRecord) -> bool:
    """The client logs whole addresses, and so a key in a query."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            value.copy_with(query=None) if isinstance(value, httpx2.URL) else value for value in record.args
        )
    return True


logging.getLogger("httpx2").addFilter(_hide_queries)


async def _read_body(response: httpx2.Response) -> bytes:
    """The bytes of an answer as they come, no more of them than one chunk beyond the largest."""
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > _LARGEST_BODY:
            break
    return bytes(body)


def _check_body(body: bytes, encoding: str) -> None:
    if len(body) > _LARGEST_BODY:
        raise BadAnswer(f"the body is longer than {_LARGEST_BODY} bytes")
    if encoding.lower() != "identity":  # A few bytes may stand for gigabytes.
        raise BadAnswer(f"the body is compressed ({encoding}), which the request did not accept")


def _without(secrets: Sequence[str], text: str) -> str:
    """A text without secrets, and without pieces of them, whatever case and escapes they are written in.

    Example:
        >>> _without(["sk-0123456789"], "SK-0123456789 and sk-012345... and %73k-0123456789")
        '*** and ***... and ***'
    """
    characters = [*_CHARACTER.finditer(text)]
    plain = "".join(_unescaped(match).lower()[:1] for match in characters)
    hidden = set[int]()
    for secret in map(str.lower, secrets):
        size = min(_PIECE, len(secret))
        pieces = {secret[start : start + size] for start in range(len(secret) - size + 1)}
        for start in range(len(plain) - size + 1):
            if plain[start : start + size] in pieces:
                hidden.update(range(start, start + size))
    shown = (
        match[0] if place not in hidden else "" if place - 1 in hidden else "***"
        for place, match in enumerate(characters)
    )
    return "".join(shown)


def _unescaped(character: re.Match[str]) -> str:
    *hexadecimal, decimal, plain = character.groups()
    if plain is not None:
        return str(plain)
    code = int(decimal) if decimal else int(next(filter(None, hexadecimal)), 16)
    return chr(code) if 0 < code < 0x110000 else "?"


def _decoded(text: str | bytes, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadAnswer(f"{name} is no JSON") from None


def retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for: a number or a date; 0 if it is neither."""
    try:
        return float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0


def finite_number(value: object, name: str) -> float:
    """A JSON value that must be a finite number, and what it is called.

    Raises:
        BadAnswer: If it is anything else; booleans and texts are no numbers.
    """
    # Python's reader lets NaN and Infinity through, and whole numbers beyond any float; this comparison does not.
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    raise BadAnswer(f"{name} is {str(value)[:_SHOWN]!r} ({type(value).__name__}) and no finite number")


def encode_png(picture: Image.Image) -> str:
    """A picture as the base64 text of a PNG file, without loss and without line breaks."""
    file = io.BytesIO()
    # Level 1: on smooth pictures the default takes up to four times as long, for files a fifth smaller.
    picture.save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


class HTTPReward:
    """The values that a server of your own computes, in whatever units it chooses.

    ``docs/reward_protocol.md`` describes the protocol, with an example server. The images are sent as PNG files, so the
    server gets them rounded to 256 levels. An answer that is not as the protocol says is an error, never a value.

    Args:
        url: Where to post.
        columns: Columns of the data set to send along. Their entries must be texts, numbers, booleans, None, or lists
            and dictionaries of those.
        batch_size: Most images in a request.
        connection: Options of :class:`Connection` but ``url``.

    Raises:
        ValueError: If an option is out of range or names an environment variable that is not set.
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
        self.required_columns = tuple(columns)
        self.connection = Connection(url=url, **connection)
        self.batch_size, self.concurrency = batch_size, self.connection.concurrency
        self.info = replace(self.info, columns=self.required_columns)

    async def __call__(self, images: Tensor, prompts: list[str], **columns: Any) -> list[float | None]:
        """What the server answers to one request about images of shape (N, 3, H, W): N values, or None.

        Raises:
            RewardServerError: If the server gives no usable values.
            ValueError: If an image is not finite, or a column holds what JSON cannot.
        """
        sent = {name: list(columns[name]) for name in self.required_columns}
        for name, column in sent.items():
            try:
                json.dumps(column, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(f"The column {name!r} cannot be sent as JSON: {error}.") from error

        def request() -> dict[str, Any]:
            return {"prompts": list(prompts), "images": list(map(encode_png, to_pil(images))), "columns": sent}

        return await self.connection.post(request, partial(_read_rewards, len(prompts)))


def _read_rewards(count: int, answer: Any) -> list[float | None]:
    values = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(values, list):
        raise BadAnswer('it holds no list "rewards"')
    if len(values) != count:
        raise BadAnswer(f'"rewards" has {len(values)} entries for {count} images')
    return [None if value is None else finite_number(value, f"rewards[{i}]") for i, value in enumerate(values)]


class VLMJudge:
    """The rating that a vision-language model gives an image, rescaled to [0, 1].

    One request to ``chat/completions`` for each image, with the image as a PNG in a data address. vLLM, SGLang and the
    server of llama.cpp offer this interface for models of your own, and so do hosted services.

    A rating is a model's opinion: a policy trained on it learns what pleases the judge. An answer without a rating on
    the scale is an error, never a value.

    Args:
        url: Base address of the interface, for example ``http://127.0.0.1:8000/v1``.
        model: The server's name of the model.
        instruction: What to ask. ``{prompt}`` stands for the prompt, ``{low}`` and ``{high}`` for the scale, and any
            other name in braces for that column of the data set; braces of the text itself are doubled. None for a
            question about prompt and quality together (``INSTRUCTION``).
        scale: The lowest and the highest rating.
        response_format: None takes the last number of the answer (``LAST_NUMBER``). ``"json_object"`` and
            ``"json_schema"`` make the server enforce JSON, an object with a number ``score``, which an instruction of
            your own must ask for.
        temperature: Sampling temperature; 0 for the most probable answer. None leaves the choice to the server.
        max_tokens: Longest answer. Models that think aloud first need far more. None leaves the choice to the server.
        seed: Seed of the server's sampling, where it has one; None sends none.
        extra: Further fields of the request, for example ``{"max_completion_tokens": 2000}`` with ``max_tokens=None``.
        api_key_env: Environment variable with the key, sent as a bearer token if it is set when the reward is made.
            None sends none.
        connection: Options of :class:`Connection` but ``url``.

    Raises:
        ValueError: If an option is out of range, or a name in the instruction is none.
    """

    name = "vlm_judge"
    differentiable = False
    info: RewardInfo = RewardInfo(
        description="The rating of a vision-language model behind an OpenAI-compatible server.",
        units="share of the scale",
        expected_range="0 to 1, by construction",
    )

    def __init__(
        self,
        url: str,
        model: str,
        *,
        instruction: str | None = None,
        scale: Sequence[float] = (0, 10),
        response_format: ResponseFormat | None = None,
        temperature: float | None = 0.0,
        max_tokens: int | None = 512,
        seed: int | None = None,
        extra: Mapping[str, Any] | None = None,
        api_key_env: str | None = "OPENAI_API_KEY",
        **connection: Any,
    ) -> None:
        """Check the options; nothing is sent yet."""
        if len(scale) != 2 or not float("-inf") < scale[0] < scale[1] < float("inf"):
            raise ValueError(f"scale={scale!r} is no scale. Write the lowest and the highest rating, such as (0, 10).")
        if response_format not in _FORMATS:
            raise ValueError(f"response_format={response_format!r}: use None, 'json_object' or 'json_schema'.")
        self.model = model
        self.instruction = instruction or INSTRUCTION + (JSON_ONLY if response_format else NUMBER_ONLY)
        self.low, self.high = scale
        self.response_format = response_format
        settings = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
        self.settings = {name: value for name, value in settings.items() if value is not None} | dict(extra or {})
        headers = dict(connection.pop("headers", None) or {})
        if api_key_env and os.environ.get(api_key_env) and "authorization" not in map(str.lower, headers):
            headers["Authorization"] = f"Bearer ${{{api_key_env}}}"
        self.connection = Connection(url=url.rstrip("/") + "/chat/completions", headers=headers, **connection)
        self.batch_size, self.concurrency = 1, self.connection.concurrency
        self.required_columns = self._columns()
        self.info = replace(self.info, columns=self.required_columns)

    async def __call__(self, images: Tensor, prompts: list[str], **columns: Any) -> list[float | None]:
        """The N ratings of images of shape (N, 3, H, W), in [0, 1]; None where a column of the instruction is None.

        Raises:
            RewardServerError: If the server fails, or an answer holds no rating on the scale.
            ValueError: If an image is not finite.
        """
        ratings: list[float | None] = []
        for index, (picture, prompt) in enumerate(zip(to_pil(images), prompts, strict=True)):
            row = {name: columns[name][index] for name in self.required_columns}
            applies = all(value is not None for value in row.values())
            request = partial(self._request, picture, prompt, row)
            ratings.append(await self.connection.post(request, self._read) if applies else None)
        return ratings

    def _request(self, picture: Image.Image, prompt: str, row: Mapping[str, Any]) -> dict[str, Any]:
        text = self.instruction.format(prompt=prompt, low=self.low, high=self.high, **row)
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encode_png(picture)}"}}
        message = {"role": "user", "content": [image, {"type": "text", "text": text}]}
        return {"model": self.model, "messages": [message], **_FORMATS[self.response_format], **self.settings}

    def rating(self, answer: str) -> float:
        """The rating that a text holds, rescaled to [0, 1].

        Raises:
            BadAnswer: If there is none, or it is not on the scale.
        """
        shown = f"the model's answer {answer[:200]!r}"
        if self.response_format:
            parsed = _decoded(answer, shown)
            if not isinstance(parsed, dict) or "score" not in parsed:
                raise BadAnswer(f'{shown} has no "score"')
            value = finite_number(parsed["score"], f'"score" in {shown}')
        else:
            match = LAST_NUMBER.search(answer)
            if match is None:
                raise BadAnswer(f"{shown} does not end with a number")
            if match[2] is not None and float(match[2]) != self.high:
                raise BadAnswer(f"{shown} is on another scale than {self.low} to {self.high}")
            value = float(match[1])
        if not self.low <= value <= self.high:
            raise BadAnswer(f"{shown} is outside the scale of {self.low} to {self.high}")
        return (value - self.low) / (self.high - self.low)

    def _read(self, answer: Any) -> float:
        """The rating in a chat completion."""
        try:
            choice = answer["choices"][0]
            content, reason = choice["message"]["content"], choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise BadAnswer("it is no chat completion") from None
        # The last number of an answer that was cut off is whatever the model was writing about.
        if reason == "length":
            raise BadAnswer(f"the model's answer {str(content)[:200]!r} was cut off: raise max_tokens")
        if not isinstance(content, str):
            raise BadAnswer(f"it holds no text (finish_reason {reason!r})")
        return self.rating(content)

    def _columns(self) -> tuple[str, ...]:
        """The columns that the instruction names, in the order of their first use."""
        try:
            names = [name for _, name, _, _ in Formatter().parse(self.instruction) if name is not None]
        except ValueError as error:
            raise ValueError(f"instruction has a brace without its partner ({error}). Double it: '{{{{'.") from error
        if odd := [name for name in names if not name.isidentifier()]:
            raise ValueError(
                f"instruction holds {{{odd[0]}}}, which is no name of a column. Double the braces of the text itself."
            )
        return tuple(name for name in dict.fromkeys(names) if name not in ("prompt", "low", "high"))
