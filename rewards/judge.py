"""A vision-language model as a judge, behind an OpenAI-compatible server."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from string import Formatter
from typing import Any, Literal

from torch import Tensor

from rdm_rl.rewards.http import BadAnswer, Connection, encode_png, finite_number, to_pixels, wanted_columns
from rdm_rl.rewards.protocol import RewardInfo

ResponseFormat = Literal["json_object", "json_schema"]

INSTRUCTION = """\
Rate how well this image shows what the prompt asks for, and how well it is made.

Prompt: {prompt}

{low} means that it has nothing to do with the prompt or cannot be recognised, {high} that it shows everything the \
prompt asks for and has no visible flaw. """
NUMBER_ONLY = "Answer with one number from {low} to {high} and nothing else."
JSON_ONLY = 'Answer with a JSON object {{"score": x}}, where x is a number from {low} to {high}, and nothing else.'

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


class VLMJudge:
    """The rating that a vision-language model gives an image, rescaled to [0, 1].

    One request to ``chat/completions`` for each image, with the image as a PNG in a data address. vLLM, SGLang and the
    server of llama.cpp offer this interface, and so do hosted services; a model on your own machine is used in the same
    way, by starting one of these servers for it.

    A rating is a model's opinion: it changes with the model, the instruction and even their versions, and a policy
    trained on it learns what pleases the judge. An answer without a rating on the scale is an error, never a value.

    Args:
        url: Base address of the interface, for example ``http://127.0.0.1:8000/v1``.
        model: The server's name of the model.
        instruction: What to ask. ``{prompt}`` stands for the prompt, ``{low}`` and ``{high}`` for the scale, and any
            other name in braces for that column of the data set; braces of the text itself are doubled. None for a
            question about prompt and quality together (``INSTRUCTION``).
        scale: The lowest and the highest rating.
        response_format: How the rating is read. None takes the last number of the answer, see ``LAST_NUMBER``.
            ``"json_object"`` and ``"json_schema"`` make the server enforce JSON; the answer must then be an object with
            a number ``score``, and an instruction of your own must ask for that.
        temperature: Sampling temperature; 0 for the most probable answer. None leaves the choice to the server.
        max_tokens: Longest answer. Models that think aloud first need far more. None leaves the choice to the server.
        seed: Seed of the server's sampling, where it has one; None sends none.
        extra: Further fields of the request, for example ``{"max_completion_tokens": 2000}`` with ``max_tokens=None``.
        api_key_env: Environment variable with the key, sent as a bearer token if it is set when the reward is made.
            None sends none.
        connection: Options of :class:`rdm_rl.rewards.http.Connection`: ``headers``, ``timeout``, ``retries``,
            ``backoff``, ``max_wait``, ``concurrency``, ``deadline``.

    Raises:
        ValueError: If an option is out of range, or a name in the instruction is none.

    Example:
        >>> judge = VLMJudge(
        ...     "http://127.0.0.1:8000/v1",
        ...     "my-model",
        ...     instruction="Is {text} written in the image, without a mistake? Answer 0 for no or 1 for yes.",
        ...     scale=(0, 1),
        ... )
        >>> judge.info.columns
        ('text',)
        >>> judge.rating("I would say: 1.")
        1.0
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
        if response_format not in (None, "json_object", "json_schema"):
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
        self.required_columns = self._columns()
        self.info = replace(self.info, columns=self.required_columns)

    def __call__(self, images: Tensor, prompts: list[str], **columns: Any) -> list[float | None]:
        """The ratings of some images.

        Args:
            images: Images, shape (N, 3, H, W), in [0, 1]; the model gets them rounded to 256 levels.
            prompts: Their prompts, length N.
            columns: The data set's columns, each of length N; those that the instruction names must be among them.

        Returns:
            One rating for each image, in [0, 1]; None where a column that the instruction names is None.

        Raises:
            RewardServerError: If the server fails, or an answer holds no rating on the scale.
            ValueError: If the arguments do not fit together.
        """
        pixels = to_pixels(images)
        if len(pixels) != len(prompts):
            raise ValueError(f"{len(pixels)} images for {len(prompts)} prompts.")
        wanted = wanted_columns(self.info.columns, columns, len(prompts))
        asked = [i for i in range(len(prompts)) if all(column[i] is not None for column in wanted.values())]

        def request(index: int) -> dict[str, Any]:
            i = asked[index]
            row = {name: column[i] for name, column in wanted.items()}
            text = self.instruction.format(prompt=prompts[i], low=self.low, high=self.high, **row)
            image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encode_png(pixels[i])}"}}
            message = {"role": "user", "content": [image, {"type": "text", "text": text}]}
            return {"model": self.model, "messages": [message], **self._format(), **self.settings}

        ratings = self.connection.exchange(len(asked), request, lambda _, answer: self._read(answer))
        values: list[float | None] = [None] * len(prompts)
        for i, rating in zip(asked, ratings, strict=True):
            values[i] = rating
        return values

    def rating(self, answer: str) -> float:
        """The rating that an answer of the model holds.

        Args:
            answer: The text.

        Returns:
            The rating, rescaled to [0, 1].

        Raises:
            BadAnswer: If there is none, or it is not on the scale.
        """
        shown = f"the model's answer {answer[:200]!r}"
        if self.response_format:
            try:
                parsed = json.loads(answer)
            except (ValueError, RecursionError):
                raise BadAnswer(f"{shown} is no JSON") from None
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

    def _format(self) -> dict[str, Any]:
        """The field that asks for JSON, if any."""
        if self.response_format is None:
            return {}
        if self.response_format == "json_object":
            return {"response_format": {"type": "json_object"}}
        schema = {
            "type": "object",
            "properties": {"score": {"type": "number"}},
            "required": ["score"],
            "additionalProperties": False,
        }
        return {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "rating", "schema": schema, "strict": True},
            }
        }

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
