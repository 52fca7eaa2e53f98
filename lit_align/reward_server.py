"""A reward served over HTTP for `RemoteReward`: `run.py serve-reward`.

The protocol is that of `lit_align.rewards.wire`. One batch is scored at a time, and requests wait
for their turn in the order in which they came. With a token every request must bring it; without
one, only programs of this machine are served.
"""
# Annotations are evaluated, not postponed: FastAPI reads those of functions inside functions.

import asyncio
import logging
import math
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from lit_align import __version__
from lit_align.rewards import RewardModule
from lit_align.rewards.http_client import is_loopback
from lit_align.rewards.remote import TOKEN_VARIABLE
from lit_align.rewards.scoring import RewardError, call_reward
from lit_align.rewards.wire import (
    PROTOCOL,
    Item,
    ProtocolError,
    TooLargeError,
    decode_image,
    error_answer,
    from_json,
    parse_score_request,
    score_answer,
    to_json,
)
from lit_align.trajectory import PromptBatch

_log = logging.getLogger(__name__)
_GRACE = 10  # seconds that requests get to end in after Ctrl-C


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        max_items: Images per request.
        max_pixels: Height times width of an image.
        max_request_bytes: Of a request's body.
        max_waiting: Requests that wait for their turn; further ones get 503 and may come again.

    Raises:
        ValueError: If one is below 1.
    """

    max_items: int = 64
    max_pixels: int = 2048 * 2048
    max_request_bytes: int = 128 * 2**20
    max_waiting: int = 1024

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {value}.")


class FailedRequestError(Exception):
    """A request gets an error for an answer.

    Attributes:
        status: HTTP status.
        kind: Its type in the answer.
        message: What is wrong.
        headers: Of the answer.
    """

    def __init__(
        self, status: int, kind: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.headers = status, kind, message, headers


def serve_reward(
    reward: RewardModule,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    device: str | None = None,
    version: str | None = None,
    limits: Limits = Limits(),
) -> None:
    """Serve a reward over HTTP, for `RemoteReward` in other processes and on other machines.

    Args:
        reward: Scores the images; one that scores each image alone.
        host: Address to listen on. Others than this machine's own need a token.
        port: To listen on; 0 takes a free one.
        token: What requests must bring; if None that of the environment variable
            LIT_ALIGN_REWARD_TOKEN, which other users of the machine do not see.
        device: Of the reward; a GPU if there is one.
        version: What clients are told; they refuse scores of a second version. By default this
            package's.
        limits: Of one request.

    Raises:
        ValueError: If the reward compares images, another machine's address comes without a token,
            or the port is in use.
        ModuleNotFoundError: If the libraries of the server are not installed.
    """
    token = token or os.environ.get(TOKEN_VARIABLE) or None
    if missing := [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]:
        raise ModuleNotFoundError(
            f'The server needs {missing[0]}; install it by `pip install "lit-align[serve]"`.'
        )
    if not is_loopback(host) and token is None:
        raise ValueError(
            f"`host` {host!r} lets other machines in, so there must be a token: set "
            f"{TOKEN_VARIABLE}. Without one, keep 127.0.0.1 and reach it by "
            f"`ssh -L {port}:127.0.0.1:{port}`."
        )
    reward.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    app = create_app(reward, token, version or f"lit_align {__version__}", limits)
    with _listening(host, port) as listener:
        _announce(reward.name, host, listener.getsockname()[1], token)
        run_app(app, listener)


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(f"`host` {host!r} and `port` {port} cannot be used ({error}).") from error


def _announce(name: str, host: str, port: int, token: str | None) -> None:
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"{name} is served at {url}; Ctrl-C ends it. In a run:", flush=True)
    if token:
        print(f"    export {TOKEN_VARIABLE}=...   # the same token", flush=True)
    print(
        "    python run.py fit ... --model.init_args.reward RemoteReward "
        f"--model.init_args.reward.url {url} --model.init_args.reward.reward {name}",
        flush=True,
    )


def run_app(app: Any, listener: socket.socket) -> None:
    """Serve an app on a listening socket until the process is interrupted."""
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE)
    # Uvicorn raises it again after it has ended, unless the shell left interrupts to be ignored.
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
    print("The server has ended.", flush=True)


def create_app(
    reward: RewardModule,
    token: str | None = None,
    version: str = f"lit_align {__version__}",
    limits: Limits = Limits(),
) -> Any:
    """Return the FastAPI app that serves a reward.

    Args:
        reward: On its device.
        token: What requests must bring; with None they must be addressed to this machine's own
            name, as a page in a browser could send them under another.
        version: Of the reward.
        limits: Of one request.

    Raises:
        ValueError: If the reward compares images or keeps statistics.
    """
    from fastapi import FastAPI, Request, Response

    _check_pointwise(reward)
    reward.requires_grad_(False).eval()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _tell_failures(app)
    turns = Turns(limits.max_waiting)

    @app.get("/health")
    async def health(request: Request) -> Response:
        check_caller(request, token)
        return _answer(to_json({"name": reward.name, "version": version, "protocol": PROTOCOL}))

    @app.post("/score")
    async def score(request: Request) -> Response:
        check_caller(request, token)
        body = await read_body(request, limits.max_request_bytes)
        async with turns.turn():
            if await request.is_disconnected():  # it gave up, and may ask again
                raise FailedRequestError(499, "disconnected", "nobody waits for the answer")
            return _answer(await asyncio.to_thread(scored, reward, body, limits))

    return app


def _tell_failures(app: Any) -> None:
    """Make an app answer failures in the protocol."""
    from fastapi import Request, Response
    from starlette.exceptions import HTTPException

    @app.exception_handler(FailedRequestError)
    async def failed(request: Request, error: FailedRequestError) -> Response:
        return _answer(error_answer(error.kind, error.message), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        kind = "not_found" if error.status_code == 404 else "bad_request"
        return _answer(error_answer(kind, str(error.detail)), error.status_code)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return _answer(error_answer("server_failed", f"{type(error).__name__}: {error}"), 500)


def _answer(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Any:
    from fastapi import Response

    return Response(body, status, headers, media_type="application/json")


def _check_pointwise(reward: RewardModule) -> None:
    if reward.granularity != "pointwise" or reward.statistics():
        raise ValueError(
            f"{reward.name} compares images or keeps statistics of them, and a server sees only "
            "some of them at a time; serve its parts, and combine their scores in the run."
        )


class Turns:
    """Lets one request through at a time, in the order in which they came.

    Args:
        max_waiting: How many may wait.
    """

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting, self.waiting = max_waiting, 0
        self._lock = asyncio.Lock()

    def turn(self) -> "Turns":
        """Return the context in which it is a request's turn.

        Raises:
            FailedRequestError: With 503, if too many wait already.
        """
        if self.waiting >= self.max_waiting:
            raise FailedRequestError(503, "overloaded", f"{self.waiting} requests wait already")
        return self

    async def __aenter__(self) -> None:
        """Wait for the turn."""
        self.waiting += 1
        try:
            await self._lock.acquire()
        finally:
            self.waiting -= 1

    async def __aexit__(self, *error: object) -> None:
        """Let the next one through."""
        self._lock.release()


def check_caller(request: Any, token: str | None) -> None:
    """Check that a request may be answered.

    Raises:
        FailedRequestError: With 401 if it brings not the token, in a time that tells nothing of
            it; with 400 if there is none and it is addressed to another host.
    """
    if token is None:
        host = request.url.hostname or ""
        if not is_loopback(host):
            raise FailedRequestError(400, "bad_host", f"this server has no name {host[:100]!r}")
        return
    given = request.headers.get("authorization", "")
    if not secrets.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise FailedRequestError(401, "unauthorized", "the bearer token is missing or wrong")


async def read_body(request: Any, limit: int) -> bytes:
    """Return the body of a request, read no further than `limit` bytes.

    Raises:
        FailedRequestError: With 413 if there are more.
    """
    told = f"the request has more than {limit} bytes; send fewer images at a time"
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > limit:
        raise FailedRequestError(413, "too_large", told)  # the rest is read and forgotten
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:  # nobody said how many would come
            raise FailedRequestError(413, "too_large", told, {"Connection": "close"})
    return bytes(body)


def scored(reward: RewardModule, body: bytes, limits: Limits) -> bytes:
    """Return the answer to the body of ``POST /score``.

    Raises:
        FailedRequestError: With 400, 404, 413 or 422 for a request that cannot be answered, with
            500 if the reward failed.
    """
    try:
        name, items = parse_score_request(_json(body), limits.max_items)
        if name != reward.name:
            message = f"there is no reward {name[:100]!r} here; this server has {reward.name!r}"
            raise FailedRequestError(404, "unknown_reward", message)
        images, errors = _decoded(items, limits.max_pixels)
    except TooLargeError as error:
        raise FailedRequestError(413, "too_large", str(error)) from error
    except ProtocolError as error:
        raise FailedRequestError(422, "invalid_request", str(error)) from error
    scores = dict.fromkeys((item.id for item in items), math.nan)
    for group in _by_shape(items, images):
        stacked = torch.stack([images[item.id] for item in group])
        found = _score(reward, group, stacked)
        scores.update(zip((item.id for item in group), found, strict=True))
    return score_answer(list(scores), list(scores.values()), errors)


def _json(body: bytes) -> Any:
    try:
        return from_json(body)
    except ValueError as error:
        raise FailedRequestError(400, "bad_json", f"the body is no JSON ({error})") from error


def _decoded(items: list[Item], max_pixels: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the images [3, H, W] uint8 by id; of those that cannot be read, why."""
    images, errors = {}, {}
    for item in items:
        try:
            images[item.id] = decode_image(item, max_pixels)
        except TooLargeError:
            raise
        except ProtocolError as error:
            errors[item.id] = str(error)
    return images, errors


def _by_shape(items: list[Item], images: dict[str, torch.Tensor]) -> Iterator[list[Item]]:
    """Yield the items with an image in groups of one height and width."""
    groups: dict[torch.Size, list[Item]] = {}
    for item in items:
        if item.id in images:
            groups.setdefault(images[item.id].shape, []).append(item)
    yield from groups.values()


@torch.no_grad()
def _score(reward: RewardModule, items: list[Item], pixels: torch.Tensor) -> list[float]:
    """Return the reward's scores of images [N, 3, H, W] uint8."""
    device = next((t.device for t in [*reward.parameters(), *reward.buffers()]), None)
    numbers = torch.arange(len(items))
    batch = PromptBatch(
        [item.prompt for item in items],
        [item.metadata or None for item in items],
        numbers,
        numbers,
        numbers,
    )
    if device is not None:
        pixels, batch = pixels.to(device), batch.to(device)
    try:
        scores = call_reward(reward, pixels.float() / 255, batch)
        if scores.isinf().any():
            raise RewardError(f"{reward.name} gave an infinite score.")
    except RewardError as error:
        _log.exception("A request failed.")
        raise FailedRequestError(500, "reward_failed", str(error)) from error
    values: list[float] = scores.tolist()
    return values
