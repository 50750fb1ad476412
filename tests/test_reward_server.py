"""Rewards from servers, against a real one on this machine: over plain HTTP, and a vision-language judge."""

import asyncio
import base64
import gzip
import io
import json
import logging
import pickle
import re
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rdm_rl.pixels import to_pixels
from rdm_rl.rewards.calling import PlainReward
from rdm_rl.rewards.protocol import RewardError
from rdm_rl.rewards.server import BadAnswer, HTTPReward, RewardServerError, VLMJudge, retry_after
from tests.helpers import prompt_batch
from tests.reward_server import Reply, Request, RewardServer, serve

TOKEN = "very-secret-token"
NOWHERE = "http://127.0.0.1:1"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy and no key of the machine that runs the tests."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def well_behaved(request: Request) -> Reply:
    """The value of a prompt is the number in it, or None."""
    values = [None if prompt == "none" else float(prompt) for prompt in request.body["prompts"]]
    return Reply({"rewards": values, "model": "ignored"})


def answering(body: Any, **reply: Any) -> Callable[[Request], Reply]:
    return lambda request: Reply(body, **reply)


def failing_first(times: int, failure: Reply) -> Callable[[Request], Reply]:
    return lambda request: failure if request.index < times else well_behaved(request)


def hanging(request: Request) -> Reply:
    # The server of the test is not at hand here; the thread is a daemon, and the client does not wait for it.
    time.sleep(3)
    return Reply(drop=True)


