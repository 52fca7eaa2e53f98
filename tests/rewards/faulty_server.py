"""A server of rewards that fails as it is told to, and the table of what must come of it.

`python -m tests.rewards.faulty_server` prints the table as it is measured.
"""

import base64
import io
import json
import threading
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image

from lit_align.rewards.http_client import ServerRefusalError, ServerUnavailableError
from lit_align.rewards.remote import RemoteReward
from lit_align.rewards.wire import ProtocolError

HEALTH = {"name": "Brightness", "version": "1", "protocol": 1}
IMAGES = torch.arange(1, 5).view(4, 1, 1, 1).expand(4, 3, 8, 8) / 5  # no score is 0
PROMPTS = ["a red circle", "a blue square", "a triangle", "two circles"]
SCORES = [0.2, 0.4, 0.6, 0.8]
QUICK = {"timeout": 30.0, "retry_wait": 0.01, "deadline": 60.0}
HUGE = 100 * 2**20


def brightness(request):
    """Return the answer to a request: mean pixel values, read without the package."""
    scores = []
    for item in request["items"]:
        image = Image.open(io.BytesIO(base64.b64decode(item["image"]["data"])))
        value = float(np.asarray(image).mean() / 255)
        scores.append({"id": item["id"], "score": value, "error": None, "aux": {}})
    return {"scores": scores}


class FaultyServer:
    """Serves on a free port; see `serving`.

    Attributes:
        behave: What to do with the n-th request (from 0): called with n and the request's value,
            it returns a value to answer, or a function of the handler that answers itself.
        health: What `GET /health` answers.
        gets, posts: Requests so far: paths, and values with their headers.
        sent: Bytes of huge answers that were sent.
        most_at_once: Requests that were answered at the same time.
    """

    def __init__(self, behave=None, health=HEALTH):
        self.behave = behave or (lambda number, request: brightness(request))
        self.health, self.release = health, threading.Event()
        self.gets, self.posts, self.sent = [], [], 0
        self.now, self.most_at_once = 0, 0
        self.lock = threading.Lock()
        self.http = Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.release.set()
        self.http.shutdown()
        self.http.server_close()


class Server(ThreadingHTTPServer):
    request_queue_size = 256  # connections that may wait for a thread
    daemon_threads = True


@contextmanager
def serving(behave=None, health=HEALTH):
    server = FaultyServer(behave, health)
    try:
        yield server
    finally:
        server.stop()


