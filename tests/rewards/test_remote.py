"""RemoteReward against a server that fails in every way; see `faulty_server`."""

import copy
import io
import json
import math
import pickle
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, JpegImagePlugin

from lit_align.rewards import Colorfulness, RemoteReward, wire
from lit_align.rewards import http_client as http
from lit_align.rewards.base import checked_scores
from lit_align.rewards.http_client import ServerRefusalError, ServerUnavailableError, is_loopback
from lit_align.rewards.scoring import RewardError, in_thread
from tests.rewards.faulty_server import (
    FAULTS,
    HEALTH,
    HUGE,
    IMAGES,
    PROMPTS,
    QUICK,
    SCORES,
    always,
    brightness,
    failure,
    first,
    huge,
    outcome,
    serving,
    truncated,
)

ATOL = 1e-6


@pytest.fixture
def server():
    with serving() as server:
        yield server


def remote(server, **options):
    return RemoteReward(server.url, **{**QUICK, **options})


@pytest.fixture
def waits(monkeypatch):
    """Replace the clock by one that only waiting moves; return what was waited."""
    clock, waits = SimpleNamespace(now=0.0), []

    def sleep(seconds):
        waits.append(seconds)
        clock.now += seconds

    monkeypatch.setattr(http, "now", lambda: clock.now)
    monkeypatch.setattr(http, "sleep", sleep)
    monkeypatch.setattr("lit_align.rewards.served.now", lambda: clock.now)
    return waits


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_has_its_outcome(fault):
    result, posts, server, reward = outcome(fault)
    assert posts == fault.posts
    assert reward.counts["requests"] == posts + len(server.gets)
    if isinstance(fault.expected, list):
        expected = torch.tensor(fault.expected)
        torch.testing.assert_close(result, expected, atol=ATOL, rtol=0, equal_nan=True)
        assert reward.counts["unscored"] == expected.isnan().sum()
        checked_scores(reward, result, 4)
    else:
        kind, told = fault.expected
        with pytest.raises(kind, match=told) as caught:
            raise result
        assert server.url in str(caught.value)


def test_a_huge_answer_is_not_read_to_its_end():
    with serving(always(huge)) as server:
        with pytest.raises(wire.ProtocolError, match="more than 16777216 bytes"):
            remote(server)(IMAGES, PROMPTS)
        assert server.sent < HUGE / 2


def test_waits_are_those_of_the_defaults(waits):
    with serving(first(2, failure(503))) as server:
        scores = RemoteReward(server.url)(IMAGES, PROMPTS)
    torch.testing.assert_close(scores, torch.tensor(SCORES), atol=ATOL, rtol=0)
    assert waits == [0.5, 1.0]


def test_waits_double_up_to_thirty_seconds(waits):
    with (
        serving(always(failure(503))) as server,
        pytest.raises(ServerUnavailableError, match="in 9 attempt"),
    ):
        RemoteReward(server.url, retries=8)(IMAGES, PROMPTS)
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_no_attempt_begins_after_the_deadline(waits):
    with serving(always(failure(500))) as server:
        with pytest.raises(ServerUnavailableError, match="before the deadline, in 2 attempt"):
            RemoteReward(server.url, deadline=1.2)(IMAGES, PROMPTS)
        assert len(server.posts) == 2
    assert waits == [0.5]


def test_the_deadline_holds_for_threads_that_hang():
    with serving() as server:
        reward = remote(server)
        release = threading.Event()
        reward.client.send = lambda *words: release.wait(60) and HEALTH
        reward.connect = lambda ends: None
        with pytest.raises(ServerUnavailableError, match=r"within 0\.01 seconds"):
            http.in_parallel(lambda part: reward.ask([], 1e9), [0, 1], 2, 0.01)
        release.set()


def test_images_are_split_and_sent_a_few_at_a_time():
    together = threading.Barrier(2)

    def behave(number, request):
        if number < 2:
            together.wait(30)  # so the first two are there at once
        return brightness(request)

    images = torch.arange(1, 11).view(10, 1, 1, 1).expand(10, 3, 4, 4) / 255
    with serving(behave) as server:
        reward = remote(server, batch_size=3, concurrency=2)
        scores = reward(images, [f"prompt {k}" for k in range(10)], [{"k": k} for k in range(10)])
    torch.testing.assert_close(scores, torch.arange(1, 11) / 255, atol=ATOL, rtol=0)
    requests = [request for request, _, _ in server.posts]
    assert sorted(len(request["items"]) for request in requests) == [1, 3, 3, 3]
    assert server.most_at_once == 2
    assert server.gets == ["/health"]
    items = sorted((i for r in requests for i in r["items"]), key=lambda i: int(i["id"]))
    assert [item["prompt"] for item in items] == [f"prompt {k}" for k in range(10)]
    assert [item["metadata"] for item in items] == [{"k": k} for k in range(10)]
    assert {(r["protocol"], r["reward"]) for r in requests} == {(1, "Brightness")}