def images(count: int, size: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def reward_of(server: RewardServer, **options: Any) -> HTTPReward:
    return HTTPReward(server.url, **{"backoff": 0.01, "timeout": 5, **options})


def judge_at(server: RewardServer, **options: Any) -> VLMJudge:
    return VLMJudge(f"http://127.0.0.1:{server.server_port}/v1/", "tiny", **{"backoff": 0.01, **options})


def ask(reward: HTTPReward | VLMJudge, *prompts: str, **columns: Any) -> list[float | None]:
    """What a trainer gets, for images as they come."""
    batch = replace(prompt_batch(len(prompts)), prompts=prompts, columns=columns)
    output = PlainReward("served", reward).start(images(len(prompts)), batch, gradient=False)()
    return [None if value != value else value for value in output.values.tolist()]


def failure_of(reward: HTTPReward | VLMJudge, *prompts: str) -> str:
    with pytest.raises(RewardError) as caught:
        ask(reward, *prompts or ("1",))
    assert isinstance(caught.value.__cause__, RewardServerError)
    return str(caught.value.__cause__)


def picture(text: str) -> Any:
    """The pixels of a picture as it was sent."""
    image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return np.asarray(image)


# ----- what is sent and what comes back -----


def test_values_come_back_in_order_and_none_stays_none() -> None:
    def slow_first(request: Request) -> Reply:
        time.sleep(0.05 if "0" in request.body["prompts"] else 0)
        return well_behaved(request)

    prompts = ["0", "1", "none", "3", "-4.5", "5", "6"]
    with serve(slow_first) as server:
        values = ask(reward_of(server, batch_size=3), *prompts)
        assert values == [0.0, 1.0, None, 3.0, -4.5, 5.0, 6.0]
        assert sorted(len(request.body["images"]) for request in server.requests) == [1, 3, 3]
        sent = dict(
            pair for one in server.requests for pair in zip(one.body["prompts"], one.body["images"], strict=True)
        )
    for prompt, expected in zip(prompts, to_pixels(images(7)), strict=True):
        np.testing.assert_array_equal(picture(sent[prompt]), expected)


def test_only_the_named_columns_are_sent() -> None:
    with serve(well_behaved) as server:
        reward = reward_of(server, columns=["caption", "boxes"], batch_size=2)
        assert reward.info.columns == ("caption", "boxes")
        assert HTTPReward.info.columns == ()
        ask(reward, "0", "1", "2", caption=["a", "b", None], boxes=[[1, 2], [], {"x": 0.5}], other=["x", "y", "z"])
        sent = sorted((request.body for request in server.requests), key=lambda body: body["prompts"])
    assert [body["prompts"] for body in sent] == [["0", "1"], ["2"]]
    assert sent[0]["columns"] == {"caption": ["a", "b"], "boxes": [[1, 2], []]}
    assert sent[1]["columns"] == {"caption": [None], "boxes": [{"x": 0.5}]}


def test_a_copy_works_in_another_process_and_a_call_alone() -> None:
    with serve(well_behaved) as server:
        reward = pickle.loads(pickle.dumps(reward_of(server, columns=["caption"])))
        assert not reward.differentiable
        for _ in range(2):
            assert asyncio.run(reward(images(1), ["7"], caption=["x"])) == [7.0]


# ----- failures of the server -----


@pytest.mark.parametrize(
    "failure",
    [
        Reply(drop=True),
        Reply(status=408),
        Reply(status=429),
        Reply(b"busy", status=503),
        Reply(b'{"rewards"', headers={"Content-Length": "1000", "Connection": "close"}),
    ],
    ids=["dropped", "408", "429", "503", "broken off"],
)
def test_two_failures_then_success(failure: Reply, caplog: pytest.LogCaptureFixture) -> None:
    with serve(failing_first(2, failure)) as server:
        assert ask(reward_of(server, retries=2), "3") == [3.0]
        assert len(server.requests) == 3
        assert server.requests[0].body == server.requests[2].body
    assert [record.levelno for record in caplog.records if "Trying again" in record.message] == [logging.WARNING] * 2


def test_an_error_for_ever_names_address_status_and_answer() -> None:
    with serve(answering(b"out of memory " + b"x" * 1000, status=500)) as server:
        message = failure_of(reward_of(server, retries=3))
        assert len(server.requests) == 4
        assert f"{server.url} answered with status 500" in message
        assert "out of memory" in message and "x" * 400 not in message
        assert "retries=3" in message


@pytest.mark.parametrize("status", [307, 400, 401, 404, 422])
def test_a_refusal_is_not_tried_again(status: int) -> None:
    with serve(answering({"detail": "no such field"}, status=status, headers={"Location": "/elsewhere"})) as server:
        message = failure_of(reward_of(server))
        assert f"status {status}" in message and "no such field" in message
        assert ("set url to the final address" in message) == (status == 307)
        assert len(server.requests) == 1


def test_no_server() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/rewards"
        message = failure_of(HTTPReward(url + "?key=" + TOKEN, retries=1, backoff=0.01))
    assert message.startswith(f"{url} gave no answer (ConnectError")
    assert TOKEN not in message


@pytest.mark.parametrize(
    ("behave", "options", "complaints"),
    [
        (hanging, {"timeout": 0.2, "retries": 1}, ["gave no answer (ReadTimeout", "Tried 2 times"]),
        (hanging, {"timeout": 60, "deadline": 0.3}, ["deadline=0.3"]),
        (answering({"rewards": [1.0]}, pause=0.1), {"timeout": 0.25, "deadline": 0.3}, ["deadline=0.3"]),
        (
            answering(b"loading the model", status=503),
            {"retries": 1000, "backoff": 0.05, "max_wait": 0.05, "deadline": 0.3},
            ["deadline=0.3", "loading the model"],
        ),
    ],
    ids=["timeout", "hangs", "dribbles", "retries"],
)
def test_time_has_an_end(behave: Callable[[Request], Reply], options: dict[str, Any], complaints: list[str]) -> None:
    with serve(behave) as server:
        start = time.monotonic()
        message = failure_of(reward_of(server, **options))
        assert 0.25 <= time.monotonic() - start < 2.5
        assert len(server.requests) < 10
    assert all(part in message for part in [server.url, *complaints])


def test_waits_double_up_to_the_longest() -> None:
    times: list[float] = []

    def behave(request: Request) -> Reply:
        times.append(time.monotonic())
        return Reply(status=500)

    with serve(behave) as server:
        failure_of(reward_of(server, retries=6, backoff=0.04, max_wait=0.1))
    np.testing.assert_array_less([0.04, 0.08, 0.1, 0.1, 0.1, 0.1], np.diff(times))
    assert times[-1] - times[0] < 1.5  # 2.5 without the longest wait


@pytest.mark.parametrize(("asked", "low"), [("2", 0.3), ("soon", 0.0), ("-5", 0.0)])
def test_retry_after_is_honoured_up_to_the_longest_wait(asked: str, low: float) -> None:
    with serve(failing_first(1, Reply(status=429, headers={"Retry-After": asked}))) as server:
        start = time.monotonic()
        assert ask(reward_of(server, max_wait=0.3), "2") == [2.0]
        assert low <= time.monotonic() - start < 1.8


def test_retry_after_may_be_a_date() -> None:
    assert 45 < retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=50), usegmt=True)) <= 50
    assert retry_after("Fri, 31 Dec 1999 23:59:59 GMT") < 0


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"rewards": [1.0]}, '"rewards" has 1 entries for 2 images'),
        ({"rewards": [1.0, 2.0, 3.0]}, '"rewards" has 3 entries for 2 images'),
        ({"rewards": [1.0, "2.0"]}, "rewards[1] is '2.0' (str)"),
        ({"rewards": [1.0, True]}, "rewards[1] is 'True' (bool)"),
        ({"rewards": [[1.0], 2.0]}, "rewards[0] is '[1.0]' (list)"),
        ({"rewards": [1.0, float("nan")]}, "rewards[1] is 'nan' (float)"),
        ({"rewards": [float("-inf"), 1.0]}, "rewards[0] is '-inf' (float)"),
        ({"rewards": [10**400, 1.0]}, "and no finite number"),
        ({"rewards": {"0": 1.0, "1": 2.0}}, 'it holds no list "rewards"'),
        ({"scores": [1.0, 2.0]}, 'it holds no list "rewards"'),
        ([1.0, 2.0], 'it holds no list "rewards"'),
        (b"<html>Welcome</html>", "the body is no JSON"),
        (b"[" * 100_000, "the body is no JSON"),
        (b'{"rewards": [1.0, 2.0]', "the body is no JSON"),
        (b"\xff\xfe\xfa", "the body is no JSON"),
        (b"", "the body is no JSON. The body is empty"),
    ],
)
def test_a_wrong_answer_is_an_error_and_not_tried_again(body: Any, complaint: str) -> None:
    with serve(answering(body)) as server:
        message = failure_of(reward_of(server), "1", "2")
        assert len(server.requests) == 1
        assert message.startswith(f"{server.url} answered with status 200, but ")
        assert complaint in message
        assert "body" in message