def _handler(server):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            with server.lock:
                server.gets.append(self.path)
            answer(server.health)(self)

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                number = len(server.posts)
                server.posts.append((request, dict(self.headers), self.path))
                server.now += 1
                server.most_at_once = max(server.most_at_once, server.now)
            try:
                behaviour = server.behave(number, request)
                (behaviour if callable(behaviour) else answer(behaviour))(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with server.lock:
                    server.now -= 1

        def log_message(self, *words):
            pass

    Handler.server_of_tests = server
    return Handler


def answer(value, status=200):
    """Return a behaviour that answers a JSON value; bytes as they are."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()

    def behave(handler):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return behave


def failure(status, message="the judge is ill"):
    return answer({"error": {"type": "some_type", "message": message}}, status)


def truncated(handler):
    """Promise more bytes than come."""
    body = b'{"scores": [{"id": "0", "sco'
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(body)
    handler.close_connection = True


def huge(handler):
    """Send 100 MB, as far as they are read."""
    server = handler.server_of_tests
    handler.send_response(200)
    handler.send_header("Content-Length", str(HUGE))
    handler.end_headers()
    handler.close_connection = True
    block = b" " * 65536
    while server.sent < HUGE:
        handler.wfile.write(block)
        server.sent += len(block)


def slow(handler):
    """Answer when the test is over."""
    handler.server_of_tests.release.wait(60)
    handler.close_connection = True


def dripping(handler):
    """Send a byte every now and then, without end."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    handler.close_connection = True
    while not handler.server_of_tests.release.wait(0.02):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def changed(**values):
    """Return a behaviour whose second score has other values; None as a name removes it."""

    def behave(number, request):
        scores = brightness(request)
        scores["scores"][1].update(values)
        return scores

    return behave


def nameless(number, request):
    scores = brightness(request)
    del scores["scores"][1]["id"]
    return scores


def first(count, fault):
    """Return a behaviour that fails `count` times."""
    return lambda number, request: fault if number < count else brightness(request)


def always(fault):
    return lambda number, request: fault


def one_less(number, request):
    return {"scores": brightness(request)["scores"][:-1]}


@dataclass
class Fault:
    """What a server does, and what comes of a call with four images in one request.

    Attributes:
        name: In the table.
        behave: See `FaultyServer`.
        expected: The scores, or the error's class and a part of its message.
        posts: Requests for scores that are made.
        options: Of the reward.
        health: See `FaultyServer`.
    """

    name: str
    behave: Any
    expected: Any
    posts: int
    options: dict[str, Any] = field(default_factory=dict)
    health: Any = field(default_factory=lambda: HEALTH)


NAN = float("nan")
SECOND_NAN = [SCORES[0], NAN, *SCORES[2:]]
GONE, REFUSED = ServerUnavailableError, ServerRefusalError
SHORT = {"timeout": 0.5}
FAULTS = [
    Fault("none", None, SCORES, 1),
    Fault("slow", always(slow), (GONE, "3 attempt.*ReadTimeout"), 3, SHORT),
    Fault("slow once", first(1, slow), SCORES, 2, {"timeout": 1.5}),
    Fault("dripping", always(dripping), (GONE, "3 attempt.*took too long"), 3, SHORT),
    Fault("500 twice", first(2, failure(500)), SCORES, 3),
    Fault("500 forever", always(failure(500)), (GONE, "HTTP 500: the judge is ill"), 3),
    Fault("503 forever", always(failure(503)), (GONE, "HTTP 503"), 3),
    Fault("429 once", first(1, failure(429)), SCORES, 2),
    Fault("408 once", first(1, failure(408)), SCORES, 2),
    Fault("400", always(failure(400)), (REFUSED, "HTTP 400: the judge is ill"), 1),
    Fault("404", always(failure(404)), (REFUSED, "HTTP 404"), 1),
    Fault("413", always(failure(413)), (REFUSED, "HTTP 413"), 1),
    Fault("422", always(failure(422)), (REFUSED, "HTTP 422"), 1),
    Fault("redirect", always(failure(302)), (REFUSED, "points to another address"), 1),
    Fault("wrong token", always(failure(401)), (REFUSED, "set LIT_ALIGN_REWARD_TOKEN"), 1),
    Fault("wrong length", one_less, (ProtocolError, "3 scores for 4 images"), 1),
    Fault("null", changed(score=None, error="no face"), SECOND_NAN, 1),
    Fault("NaN", changed(score=NAN), SECOND_NAN, 1),
    Fault("no id", nameless, SECOND_NAN, 1),
    Fault("infinity", changed(score=float("inf")), (ProtocolError, "must be finite"), 1),
    Fault("-infinity", changed(score=-float("inf")), (ProtocolError, "must be finite"), 1),
    Fault("1e39", changed(score=1e39), (ProtocolError, "finite in float32"), 1),
    Fault("true", changed(score=True), (ProtocolError, "a number or null, got True"), 1),
    Fault("text", changed(score="0.5"), (ProtocolError, "a number or null, got '0.5'"), 1),
    Fault("unknown id", changed(id="9"), (ProtocolError, "unknown 'id' '9'"), 1),
    Fault("id twice", changed(id="0"), (ProtocolError, "two scores have the 'id' '0'"), 1),
    Fault("a list", always([1, 2, 3, 4]), (ProtocolError, "must be a JSON object"), 1),
    Fault("truncated", always(truncated), (GONE, "RemoteProtocolError"), 3),
    Fault("truncated once", first(1, truncated), SCORES, 2),
    Fault("no JSON", always(answer(b"<html>")), (GONE, "no JSON"), 3),
    Fault("no JSON once", first(1, answer(b"<html>")), SCORES, 2),
    Fault("nested", always(answer(b"[" * 200000)), (GONE, "no JSON"), 3),
    Fault("100 MB", always(huge), (ProtocolError, "more than 16777216 bytes"), 1),
    Fault("protocol 2", None, (ProtocolError, "'protocol' must be 1, got 2"), 0, {},
          {**HEALTH, "protocol": 2}),
]  # fmt: skip


def outcome(fault):
    """Return what came of a call: scores or error, requests for scores, the server."""
    with serving(fault.behave, fault.health) as server:
        reward = RemoteReward(server.url, **{**QUICK, **fault.options})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of images that could not be scored
                result = reward(IMAGES, PROMPTS)
        except Exception as error:
            result = error
        return result, len(server.posts), server, reward


def main():
    print(f"{'fault':16} {'requests':8} outcome")
    for fault in FAULTS:
        result, posts, server, _ = outcome(fault)
        told = (
            [round(s, 4) for s in result.tolist()]
            if isinstance(result, torch.Tensor)
            else f"{type(result).__name__}: {result}".replace(server.url, "URL")
        )
        print(f"{fault.name:16} {posts:8} {told}")


if __name__ == "__main__":
    main()
