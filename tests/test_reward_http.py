"""Rewards over HTTP, against a real server on this machine."""

import base64
import io
import logging
import pickle
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rdm_rl.rewards.http import HTTPReward, RewardServerError, _retry_after
from tests.reward_server import Reply, Request, RewardServer, serve

TOKEN = "very-secret-token"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxy and no stored password of the machine that runs the tests."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def number_of(prompt: str) -> float | None:
    """The value that the well-behaved server gives a prompt: the number in it, or None."""
    return None if prompt == "none" else float(prompt)


def well_behaved(request: Request) -> Reply:
    return Reply({"rewards": [number_of(prompt) for prompt in request.body["prompts"]], "model": "ignored"})


def answering(body: Any, **reply: Any) -> Callable[[Request], Reply]:
    return lambda request: Reply(body, **reply)


def failing_first(times: int, failure: Reply) -> Callable[[Request], Reply]:
    return lambda request: failure if request.index < times else well_behaved(request)


def images(count: int, size: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def reward_of(server: RewardServer, **options: Any) -> HTTPReward:
    return HTTPReward(server.url, **{"backoff": 0.01, "timeout": 5, **options})


def ask(reward: HTTPReward, *prompts: str, **columns: Any) -> list[float | None]:
    return reward(images(len(prompts)), list(prompts), **columns)


def failure_of(reward: HTTPReward, *prompts: str) -> str:
    with pytest.raises(RewardServerError) as caught:
        ask(reward, *prompts or ("1",))
    return str(caught.value)


# What is sent and what comes back


def test_values_come_back_in_order_and_none_stays_none() -> None:
    def slow_first(request: Request) -> Reply:
        time.sleep(0.05 if "0" in request.body["prompts"] else 0)
        return well_behaved(request)

    with serve(slow_first) as server:
        values = ask(reward_of(server, batch_size=3), "0", "1", "none", "3", "-4.5", "5", "6")
        assert values == [0.0, 1.0, None, 3.0, -4.5, 5.0, 6.0]
        assert all(value is None or type(value) is float for value in values)
        assert sorted(len(request.body["images"]) for request in server.requests) == [1, 3, 3]


def test_every_byte_of_an_image_survives() -> None:
    levels = torch.arange(256, dtype=torch.float32).reshape(16, 16)
    picture = torch.stack([levels, levels.T, 255 - levels]) / 255
    with serve(well_behaved) as server:
        reward_of(server)(picture[None].requires_grad_(), ["1"])
        (text,) = server.requests[0].body["images"]
    image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
    assert (image.format, image.mode) == ("PNG", "RGB")
    expected = (picture * 255).round().permute(1, 2, 0).to(torch.uint8).numpy()
    np.testing.assert_array_equal(np.asarray(image), expected)


def test_values_between_two_levels_are_rounded_and_others_clamped() -> None:
    with serve(well_behaved) as server:
        reward_of(server)(torch.tensor([0.4 / 255, 0.6 / 255, 1.2]).reshape(1, 3, 1, 1), ["1"])
        (text,) = server.requests[0].body["images"]
    assert np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).tolist() == [[[0, 1, 255]]]


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


def test_no_image_no_request() -> None:
    with serve(well_behaved) as server:
        assert ask(reward_of(server)) == []
        assert not server.requests


def test_is_not_differentiable_and_can_be_copied_to_another_process() -> None:
    with serve(well_behaved) as server:
        reward = pickle.loads(pickle.dumps(reward_of(server, columns=["caption"])))
        assert not reward.differentiable
        assert ask(reward, "7", caption=["x"]) == [7.0]


# Failures of the server


@pytest.mark.parametrize(
    "failure",
    [Reply(drop=True), Reply(status=408), Reply(status=429), Reply(b"busy", status=503)],
    ids=["dropped", "408", "429", "503"],
)
def test_two_failures_then_success(failure: Reply, caplog: pytest.LogCaptureFixture) -> None:
    with serve(failing_first(2, failure)) as server:
        assert ask(reward_of(server, retries=2), "3") == [3.0]
        assert len(server.requests) == 3
        assert server.requests[0].body == server.requests[2].body
    assert [record.levelno for record in caplog.records if "Trying again" in record.message] == [logging.WARNING] * 2


def test_an_answer_that_breaks_off_is_tried_again() -> None:
    broken = Reply(b'{"rewards"', headers={"Content-Length": "1000", "Connection": "close"})
    with serve(failing_first(1, broken)) as server:
        assert ask(reward_of(server), "3") == [3.0]


def test_one_failure_too_many() -> None:
    with serve(failing_first(2, Reply(status=503))) as server:
        assert "status 503" in failure_of(reward_of(server, retries=1))
        assert len(server.requests) == 2


def test_an_error_for_ever_names_address_status_and_answer() -> None:
    with serve(answering(b"out of memory " + b"x" * 1000, status=500)) as server:
        message = failure_of(reward_of(server, retries=3))
        assert len(server.requests) == 4
        assert f"{server.url} answered with status 500" in message
        assert "out of memory" in message and "x" * 400 not in message
        assert "retries=3" in message


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_not_tried_again(status: int) -> None:
    with serve(answering({"detail": "no such field"}, status=status)) as server:
        message = failure_of(reward_of(server))
        assert f"status {status}" in message and "no such field" in message
        assert len(server.requests) == 1


def test_a_redirect_is_not_followed() -> None:
    with serve(answering(b"", status=307, headers={"Location": "/elsewhere"})) as server:
        assert "set url to the final address" in failure_of(reward_of(server))
        assert len(server.requests) == 1


