"""The server of rewards: its answers, its limits, its queue, and runs that outlive it."""

import base64
import io
import math
import multiprocessing
import os
import re
import signal
import socket
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from PIL import Image

from lit_align import reward_server
from lit_align.cli import main
from lit_align.reward_server import Limits, create_app, serve_reward
from lit_align.rewards import (
    Colorfulness,
    JPEGCompressibility,
    RemoteReward,
    RewardModule,
    ShapesVerifier,
    WeightedReward,
)
from lit_align.rewards.http_client import ServerRefusalError, ServerUnavailableError
from lit_align.rewards.scoring import RewardError
from tests import reward_process
from tests.algorithms.harness import Recorder, fit, make_ddpo, weights
from tests.conftest import PRELOADED

QUICK = {"retry_wait": 0.01, "timeout": 60.0}
SMALL = Limits(max_items=3, max_pixels=64 * 64, max_request_bytes=10000)


@contextmanager
def served(reward, **options):
    """Serve a reward from a thread; yield the URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(reward, **options), log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


@pytest.fixture(scope="module")
def url():
    with served(Colorfulness(), version="7", limits=SMALL) as url:
        yield url


class Brightness(RewardModule):
    """Mean pixel value; NaN for prompts about cats, and errors for those about dogs and birds."""

    needs_prompt = True

    def forward(self, images, prompts, metadata=None, group_ids=None):
        if "a dog" in prompts:
            raise ConnectionError("the judge is gone")
        scores = images.mean(dim=(1, 2, 3))
        scores[[prompt == "a cat" for prompt in prompts]] = math.nan
        scores[[prompt == "a bird" for prompt in prompts]] = math.inf
        return scores


def png(size=(4, 4), color=(51, 102, 153), **options):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, **{"format": "PNG", **options})
    return buffer.getvalue()


def bomb(width, height):
    """Return a PNG file of a few bytes that says it has so many pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def item(data=None, key="0", prompt="a red circle", file_format="png", **values):
    image = {"format": file_format, "data": base64.b64encode(data or png()).decode()}
    return {"id": key, "prompt": prompt, "image": image, "metadata": {}, **values}


def request(*items, **values):
    return {"protocol": 1, "reward": "Colorfulness", "items": list(items), **values}


def post(url, value, **options):
    return httpx.post(f"{url}/score", json=value, trust_env=False, **options)


def test_health(url):
    answer = httpx.get(f"{url}/health", trust_env=False)
    assert answer.status_code == 200
    assert answer.json() == {"name": "Colorfulness", "version": "7", "protocol": 1}


def test_an_answer_to_the_letter():
    value = request(item(key="a"), item(key="b", prompt="a cat"), reward="Brightness")
    with served(Brightness()) as url:
        answer = post(url, value)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {
        "scores": [
            {"id": "a", "score": pytest.approx(0.4), "error": None, "aux": {}},
            {"id": "b", "score": None, "error": "the reward gave NaN", "aux": {}},
        ]
    }


@pytest.mark.parametrize("reward", [Colorfulness(), ShapesVerifier(), JPEGCompressibility()])
def test_scores_are_those_of_the_local_reward(reward):
    images = torch.rand(9, 3, 32, 32).mul(255).round() / 255
    prompts = [f"a {color} circle" for color in ("red", "green", "blue") * 3]
    with served(reward) as url:
        remote = RemoteReward(url, reward=reward.name, batch_size=4, **QUICK)
        assert torch.equal(remote(images, prompts), reward(images, prompts))


BROKEN = [
    (request(item(), item(), item(), item()), 413, "too_large", "4 items, and at most 3"),
    (request(item(png((65, 64)))), 413, "too_large", "more than 4096 pixels: 65 x 64"),
    (request(item(bomb(50000, 50000))), 413, "too_large", "more than 4096 pixels"),
    (request(item(bomb(9000, 9000))), 413, "too_large", "more than 4096 pixels: 9000 x 9000"),
    (request(item(), prompt="x" * 10000), 413, "too_large", "more than 10000 bytes"),
    (request(item(), protocol=2), 422, "invalid_request", "'protocol' must be 1, got 2"),
    (request(item(), protocol=True), 422, "invalid_request", "'protocol' must be 1, got True"),
    (request(), 422, "invalid_request", "'items' must be a list of one item or more"),
    (request(item(), items="all"), 422, "invalid_request", "'items' must be a list"),
    (request(item(), item()), 422, "invalid_request", "same 'id'"),
    (request(item(key=1)), 422, "invalid_request", "'id' of item 0 must be a text, got 1"),
    (request(item(prompt=None)), 422, "invalid_request", "'prompt' of item 0 must be a text"),
    (request(item(metadata=[])), 422, "invalid_request", "'metadata' of item 0 must be a JSON"),
    (request(item(image="x")), 422, "invalid_request", "'image' of item 0 must be a JSON object"),
    (request(item(file_format="gif")), 422, "invalid_request", "must be 'png' or 'jpeg'"),
    (request(item(image={"format": "png", "data": "%"})), 422, "invalid_request", "no base64"),
    ([], 422, "invalid_request", "the request must be a JSON object"),
    (request(item(), reward="HPSv2"), 404, "unknown_reward", "there is no reward 'HPSv2' here"),
]