def test_after_a_failure_nothing_more_is_sent() -> None:
    def behave(request: Request) -> Reply:
        time.sleep(0 if request.body["prompts"] == ["0"] else 0.1)
        return Reply(status=400) if request.body["prompts"] == ["0"] else well_behaved(request)

    with serve(behave) as server:
        failure_of(reward_of(server, batch_size=1, concurrency=2), *"0123456789")
        time.sleep(0.3)
        assert len(server.requests) <= 2


def test_a_failure_does_not_wait_for_other_requests() -> None:
    def behave(request: Request) -> Reply:
        return hanging(request) if request.body["prompts"] == ["0"] else Reply(status=400)

    with serve(behave) as server:
        start = time.monotonic()
        assert "status 400" in failure_of(reward_of(server, batch_size=1), "0", "1")
        assert time.monotonic() - start < 2.5


def test_as_many_requests_in_flight_as_allowed_and_no_more() -> None:
    # Each request waits until three are in flight, so with fewer none would be answered.
    barrier = threading.Barrier(3)

    def behave(request: Request) -> Reply:
        barrier.wait(timeout=3)
        time.sleep(0.02)
        return well_behaved(request)

    with serve(behave) as server:
        prompts = [str(i) for i in range(9)]
        assert ask(reward_of(server, batch_size=1, concurrency=3), *prompts) == [float(i) for i in range(9)]
        assert server.most_in_flight == 3
        assert server.connections == 3


BOMB = gzip.compress(b" " * 2**26)  # 64 kB that stand for 64 MB.
LARGE = b'{"rewards": [1.0]' + b" " * 5 * 2**20 + b"}"


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        (Reply(LARGE), "the body is longer than 4194304 bytes"),
        (Reply(LARGE, status=400), "status 400"),
        (Reply(BOMB, headers={"Content-Encoding": "gzip"}), r"the body is compressed \(gzip\)"),
        (Reply(BOMB, status=400, headers={"Content-Encoding": "gzip"}), "status 400"),
    ],
    ids=["large", "large error", "bomb", "bomb in an error"],
)
def test_a_body_is_bounded_before_it_is_decoded(reply: Reply, complaint: str) -> None:
    with serve(lambda request: reply) as server:
        tracemalloc.start()
        message = failure_of(reward_of(server, retries=0))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert server.requests[0].headers["Accept-Encoding"] == "identity"
    assert re.search(complaint, message)
    assert len(message) < 2000
    assert peak < 40 * 2**20


