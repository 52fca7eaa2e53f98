"""JSON requests to a reward's server that end in bounded time: limits, and a few retries."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, TypeVar

import httpx

from lit_align.rewards.scoring import RewardError, in_thread
from lit_align.rewards.wire import ProtocolError, from_json, parse_error

T = TypeVar("T")
P = TypeVar("P")
MAX_RESPONSE_BYTES = 16 * 2**20  # far above any list of scores
_MAX_ERROR_BYTES = 4096  # of a failure's body, as much as its message needs
_LONGEST_WAIT = 30.0  # seconds between two attempts
_RETRIED = (408, 429)  # and 500 to 599
_GRACE = 1.0  # seconds that a thread gets to notice the deadline itself


class ServerUnavailableError(RewardError):
    """A server gave no usable answer, with all retries or within the deadline."""


class ServerRefusalError(RewardError):
    """A server refused a request, which would not be better the next time.

    Attributes:
        status: HTTP status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class UnansweredError(Exception):
    """One attempt failed in a way that may pass.

    Attributes:
        lost: Whether there was no HTTP answer at all: the server may be another one next time.
    """

    def __init__(self, message: str, lost: bool) -> None:
        super().__init__(message)
        self.lost = lost


@dataclass
class JSONClient:
    """Speaks JSON with one server, from any number of threads.

    It keeps no socket when it is copied or pickled.

    Attributes:
        url: Of the server, without a path's last slash.
        token: Sent as bearer; None for that of the environment.
        token_variable: Environment variable that may hold the token.
        timeout: Seconds for one attempt.
        retries: Further attempts on a connection error, a time-out, 408, 429 or 5xx.
        retry_wait: Seconds before the first of them, doubled each time up to 30.
        max_response_bytes: A longer answer is not read to its end.
        counts: "requests" that were sent and "retries", so far.
        lock: For what the threads share.

    Raises:
        ValueError: If an attribute is out of its range.
    """

    url: str
    token: str | None
    token_variable: str
    timeout: float
    retries: int
    retry_wait: float
    max_response_bytes: int = MAX_RESPONSE_BYTES
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.url = self.url.rstrip("/")
        _check_url(self.url)
        if not self.timeout > 0:
            raise ValueError(f"`timeout` must be above 0 seconds, got {self.timeout}.")
        if self.retries < 0 or self.retry_wait < 0:
            raise ValueError(
                "`retries` and `retry_wait` must be 0 or more, got "
                f"{self.retries} and {self.retry_wait}."
            )
        self._open()

    def _open(self) -> None:
        self.lock = threading.Lock()
        self._http: httpx.Client | None = None
        self._process = 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave sockets and locks behind."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_http", "lock", "_process")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start without a connection."""
        self.__dict__.update(state)
        self._open()

    def close(self) -> None:
        """Close the connections; the next request opens others."""
        with self.lock:
            if self._http is not None and self._process == os.getpid():
                self._http.close()
            self._http = None

    def retry(self, attempt: Callable[[], T], deadline: float) -> T:
        """Return what `attempt` returns, tried again as often as it may be.

        Args:
            attempt: Raises `UnansweredError` for what may pass.
            deadline: On the clock of `now`.

        Raises:
            ServerUnavailableError: If no attempt was answered; names the URL and the last reason.
        """
        for number in range(self.retries + 1):
            try:
                return attempt()
            except UnansweredError as failure:
                told, lost = f"the last failed with: {failure}", failure.lost
            pause = min(self.retry_wait * 2**number, _LONGEST_WAIT)
            if number < self.retries and now() + pause >= deadline:
                raise ServerUnavailableError(
                    f"{self.url} did not answer before the deadline, in {number + 1} attempt(s); "
                    f"{told}."
                )
            if number < self.retries:
                self.count("retries")
                sleep(pause)
        hint = " Is its server running, and is this its address?" if lost else ""
        raise ServerUnavailableError(
            f"{self.url} did not answer in {self.retries + 1} attempt(s); {told}.{hint}"
        )

    def send(self, method: str, path: str, body: bytes | None, deadline: float) -> Any:
        """Return the JSON value that the server answers to one request.

        Raises:
            UnansweredError: If that failed in a way that may pass.
            ServerRefusalError: If the server refused.
            ProtocolError: If it answers with too many bytes.
            ServerUnavailableError: If the deadline is over already.
        """
        seconds = min(self.timeout, deadline - now())
        if seconds <= 0:
            raise ServerUnavailableError(f"{self.url} did not answer before the deadline.")
        self.count("requests")
        try:
            with self._connected().stream(
                method, self.url + path, content=body, headers=self._headers(), timeout=seconds
            ) as response:
                status, text = response.status_code, self._read(response, now() + seconds)
        except httpx.TransportError as error:
            kind = type(error).__name__
            raise UnansweredError(f"{kind}: {error or 'no answer'}", lost=True) from error
        if status in _RETRIED or status >= 500:
            raise UnansweredError(f"HTTP {status}: {parse_error(text)}", lost=False)
        if not 200 <= status < 300:
            raise ServerRefusalError(self._refused(status, text), status)
        try:
            return from_json(text)
        except ValueError as error:
            raise UnansweredError(f"the answer is no JSON ({error})", lost=True) from error

    def _read(self, response: httpx.Response, ends: float) -> bytes:
        """Return the body, or of a failure its start; in bounded time also if it drips."""
        failed = response.status_code >= 300
        limit = _MAX_ERROR_BYTES if failed else self.max_response_bytes
        text = bytearray()
        for chunk in response.iter_raw():
            text += chunk
            if len(text) > limit:
                if failed:
                    break
                raise ProtocolError(
                    f"{self.url} answers with more than {limit} bytes, which no list of scores has"
                )
            if now() > ends:
                raise httpx.ReadTimeout("the answer took too long")
        return bytes(text)

    def _refused(self, status: int, text: bytes) -> str:
        told = f"{self.url} refused the request, HTTP {status}: {parse_error(text)}."
        if status in (401, 403):
            held = "The token at hand is not the server's" if self._token() else "There is no token"
            return f"{told} {held}; set {self.token_variable}."
        if status < 400:
            return f"{told} It points to another address; give that one."
        return told

    def _connected(self) -> httpx.Client:
        """Return this process's pool of connections."""
        with self.lock:
            if self._http is None or self._process != os.getpid():
                local = is_loopback(httpx.URL(self.url).host)
                if self._token() and not local and self.url.startswith("http:"):
                    warnings.warn(
                        f"The token for {self.url} travels unencrypted; use https, or a tunnel "
                        "(`ssh -L`) to the server's loopback address.",
                        stacklevel=2,
                    )
                # A proxy knows nothing of this machine's own addresses.
                limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
                self._http = httpx.Client(trust_env=not local, limits=limits)
                self._process = os.getpid()
            return self._http

    def _token(self) -> str | None:
        token = self.token or os.environ.get(self.token_variable) or None
        if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
            raise ValueError(
                f"The token for {self.url} must consist of printable ASCII characters without "
                f"spaces; check `token` or {self.token_variable}."
            )
        return token

    def _headers(self) -> dict[str, str]:
        # Packed answers could grow beyond the limit on their bytes.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        token = self._token()
        return {**headers, "Authorization": f"Bearer {token}"} if token else headers

    def count(self, what: str, number: int = 1) -> None:
        """Add to `counts`."""
        with self.lock:
            self.counts[what] += number