@pytest.mark.parametrize(("value", "status", "kind", "told"), BROKEN, ids=range(len(BROKEN)))
def test_bad_requests_get_typed_errors(url, value, status, kind, told):
    answer = post(url, value)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error.keys() == {"type", "message"}
    assert error["type"] == kind
    assert told in error["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 9000])
def test_bodies_that_are_no_json(url, content):
    answer = httpx.post(f"{url}/score", content=content, trust_env=False)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "bad_json")


def test_other_addresses_and_hosts(url):
    answer = httpx.get(f"{url}/docs", trust_env=False)
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found")
    answer = httpx.get(f"{url}/score", trust_env=False)
    assert (answer.status_code, answer.json()["error"]["type"]) == (405, "bad_request")
    answer = httpx.get(f"{url}/health", headers={"Host": "evil.example"}, trust_env=False)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "bad_host")


def test_bodies_are_read_no_further_than_the_limit(url):
    """Also where their length is not declared."""
    sent = []

    def long():
        for _ in range(25600):  # 100 MB
            sent.append(4096)
            yield b" " * 4096

    with suppress(httpx.TransportError):  # the answer may be lost with the connection
        answer = httpx.post(f"{url}/score", content=long(), trust_env=False)
        assert (answer.status_code, answer.json()["error"]["type"]) == (413, "too_large")
    assert sum(sent) < 50 * 2**20


def test_a_request_that_is_too_large_is_told_to_the_client(url):
    images = torch.rand(3, 3, 512, 512)
    with pytest.raises(ServerRefusalError, match="HTTP 413: the request has more than 10000 bytes"):
        RemoteReward(url, **QUICK)(images, [""] * 3)


def test_an_image_that_cannot_be_read_costs_only_its_own_score(url):
    cut = png((32, 32), compress_level=0)[:-500]
    mixed = [item(key="a"), item(cut, "b"), item(png(format="JPEG"), "c")]
    scores = post(url, request(*mixed)).json()["scores"]
    assert [entry["id"] for entry in scores] == ["a", "b", "c"]
    assert scores[0]["score"] > 0
    for entry in scores[1:]:
        assert entry["score"] is None
        assert "no readable png file" in entry["error"]


def test_images_of_several_sizes_and_modes_in_one_request():
    value = [
        item(key="a"),
        item(png((8, 2)), "b"),
        item(png(format="JPEG"), "c", file_format="jpeg"),
    ]
    gray = io.BytesIO()
    Image.new("L", (4, 4), 51).save(gray, "PNG")
    value.append(item(gray.getvalue(), "d"))
    with served(Brightness()) as url:
        scores = post(url, request(*value, reward="Brightness")).json()["scores"]
    assert [entry["id"] for entry in scores] == ["a", "b", "c", "d"]
    assert [entry["score"] for entry in scores] == pytest.approx([0.4, 0.4, 0.4, 0.2], abs=0.01)


def test_tokens(monkeypatch):
    images = torch.rand(2, 3, 4, 4)
    with served(Colorfulness(), token="right") as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}):
            for answer in (
                post(url, request(item()), headers=headers),
                httpx.get(f"{url}/health", headers=headers, trust_env=False),
            ):
                assert answer.status_code == 401
                assert answer.json()["error"]["type"] == "unauthorized"
                assert "right" not in answer.text
        for options in ({}, {"token": "wrong"}):
            with pytest.raises(ServerRefusalError, match=f"{url}.*set LIT_ALIGN_REWARD_TOKEN"):
                RemoteReward(url, **options, **QUICK)(images, ["", ""])
        monkeypatch.setenv("LIT_ALIGN_REWARD_TOKEN", "right")
        assert RemoteReward(url, **QUICK)(images, ["", ""]).isfinite().all()