# ----- headers, tokens and proxies -----


def echo_headers(status: int) -> Callable[[Request], Reply]:
    return lambda request: Reply({"seen": request.headers}, status=status)


@pytest.mark.parametrize("status", [200, 401, 503])
def test_a_token_is_sent_and_never_shown(
    status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    with serve(echo_headers(status)) as server:
        reward = reward_of(server, retries=1, headers={"Authorization": "Bearer ${REWARD_TOKEN}", "X-Run": "7"})
        message = failure_of(reward)
        assert server.requests[0].headers["Authorization"] == f"Bearer {TOKEN}"
        assert server.requests[0].headers["X-Run"] == "7"
        assert server.requests[0].headers["Content-Type"] == "application/json"
    assert "Bearer ***" in message
    assert TOKEN not in message + caplog.text + repr(vars(reward)) + repr(pickle.dumps(reward))


def test_a_token_at_the_cut_is_not_shown_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    with serve(answering(b"x" * 290 + TOKEN.encode(), status=400)) as server:
        message = failure_of(reward_of(server, headers={"X-Key": "${REWARD_TOKEN}"}))
    assert "x***" in message and "very" not in message


SPELLINGS: dict[str, Callable[[str], str]] = {
    "upper case": str.upper,
    "cut off": lambda token: token[:9] + "...",
    "its end": lambda token: "..." + token[-9:],
    "JSON": lambda token: "".join(f"\\u{ord(letter):04x}" for letter in token),
    "Python": lambda token: "".join(f"\\x{ord(letter):02X}" for letter in token),
    "address": lambda token: "".join(f"%{ord(letter):02x}" for letter in token),
    "HTML": lambda token: "".join(f"&#{ord(letter)};" for letter in token),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("value", ["${REWARD_TOKEN}", TOKEN], ids=["variable", "literal"])
def test_a_token_is_not_shown_in_another_spelling(
    value: str, spelling: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    echoed = SPELLINGS[spelling](TOKEN)
    with serve(answering(f"bad key: {echoed}!".encode(), status=503)) as server:
        message = failure_of(reward_of(server, retries=1, headers={"X-Key": value}))
    assert "bad key: " in message and "***" in message
    letters = echoed.strip(".")
    assert letters not in message + caplog.text and repr(letters)[1:-1] not in message + caplog.text


def test_a_token_must_be_set_and_sendable(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"headers": {"Authorization": "Bearer ${REWARD_TOKEN}"}}
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    with pytest.raises(ValueError, match="environment variable REWARD_TOKEN, which is not set"):
        HTTPReward(NOWHERE, **options)
    monkeypatch.setenv("REWARD_TOKEN", TOKEN + "\nX-Evil: 1")
    with pytest.raises(ValueError, match="The header Authorization has a character") as caught:
        HTTPReward(NOWHERE, **options)
    assert TOKEN not in str(caught.value)
    with pytest.raises(ValueError, match="The header X-Run has a character"):
        HTTPReward(NOWHERE, headers={"X-Run": " 7"})


def test_headers_are_not_shown() -> None:
    reward = HTTPReward(NOWHERE, headers={"Authorization": TOKEN})
    assert TOKEN not in repr(reward.connection)


def test_the_query_is_sent_and_not_shown() -> None:
    with serve(lambda request: Reply({"no such page": request.path}, status=404)) as server:
        message = failure_of(HTTPReward(f"{server.url}?key={TOKEN}"))
        assert server.requests[0].path == f"/rewards?key={TOKEN}"
    assert server.url in message and TOKEN not in message


def test_proxy_variables_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(well_behaved) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.server_port}")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
        assert ask(HTTPReward("http://rewards.invalid/v1", retries=0), "5") == [5.0]
        assert proxy.requests[0].path == "http://rewards.invalid/v1"
        with serve(well_behaved) as server:
            monkeypatch.setenv("no_proxy", "127.0.0.1")
            assert ask(reward_of(server, retries=0), "6") == [6.0]
        assert len(proxy.requests) == 1


# ----- mistakes of the caller -----


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"url": "127.0.0.1:8000"}, "is no address of a server"),
        ({"url": "ftp://127.0.0.1"}, "is no address of a server"),
        ({"url": "http:///rewards"}, "is no address of a server"),
        ({"url": "http://127.0.0.1:80000"}, "is no address of a server"),
        ({"url": "http://[::1"}, "is no address of a server"),
        ({"url": f"http://me:{TOKEN}@host"}, "contains a user name or a password"),
        ({"url": f"me:{TOKEN}@host/rewards"}, "contains a user name or a password"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"retries": -1}, "retries=-1"),
        ({"backoff": -1}, "backoff=-1"),
        ({"timeout": 0}, "timeout=0"),
        ({"deadline": -1}, "deadline=-1"),
        ({"columns": "caption"}, r"\['caption'\]"),
    ],
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        HTTPReward(**{"url": NOWHERE, **options})
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("entry", [torch.zeros(1), float("nan"), {1}], ids=str)
def test_a_column_must_be_json(entry: Any) -> None:
    with pytest.raises(RewardError, match="'caption' cannot be sent as JSON"):
        ask(HTTPReward(NOWHERE, columns=["caption"]), "1", caption=[entry])


