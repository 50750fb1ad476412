"""A vision-language judge, against a server that speaks the chat completions protocol."""

import base64
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rdm_rl.rewards.http import BadAnswer, RewardServerError
from rdm_rl.rewards.judge import VLMJudge
from tests.reward_server import Reply, Request, RewardServer, serve


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def completion(content: Any, finish_reason: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}]}


def saying(content: Any, **more: Any) -> Callable[[Request], Reply]:
    return lambda request: Reply(completion(content, **more))


def parts(request: Request) -> tuple[str, str]:
    """The address of the image and the text of a request."""
    (message,) = request.body["messages"]
    image, text = message["content"]
    assert (message["role"], image["type"], text["type"]) == ("user", "image_url", "text")
    return image["image_url"]["url"], text["text"]


def judge_at(server: RewardServer, **options: Any) -> VLMJudge:
    return VLMJudge(f"http://127.0.0.1:{server.server_port}/v1/", "tiny", **{"backoff": 0.01, **options})


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_each_image_is_asked_about_and_rated_on_its_own() -> None:
    def behave(request: Request) -> Reply:
        text = parts(request)[1]
        time.sleep(0.05 if "prompt 0" in text else 0)
        return Reply(completion(next(str(i) for i in range(6) if f"prompt {i}\n" in text)))

    with serve(behave) as server:
        values = judge_at(server)(images(6), [f"prompt {i}" for i in range(6)])
        requests = sorted(server.requests, key=lambda request: parts(request)[1])
    assert values == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert all(type(value) is float for value in values)
    for i, request in enumerate(requests):
        assert request.path == "/v1/chat/completions"
        assert {key: value for key, value in request.body.items() if key != "messages"} == {
            "model": "tiny",
            "temperature": 0.0,
            "max_tokens": 512,
        }
        address, text = parts(request)
        assert "from 0 to 10" in text
        kind, data = address.split(",")
        assert kind == "data:image/png;base64"
        expected = (images(6)[i] * 255).round().permute(1, 2, 0).to(torch.uint8).numpy()
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), expected)


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("8", 0.8),
        (" 8.\n", 0.8),
        ("7.5", 0.75),
        ("0", 0.0),
        ("10", 1.0),
        ("Rating:8", 0.8),
        ("The hand has 6 fingers, so 4", 0.4),
        ("8/10", 0.8),
        ("**8** / 10", 0.8),
        ("I give it 7 out of 10.", 0.7),
        ("7 of 10 stars", 0.7),
        ("On a scale from 0 to 10: 9", 0.9),
        (r"\boxed{6}", 0.6),
        ("<think>3 or 4?</think>5", 0.5),
        ('{"score": 2}', 0.2),
    ],
)
def test_the_last_number_is_the_rating(answer: str, value: float) -> None:
    assert VLMJudge("http://host/v1", "tiny").rating(answer) == pytest.approx(value)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ("", "does not end with a number"),
        ("A lovely picture.", "does not end with a number"),
        ("ten", "does not end with a number"),
        # No earlier number may be taken when the last one is of another kind.
        ("7,5", "does not end with a number"),
        ("Of 10 points: 7,5", "does not end with a number"),
        ("somewhere in 6-8", "does not end with a number"),
        ("0 to 10", "does not end with a number"),
        ("80%", "does not end with a number"),
        ("It is the 3rd", "does not end with a number"),
        ("version 2.1.3", "does not end with a number"),
        ("8/10/2", "does not end with a number"),
        ("1e1", "does not end with a number"),
        ("11", "outside the scale of 0 to 10"),
        ("-1", "outside the scale of 0 to 10"),
        ("85/100", "on another scale than 0 to 10"),
        ("4 out of 5", "on another scale than 0 to 10"),
    ],
)
def test_an_answer_without_a_rating_is_an_error(answer: str, complaint: str) -> None:
    with pytest.raises(BadAnswer, match=complaint) as caught:
        VLMJudge("http://host/v1", "tiny").rating(answer)
    assert repr(answer) in str(caught.value)


def test_another_scale() -> None:
    judge = VLMJudge("http://host/v1", "tiny", scale=(-1, 1))
    assert [judge.rating(text) for text in ("-1", "-0.5", "0", "+1", "0.5/1")] == [0.0, 0.25, 0.5, 1.0, 0.75]
    with pytest.raises(BadAnswer, match="outside the scale of -1 to 1"):
        judge.rating("2")


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ("8", 'has no "score"'),
        ('{"rating": 8}', 'has no "score"'),
        ('[{"score": 8}]', 'has no "score"'),
        ('```json\n{"score": 8}\n```', "is no JSON"),
        ('{"score": 8', "is no JSON"),
        ('{"score": "8"}', "no finite number"),
        ('{"score": NaN}', "no finite number"),
        ('{"score": null}', "no finite number"),
        ('{"score": true}', "no finite number"),
        ('{"score": 11}', "outside the scale"),
    ],
)
def test_json_is_read_strictly(answer: str, complaint: str) -> None:
    judge = VLMJudge("http://host/v1", "tiny", response_format="json_object")
    assert judge.rating('{"reason": "3 legs", "score": 7}') == pytest.approx(0.7)
    with pytest.raises(BadAnswer, match=complaint):
        judge.rating(answer)