@pytest.mark.parametrize(
    ("prompt", "told"),
    [("a dog", "ConnectionError: the judge is gone"), ("a bird", "infinite score")],
)
def test_a_reward_that_fails_is_named_without_a_trace(prompt, told):
    with served(Brightness()) as url:
        answer = post(url, request(item(prompt=prompt), reward="Brightness"))
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "reward_failed")
        message = answer.json()["error"]["message"]
        assert "Brightness" in message
        assert told in message
        assert "Traceback" not in message
        with pytest.raises(ServerUnavailableError, match=f"3 attempt.*HTTP 500: .*{told}"):
            RemoteReward(url, **QUICK)(torch.rand(1, 3, 4, 4), [prompt])
        assert post(url, request(item(), reward="Brightness")).status_code == 200


class Counted(Brightness):
    """Notes how many calls run at the same time."""

    now = most = calls = 0

    def forward(self, images, prompts, metadata=None, group_ids=None):
        self.now += 1
        self.most = max(self.most, self.now)
        self.calls += 1
        scores = super().forward(images, prompts, metadata, group_ids)
        self.now -= 1
        return scores


def test_200_requests_at_once_are_all_answered_one_batch_at_a_time():
    levels = torch.arange(200)
    images = (levels / 255).view(200, 1, 1, 1).expand(200, 3, 8, 8)
    reward, gate = Counted(), threading.Barrier(200)
    with served(reward) as url:
        remote = RemoteReward(url, batch_size=1, **QUICK)

        def ask(number):
            gate.wait(60)
            return float(remote(images[number : number + 1], ["a circle"]))

        with ThreadPoolExecutor(200) as pool:
            scores = list(pool.map(ask, range(200)))
    torch.testing.assert_close(torch.tensor(scores), levels / 255, atol=1e-6, rtol=0)
    assert (reward.most, reward.calls) == (1, 200 + remote.counts["retries"])


class Waiting(Brightness):
    """Scores when it may."""

    def __init__(self):
        super().__init__()
        self.begun, self.release = threading.Semaphore(0), threading.Event()
        self.calls = 0

    def forward(self, images, prompts, metadata=None, group_ids=None):
        self.calls += 1
        self.begun.release()
        assert self.release.wait(60)
        return super().forward(images, prompts, metadata, group_ids)


def until(condition):
    """Wait for a condition, 60 s at most."""
    ended = threading.Event()
    for _ in range(6000):
        if condition():
            return
        ended.wait(0.01)
    raise AssertionError("It never came true.")


def test_requests_beyond_the_queue_get_503_and_who_left_is_not_scored(monkeypatch):
    reward, queues = Waiting(), []

    class Watched(reward_server.Turns):
        def __init__(self, max_waiting):
            super().__init__(max_waiting)
            queues.append(self)

    monkeypatch.setattr(reward_server, "Turns", Watched)
    value = request(item(), reward="Waiting")
    with served(reward, limits=Limits(max_waiting=1)) as url, ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, url, value, timeout=60)
        assert reward.begun.acquire(timeout=60)
        left = pool.submit(post, url, value, timeout=0.5)
        until(lambda: queues[0].waiting == 1)
        refused = post(url, value)
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "overloaded")
        with pytest.raises(httpx.ReadTimeout):
            left.result(60)
        reward.release.set()
        assert first.result(60).status_code == 200
        until(lambda: queues[0].waiting == 0)
        assert post(url, value).status_code == 200
    assert reward.calls == 2