# ----- the judge -----


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


def test_each_image_is_asked_about_and_rated_on_its_own() -> None:
    def behave(request: Request) -> Reply:
        text = parts(request)[1]
        time.sleep(0.05 if "prompt 0" in text else 0)
        return Reply(completion(next(str(i) for i in range(6) if f"prompt {i}\n" in text)))

    with serve(behave) as server:
        values = ask(judge_at(server), *(f"prompt {i}" for i in range(6)))
        requests = sorted(server.requests, key=lambda request: parts(request)[1])
    assert values == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
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
        np.testing.assert_array_equal(picture(data), to_pixels(images(6)[i]))


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
        assert ask(judge_at(server, response_format=response_format, scale=(1, 9)), "a {b}") == [0.5]
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
        message = failure_of(judge_at(server), "x")
        assert len(server.requests) == 1
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert complaint in message
    assert f":{server.server_port}/v1/chat/completions answered with status 200" in message
    assert content.decode()[:20] in message


def test_a_busy_judge_is_tried_again() -> None:
    with serve(lambda request: Reply(status=429) if request.index < 2 else Reply(completion("9"))) as server:
        assert ask(judge_at(server, retries=2), "x") == pytest.approx([0.9])
        assert len(server.requests) == 3


def test_the_instruction_names_its_columns() -> None:
    with serve(saying("1")) as server:
        judge = judge_at(server, instruction="Is {text!r} written in {prompt}, {{really}}? {text}", scale=(0, 1))
        assert judge.info.columns == ("text",)
        assert ask(judge, "a", "b", "c", text=["{x}", None, "y"], other=[1, 2, 3]) == [1.0, None, 1.0]
        assert sorted(parts(request)[1] for request in server.requests) == [
            "Is 'y' written in c, {really}? y",
            "Is '{x}' written in a, {really}? {x}",
        ]


def test_settings_are_sent_only_if_set() -> None:
    extra = {"max_completion_tokens": 99, "temperature": 0.5}
    with serve(saying("1")) as server:
        ask(judge_at(server, temperature=None, max_tokens=None), "x")
        ask(judge_at(server, max_tokens=None, seed=0, extra=extra), "x")
        bodies = [{k: v for k, v in request.body.items() if k != "messages"} for request in server.requests]
    assert bodies == [{"model": "tiny"}, {"model": "tiny", "seed": 0, **extra}]


def test_the_key_is_sent_only_if_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(saying("x")) as server:

        def header(**options: Any) -> str | None:
            assert "the-key" not in failure_of(judge_at(server, **options), "x")
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
def test_a_judges_wrong_options_are_refused_at_once(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        VLMJudge(**{"url": "http://host/v1", "model": "tiny", **options})