def test_no_server() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/rewards"
        message = failure_of(HTTPReward(url + "?key=" + TOKEN, retries=1, backoff=0.01))
    assert message.startswith(f"{url} gave no answer (ConnectionRefusedError")
    assert TOKEN not in message


def hanging(request: Request) -> Reply:
    # The server of the test is not at hand here; the thread is a daemon, and the client does not wait for it.
    time.sleep(3)
    return Reply(drop=True)


def test_a_server_that_hangs_runs_into_the_timeout() -> None:
    with serve(hanging) as server:
        start = time.monotonic()
        message = failure_of(reward_of(server, timeout=0.2, retries=1))
        assert 0.4 <= time.monotonic() - start < 2.5
        assert len(server.requests) == 2
    assert f"{server.url} gave no answer (TimeoutError" in message


def test_a_server_that_hangs_runs_into_the_deadline() -> None:
    with serve(hanging) as server:
        start = time.monotonic()
        message = failure_of(reward_of(server, timeout=60, deadline=0.3))
        assert 0.25 <= time.monotonic() - start < 2.5
    assert server.url in message and "deadline=0.3" in message


def test_a_server_that_dribbles_runs_into_the_deadline() -> None:
    with serve(answering({"rewards": [1.0]}, pause=0.1)) as server:
        start = time.monotonic()
        assert "deadline=0.3" in failure_of(reward_of(server, timeout=0.25, deadline=0.3))
        assert time.monotonic() - start < 1.8


def test_the_deadline_ends_the_retries_and_says_why_they_were_needed() -> None:
    with serve(answering(b"loading the model", status=503)) as server:
        start = time.monotonic()
        message = failure_of(reward_of(server, retries=1000, backoff=0.05, max_wait=0.05, deadline=0.3))
        assert time.monotonic() - start < 2.5
        assert 1 < len(server.requests) < 10
    assert "deadline=0.3" in message and "loading the model" in message


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
    assert 45 < _retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=50), usegmt=True)) <= 50
    assert _retry_after("Fri, 31 Dec 1999 23:59:59 GMT") < 0


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


# Several requests at the same time


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


def test_threads_may_share_a_reward() -> None:
    with serve(well_behaved) as server:
        reward = reward_of(server, batch_size=2)
        results: dict[int, list[float | None]] = {}

        def call(start: int) -> None:
            results[start] = ask(reward, *(str(start + i) for i in range(5)))

        threads = [threading.Thread(target=call, args=(10 * i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {10 * i: [10.0 * i + j for j in range(5)] for i in range(4)}


# Headers, tokens and proxies


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
        with pytest.raises(RewardServerError) as caught:
            ask(reward, "1")
        assert server.requests[0].headers["Authorization"] == f"Bearer {TOKEN}"
        assert server.requests[0].headers["X-Run"] == "7"
        assert server.requests[0].headers["Content-Type"] == "application/json"
    assert "Bearer ***" in str(caught.value)
    assert TOKEN not in str(caught.value) + caplog.text + repr(vars(reward)) + repr(pickle.dumps(reward))
    assert caught.value.__cause__ is None


def test_a_token_at_the_cut_is_not_shown_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    with serve(answering(b"x" * 290 + TOKEN.encode(), status=400)) as server:
        message = failure_of(reward_of(server, headers={"X-Key": "${REWARD_TOKEN}"}))
    assert "x***" in message and "very" not in message


def test_a_token_must_be_set_and_sendable(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"headers": {"Authorization": "Bearer ${REWARD_TOKEN}"}}
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    with pytest.raises(ValueError, match="environment variable REWARD_TOKEN, which is not set"):
        HTTPReward("http://127.0.0.1:1", **options)
    monkeypatch.setenv("REWARD_TOKEN", TOKEN + "\nX-Evil: 1")
    with pytest.raises(ValueError, match="The header Authorization has a character") as caught:
        HTTPReward("http://127.0.0.1:1", **options)
    assert TOKEN not in str(caught.value)
    with pytest.raises(ValueError, match="The header X-Run has a character"):
        HTTPReward("http://127.0.0.1:1", headers={"X-Run": " 7"})


def test_headers_are_not_shown() -> None:
    reward = HTTPReward("http://127.0.0.1:1", headers={"Authorization": TOKEN})
    assert TOKEN not in repr(reward.connection)


def test_a_stored_password_does_not_replace_our_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password else\n")
    with serve(well_behaved) as server:
        ask(reward_of(server, headers={"authorization": "Bearer ours"}), "1")
        assert server.requests[0].headers["authorization"] == "Bearer ours"


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


# Mistakes of the caller


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
        HTTPReward(**{"url": "http://127.0.0.1:1", **options})
    assert TOKEN not in str(caught.value)


def test_arguments_that_do_not_fit_are_refused_before_anything_is_sent() -> None:
    with serve(well_behaved) as server:
        reward = reward_of(server, columns=["caption"])
        with pytest.raises(ValueError, match="2 images for 1 prompts"):
            reward(images(2), ["1"], caption=["x"])
        with pytest.raises(ValueError, match="reads the column 'caption'"):
            ask(reward, "1")
        with pytest.raises(ValueError, match="'caption' has 2 entries for 1 images"):
            ask(reward, "1", caption=["x", "y"])
        with pytest.raises(ValueError, match="'caption' cannot be sent as JSON"):
            ask(reward, "1", caption=[torch.zeros(1)])
        with pytest.raises(ValueError, match="'caption' cannot be sent as JSON"):
            ask(reward, "1", caption=[float("nan")])
        with pytest.raises(ValueError, match="NaN"):
            reward(images(1) * float("nan"), ["1"], caption=["x"])
        with pytest.raises(ValueError, match=r"\(3, 2, 2\)"):
            reward(images(1)[0], ["1"], caption=["x"])
        assert not server.requests