def test_one_failed_request_fails_the_call():
    def behave(number, request):
        bad = any(item["prompt"] == PROMPTS[2] for item in request["items"])
        return failure(422) if bad else brightness(request)

    with serving(behave) as server, pytest.raises(ServerRefusalError, match="HTTP 422"):
        remote(server, batch_size=1)(IMAGES, PROMPTS)


def test_png_is_lossless_and_jpeg_of_high_quality(server):
    images = torch.rand(2, 3, 32, 48)
    expected = (images * 255).round().byte()
    for file_format in ("png", "jpeg"):
        remote(server, image_format=file_format)(images, PROMPTS[:2])
        (item, _) = server.posts[-1][0]["items"]
        assert item["image"]["format"] == file_format
        parsed = wire.parse_score_request(server.posts[-1][0], 2)[1][0]
        pixels = wire.decode_image(parsed, 32 * 48)
        if file_format == "png":
            assert torch.equal(pixels, expected[0])
            continue
        with Image.open(io.BytesIO(parsed.data)) as file:
            assert JpegImagePlugin.get_sampling(file) == 0  # 4:4:4
            tables, buffer = file.quantization, io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "JPEG", quality=95)
        assert tables == Image.open(buffer).quantization


def test_images_that_are_not_finite_are_not_sent(server):
    images = IMAGES.clone()
    images[1, 0, 0, 0], images[3, 2, 1, 1] = math.nan, math.inf
    reward = remote(server)
    with pytest.warns(UserWarning, match=r"could not score 2 of 4 .* not finite"):
        scores = reward(images, PROMPTS)
    expected = torch.tensor([SCORES[0], math.nan, SCORES[2], math.nan])
    torch.testing.assert_close(scores, expected, atol=ATOL, rtol=0, equal_nan=True)
    assert [item["prompt"] for item in server.posts[0][0]["items"]] == PROMPTS[::2]
    assert reward.counts["unscored"] == 2
    with pytest.warns(UserWarning, match="not finite"):
        assert reward(images[1:2], PROMPTS[:1]).isnan().all()
    assert len(server.posts) == 1
    assert reward(images[:0], []).shape == (0,)


def test_the_server_is_asked_who_it_is():
    with serving() as server:
        assert remote(server, reward="Brightness").name == "Brightness"
        with pytest.raises(RewardError, match="serves 'Brightness', and `reward` asks for 'HPSv2'"):
            remote(server, reward="HPSv2")(IMAGES, PROMPTS)
        reward = remote(server)
        assert (reward.name, reward.served) == ("RemoteReward", None)
        reward(IMAGES, PROMPTS)
        assert (reward.name, reward.served) == ("RemoteReward", ("Brightness", "1"))
        assert "served=('Brightness', '1')" in repr(reward)


@pytest.mark.parametrize(("version", "same"), [("1", True), ("2", False)])
def test_after_a_lost_connection_the_server_must_be_the_same(version, same):
    with serving(first(1, truncated)) as server:
        server.health = dict(HEALTH)
        reward = remote(server)
        reward.connect(http.now() + 60)
        server.health["version"] = version
        if same:
            torch.testing.assert_close(reward(IMAGES, PROMPTS), torch.tensor(SCORES))
            assert len(server.gets) == 2
        else:
            with pytest.raises(RewardError, match="now serves Brightness 2 and served Brightness"):
                reward(IMAGES, PROMPTS)
            assert len(server.posts) == 1


def test_a_server_that_is_not_there_is_named():
    with serving() as server:
        pass
    with pytest.raises(ServerUnavailableError) as caught:
        remote(server, retries=1)(IMAGES, PROMPTS)
    assert f"{server.url} did not answer in 2 attempt(s)" in str(caught.value)
    assert "Is its server running" in str(caught.value)