def test_what_cannot_be_served_is_refused(monkeypatch):
    monkeypatch.delenv("LIT_ALIGN_REWARD_TOKEN", raising=False)
    with pytest.raises(ValueError, match=r"`host` '0\.0\.0\.0' lets other machines in"):
        serve_reward(Colorfulness(), host="0.0.0.0")
    taken = socket.create_server(("127.0.0.1", 0))
    with pytest.raises(ValueError, match="cannot be used"):
        serve_reward(Colorfulness(), port=taken.getsockname()[1])
    taken.close()
    running = WeightedReward({"c": Colorfulness()}, {"c": 1.0})
    with pytest.raises(ValueError, match="WeightedReward compares images or keeps statistics"):
        create_app(running)
    with pytest.raises(ValueError, match="`max_items` must be 1 or more, got 0"):
        Limits(max_items=0)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(reward_server, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lit-align\[serve\]"'):
        serve_reward(Colorfulness())


def preloaded():
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    return server


def test_the_command_serves_until_it_is_interrupted():
    words = ["serve-reward", "--reward", "JPEGCompressibility", "--reward.negative", "true",
             "--port", "0", "--device", "cpu"]  # fmt: skip
    output = Path("told.txt").absolute()
    output.touch()
    process = preloaded().Process(
        target=reward_process.command, args=(str(output), "secret", words), daemon=True
    )
    process.start()
    try:
        until(lambda: output.read_text().count("\n") == 3 or not process.is_alive())
        told = output.read_text()
        assert "secret" not in told
        url = re.search(r"JPEGIncompressibility is served at (http://\S+);", told).group(1)
        assert f"--model.init_args.reward.url {url}" in told
        remote = RemoteReward(url, reward="JPEGIncompressibility", token="secret", **QUICK)
        images = torch.rand(3, 3, 16, 16).mul(255).round() / 255
        expected = JPEGCompressibility(negative=True)(images, [""] * 3)
        assert torch.equal(remote(images, [""] * 3), expected)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert (process.exitcode, output.read_text()) == (0, f"{told}The server has ended.\n")
    finally:
        process.kill()


def test_the_command_line_that_is_told_parses(capsys):
    words = ["--model.init_args.reward", "RemoteReward", "--model.init_args.reward.url",
             "http://127.0.0.1:1234", "--model.init_args.reward.reward", "HPSv2"]  # fmt: skip
    config = Path(reward_server.__file__).parent.parent / "configs/ddpo/shapes-sd_verifier.yaml"
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), *words, "--print_config"])
    printed = capsys.readouterr().out
    assert "class_path: lit_align.rewards.RemoteReward" in printed
    assert "url: http://127.0.0.1:1234" in printed


class Process:
    """A server that is started again when it has died, `restarts` times."""

    def __init__(self, calls, restarts):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.context = preloaded()
        self.codes, self.over = [], threading.Event()
        self.process = self._start(calls)
        self.watch = threading.Thread(target=self._restart, args=(restarts,), daemon=True)
        self.watch.start()

    def _start(self, *calls):
        process = self.context.Process(
            target=reward_process.serve, args=(self.port, *calls), daemon=True
        )
        process.start()
        return process

    def _restart(self, restarts):
        for _ in range(restarts):
            self.process.join()
            self.codes.append(self.process.exitcode)
            if self.over.is_set():
                return
            self.process = self._start()

    def stop(self):
        self.over.set()
        self.process.kill()
        self.watch.join(30)


@contextmanager
def dying(calls, restarts=1):
    process = Process(calls, restarts)
    try:
        yield process
    finally:
        process.stop()


ROUND = {"rollout_batch_size": 2, "minibatch_size": 8}
PATIENT = {"retries": 12, "retry_wait": 0.05, "batch_size": 2, "concurrency": 2, "timeout": 60.0}


def outcome(reward, **options):
    """Fit for two rounds of 8 images; return rewards by step and the weights."""
    recorder = Recorder()
    module = make_ddpo(reward=reward, **{**ROUND, **options})
    fit(module, callbacks=[recorder], max_epochs=2)
    name = f"rollout/reward/{reward.name}"
    return [metrics[name] for metrics in recorder.metrics], weights(module, True)


@pytest.mark.parametrize("background", [False, True])
def test_a_run_outlives_a_server_that_is_killed_and_restarted(background):
    expected_rewards, expected = outcome(Colorfulness(), background_rewards=background)
    with dying(calls=3) as server:
        reward = RemoteReward(server.url, reward="Colorfulness", **PATIENT)
        reward.connect(math.inf)
        rewards, found = outcome(reward, background_rewards=background)
        assert server.codes == [-signal.SIGKILL]
    assert rewards == expected_rewards
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert reward.counts["retries"] > 0
    assert reward.counts["unscored"] == 0


def test_a_run_ends_with_the_url_of_a_server_that_is_gone():
    with dying(calls=3, restarts=0) as server:
        reward = RemoteReward(server.url, reward="Colorfulness", **PATIENT)
        reward.connect(math.inf)
        reward.client.retries, reward.client.retry_wait = 2, 0.01
        with pytest.raises(RewardError, match=f"Colorfulness failed for .*{server.url} did not"):
            outcome(reward)
