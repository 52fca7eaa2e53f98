"""A reward that lives in another process or on another machine, asked over HTTP."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from lit_align.rewards.http_client import JSONClient, UnansweredError
from lit_align.rewards.scoring import RewardError
from lit_align.rewards.served import Answer, ServedReward
from lit_align.rewards.wire import (
    ImageFormat,
    Item,
    ProtocolError,
    parse_health,
    parse_scores,
    score_request,
)

TOKEN_VARIABLE = "LIT_ALIGN_REWARD_TOKEN"


class RemoteReward(ServedReward):
    """The scores of a server that speaks protocol 1 (see `wire`), such as `run.py serve-reward`.

    The server is asked who it is before the first image and after each lost connection: all scores
    come from one reward in one version. An image that it could not score is NaN. A server that
    fails as a whole raises: what may pass (no connection, no answer in time, 408, 429, 5xx, an
    answer that is cut) after `retries`, anything else at once.

    Args:
        url: Of the server.
        reward: Name that the server's reward must have, and the name in logs; None takes any, and
            logs it as RemoteReward.
        token: Sent to the server; if None that of the environment variable LIT_ALIGN_REWARD_TOKEN,
            which, unlike this argument, is not written to the run's configuration.
        timeout: Seconds for one request.
        retries: Further attempts per request.
        retry_wait: Seconds before the first of them; each further wait is twice as long, up to 30.
        deadline: Seconds for one call with all its requests. Keep it below the time-out of the
            process group, which other processes wait in (10 minutes with NCCL).
        batch_size: Images per request.
        concurrency: Requests at the same time.
        image_format: "png" is lossless; "jpeg" (quality 95, 4:4:4) is smaller and changes scores a
            little, so it suits no reward that looks at compression or at small print.
        needs_prompt: Whether the server's reward looks at the prompts.

    Attributes:
        served: Name and version of the server's reward, None before it was asked.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        reward: str | None = None,
        token: str | None = None,
        timeout: float = 60.0,
        retries: int = 2,
        retry_wait: float = 0.5,
        deadline: float = 540.0,
        batch_size: int = 16,
        concurrency: int = 4,
        image_format: ImageFormat = "png",
        needs_prompt: bool = True,
    ) -> None:
        client = JSONClient(url, token, TOKEN_VARIABLE, timeout, retries, retry_wait)
        super().__init__(client, deadline, batch_size, concurrency, image_format)
        self.reward = reward
        self.needs_prompt = needs_prompt  # type: ignore[misc]
        self.served: tuple[str, str] | None = None
        self._connected = False

    @property
    def name(self) -> str:
        """The reward's name as it was given, else RemoteReward."""
        return self.reward or type(self).__name__

    def connect(self, ends: float) -> None:
        """Ask the server who it is, if that is not known; see `ask`."""
        self.client.retry(lambda: self._identified(ends), ends)

    def ask(self, items: list[Item], ends: float) -> Answer:
        """Return the scores of one request's items; see the base class.

        Raises:
            RewardError: If the server has another reward than it should, or another version than
                before.
        """

        def attempt() -> Any:
            try:
                body = score_request(self._identified(ends), items)
                return self.client.send("POST", "/score", body, ends)
            except UnansweredError as failure:
                self._connected = self._connected and not failure.lost
                raise

        answer = self.client.retry(attempt, ends)
        try:
            return parse_scores(answer, [item.id for item in items])
        except ProtocolError as error:
            raise ProtocolError(f"The answer of {self.client.url} is unusable: {error}.") from error

    def _identified(self, ends: float) -> str:
        """Return the name of the server's reward, asked for unless the connection held."""
        if self._connected and self.served is not None:
            return self.served[0]
        answer = self.client.send("GET", "/health", None, ends)
        try:
            served = parse_health(answer)
        except ProtocolError as error:
            raise ProtocolError(f"{self.client.url} serves no reward: {error}.") from error
        if self.reward is not None and served[0] != self.reward:
            raise RewardError(
                f"{self.client.url} serves {served[0]!r}, and `reward` asks for {self.reward!r}; "
                "start that server, or change `reward`."
            )
        with self.client.lock:
            before, self.served = self.served, self.served or served
        if before is None and not (dist.is_available() and _rank()):
            print(f"{self.name}: {' '.join(served)} at {self.client.url}.", flush=True)
        elif before is not None and before != served:
            raise RewardError(
                f"{self.client.url} now serves {' '.join(served)} and served {' '.join(before)} "
                "before; scores of one run must come from one version."
            )
        self._connected = True
        return served[0]

    def __getstate__(self) -> dict[str, Any]:
        """Make a copy ask the server again."""
        return {**self.__dict__, "_connected": False}

    def extra_repr(self) -> str:
        """Return where the scores come from."""
        return f"url={self.client.url!r}, served={self.served}"


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