def test_tokens_are_sent_and_kept_to_themselves(server, monkeypatch):
    def sent():
        return server.posts[-1][1].get("Authorization")

    remote(server)(IMAGES, PROMPTS)
    assert sent() is None
    monkeypatch.setenv("LIT_ALIGN_REWARD_TOKEN", "from-environment")
    reward = remote(server)
    reward(IMAGES, PROMPTS)
    assert sent() == "Bearer from-environment"
    assert b"from-environment" not in pickle.dumps(reward)
    reward = remote(server, token="given")
    reward(IMAGES, PROMPTS)
    assert sent() == "Bearer given"
    assert "given" not in repr(reward)
    with pytest.raises(ValueError, match="printable ASCII") as caught:
        remote(server, token="sec\nret")(IMAGES, PROMPTS)
    assert "ret" not in str(caught.value).replace("LIT_ALIGN_REWARD_TOKEN", "")


def test_tokens_that_travel_unencrypted_are_warned_of():
    def connect(url):
        RemoteReward(url, token="secret").client._connected().close()

    with pytest.warns(UserWarning, match="travels unencrypted; use https, or a tunnel"):
        connect("http://node17:8000")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        connect("https://node17:8000")
        connect("http://localhost:8000")
        connect("http://[::1]:8000")


def test_proxies_are_not_asked_for_this_machine(server, monkeypatch):
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    torch.testing.assert_close(remote(server)(IMAGES, PROMPTS), torch.tensor(SCORES))


def test_copies_work_and_hold_no_socket(server):
    reward = remote(server, token="given")
    reward(IMAGES, PROMPTS)
    assert reward.client._http is not None
    for copied in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert copied.client._http is None
        assert copied.served == reward.served
        gets = len(server.gets)
        torch.testing.assert_close(copied(IMAGES, PROMPTS), torch.tensor(SCORES))
        assert len(server.gets) == gets + 1
    reward.client.close()
    torch.testing.assert_close(reward(IMAGES, PROMPTS), torch.tensor(SCORES))


def test_threads_may_share_a_reward(server):
    reward = remote(server, batch_size=2)
    futures = [in_thread(lambda: reward(IMAGES, PROMPTS)) for _ in range(16)]
    for future in futures:
        torch.testing.assert_close(future.result(60), torch.tensor(SCORES))
    assert len(server.posts) == 32
    assert reward.counts["requests"] == 32 + len(server.gets)


def test_what_cannot_be_sent_is_refused_before(server):
    reward = remote(server)
    with pytest.raises(ValueError, match=r"metadata of the prompt 'a blue square': it cannot"):
        reward(IMAGES, PROMPTS, [None, {"mask": object()}, None, None])
    with pytest.raises(ValueError, match=r"takes images \[B, 3, H, W\] and B prompts, got \[4, 3"):
        reward(IMAGES[:, :, 0], PROMPTS)
    with pytest.raises(ValueError, match="and 3 prompts"):
        reward(IMAGES, PROMPTS[:3])
    assert server.posts == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"url": "127.0.0.1:8000"}, "`url` must be like 'http://127.0.0.1:8000', got '127"),
        ({"url": "ftp://host"}, "`url` must be like"),
        ({"url": "http://user:secret@host"}, "must not hold a name or password"),
        ({"timeout": 0}, "`timeout` must be above 0 seconds, got 0"),
        ({"timeout": math.nan}, "`timeout` must be above 0 seconds, got nan"),
        ({"deadline": -1}, "`deadline` must be above 0 seconds, got -1"),
        ({"retries": -1}, "must be 0 or more, got -1 and 0.5"),
        ({"batch_size": 0}, "must be 1 or more, got 0 and 4"),
        ({"concurrency": 0}, "must be 1 or more, got 16 and 0"),
        ({"image_format": "webp"}, "`image_format` must be 'png' or 'jpeg', got 'webp'"),
    ],
)
def test_options_out_of_range_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        RemoteReward(**options)


def test_loopback():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.8.0.1", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "10.0.0.1", "node17", "localhost.evil.com", "")))


def test_scores_survive_the_wire_bit_by_bit():
    scores = Colorfulness()(torch.rand(64, 3, 8, 8), [""] * 64)
    ids = [str(k) for k in range(64)]
    answer = json.loads(wire.score_answer(ids, scores.tolist(), {}))
    assert torch.equal(torch.tensor(wire.parse_scores(answer, ids)[0]), scores)