@pytest.mark.parametrize("response_format", ["json_object", "json_schema"])
def test_json_is_asked_for(response_format: Any) -> None:
    with serve(saying('{"score": 5}')) as server:
        assert judge_at(server, response_format=response_format, scale=(1, 9))(images(1), ["a {b}"]) == [0.5]
        (request,) = server.requests
    assert request.body["response_format"]["type"] == response_format
    text = parts(request)[1]
    assert '{"score": x}' in text and "from 1 to 9" in text and "a {b}" in text
    if response_format == "json_schema":
        schema = request.body["response_format"]["json_schema"]["schema"]
        assert schema["required"] == list(schema["properties"]) == ["score"]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (completion("I cannot judge this."), "the model's answer 'I cannot judge this.' does not end with a number"),
        (completion("12"), "the model's answer '12' is outside the scale of 0 to 10"),
        (completion("The 2 cats and", "length"), "'The 2 cats and' was cut off: raise max_tokens"),
        (completion(None, "content_filter"), "it holds no text (finish_reason 'content_filter')"),
        (completion([{"type": "text", "text": "8"}]), "it holds no text"),
        ({"choices": []}, "it is no chat completion"),
        ({"error": "no such model"}, "it is no chat completion"),
        ({"choices": [{"text": "8"}]}, "it is no chat completion"),
        ([8], "it is no chat completion"),
        (b"8", "it is no chat completion"),
        (b"eight", "the body is no JSON"),
    ],
)
def test_an_unusable_answer_is_an_error_and_not_tried_again(body: Any, complaint: str) -> None:
    with serve(lambda request: Reply(body)) as server:
        with pytest.raises(RewardServerError) as caught:
            judge_at(server)(images(1), ["x"])
        assert len(server.requests) == 1
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
    message = str(caught.value)
    assert complaint in message
    assert f":{server.server_port}/v1/chat/completions answered with status 200" in message
    assert content.decode()[:20] in message


def test_a_busy_server_is_tried_again() -> None:
    with serve(lambda request: Reply(status=429) if request.index < 2 else Reply(completion("9"))) as server:
        assert judge_at(server, retries=2)(images(1), ["x"]) == [0.9]
        assert len(server.requests) == 3


def test_the_instruction_names_its_columns() -> None:
    with serve(saying("1")) as server:
        judge = judge_at(server, instruction="Is {text!r} written in {prompt}, {{really}}? {text}", scale=(0, 1))
        assert judge.info.columns == ("text",)
        assert judge(images(3), ["a", "b", "c"], text=["{x}", None, "y"], other=[1, 2, 3]) == [1.0, None, 1.0]
        assert sorted(parts(request)[1] for request in server.requests) == [
            "Is 'y' written in c, {really}? y",
            "Is '{x}' written in a, {really}? {x}",
        ]
        with pytest.raises(ValueError, match="reads the column 'text'"):
            judge(images(1), ["a"])


def test_settings_are_sent_only_if_set() -> None:
    extra = {"max_completion_tokens": 99, "temperature": 0.5}
    with serve(saying("1")) as server:
        judge_at(server, temperature=None, max_tokens=None)(images(1), ["x"])
        judge_at(server, max_tokens=None, seed=0, extra=extra)(images(1), ["x"])
        bodies = [{k: v for k, v in request.body.items() if k != "messages"} for request in server.requests]
    assert bodies == [{"model": "tiny"}, {"model": "tiny", "seed": 0, **extra}]


def test_the_key_is_sent_only_if_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(saying("x")) as server:

        def header(**options: Any) -> str | None:
            with pytest.raises(RewardServerError) as caught:
                judge_at(server, **options)(images(1), ["x"])
            assert "the-key" not in str(caught.value)
            return server.requests[-1].headers.get("Authorization")

        assert header() is None
        assert header(api_key_env="OTHER_KEY") is None
        monkeypatch.setenv("OPENAI_API_KEY", "the-key-1")
        monkeypatch.setenv("OTHER_KEY", "the-key-2")
        assert header() == "Bearer the-key-1"
        assert header(api_key_env="OTHER_KEY") == "Bearer the-key-2"
        assert header(api_key_env=None) is None
        assert header(headers={"Authorization": "Bearer mine"}) == "Bearer mine"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"scale": (10, 0)}, "is no scale"),
        ({"scale": (0, 5, 10)}, "is no scale"),
        ({"scale": (0, float("inf"))}, "is no scale"),
        ({"response_format": "text"}, "response_format='text'"),
        ({"instruction": 'Answer {"score": x}'}, "Double the braces"),
        ({"instruction": "Rate {} from 0 to 10"}, "Double the braces"),
        ({"instruction": "Rate {prompt"}, "without its partner"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"url": "host/v1"}, "is no address of a server"),
    ],
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        VLMJudge(**{"url": "http://host/v1", "model": "tiny", **options})


def test_numbers_must_fit() -> None:
    with pytest.raises(ValueError, match="2 images for 1 prompts"):
        VLMJudge("http://host/v1", "tiny")(images(2), ["x"])