def in_parallel(
    function: Callable[[P], T], parts: Sequence[P], concurrency: int, seconds: float
) -> list[T]:
    """Return ``function(part)`` of all parts, computed by up to `concurrency` threads.

    Raises:
        ServerUnavailableError: If that takes longer than `seconds`; also the first error of a part,
            with which the parts that were not begun are dropped.
    """
    left = deque(enumerate(parts))
    results: dict[int, T] = {}

    def work() -> None:
        while left:
            try:
                place, part = left.popleft()
            except IndexError:  # another thread was quicker
                return
            try:
                results[place] = function(part)
            except BaseException:
                left.clear()
                raise

    futures: list[Future[None]] = [in_thread(work) for _ in parts[:concurrency]]
    done, late = wait(futures, seconds + _GRACE, FIRST_EXCEPTION)
    for future in done:
        future.result()
    if late:
        left.clear()
        raise ServerUnavailableError(f"Not all images were scored within {seconds:g} seconds.")
    return [results[place] for place in range(len(parts))]


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine, by its name or address."""
    try:
        return host == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _check_url(url: str) -> None:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"`url` {url!r} is no address ({error}).") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"`url` must be like 'http://127.0.0.1:8000', got {url!r}.")
    if parsed.userinfo:
        raise ValueError("`url` must not hold a name or password; give a token instead.")


def now() -> float:
    """Return seconds on a clock that never goes back."""
    return time.monotonic()


def sleep(seconds: float) -> None:
    """Wait."""
    time.sleep(seconds)
