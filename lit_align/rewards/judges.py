"""Vision-language models as judges, behind the chat interface that their servers share.

vLLM, SGLang and others answer ``POST /v1/chat/completions`` as OpenAI does. A judge is asked one
question per image, at temperature 0, in one of two ways:

    yes_no   r = P(yes) / (P(yes) + P(no)), from the log probabilities of the answer's first token,
             each summed over spellings ("Yes", " yes", ...); the form of VQAScore,
             arXiv:2404.01291
    score    r = x / 5 of an answer that ends in "Final Score: x", x in [1, 5], as Flow-GRPO asks
             UnifiedReward (arXiv:2505.05470, arXiv:2503.05236)

An answer that holds neither is NaN, where Flow-GRPO's code gives 0.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterator
from typing import Any, Literal, get_args

from torch import Tensor

from lit_align.functional.pixels import resize
from lit_align.rewards.http_client import JSONClient
from lit_align.rewards.served import Answer, ServedReward
from lit_align.rewards.wire import Item, ProtocolError, to_json

Mode = Literal["yes_no", "score"]
QUESTIONS: dict[Mode, str] = {
    "yes_no": 'Does this image show "{prompt}", completely and with nothing wrong? '
    "Answer with one word, Yes or No.",
    "score": 'This image was generated from the text "{prompt}". Judge how well it follows the '
    "text, and how good it is to look at. Explain your judgement in a few words, then write a "
    "number from 1 (worst) to 5 (best), with decimals if you like, after 'Final Score:'.",
}
_MAX_TOKENS: dict[Mode, int] = {"yes_no": 1, "score": 512}
_TOP = 20  # alternatives of the first token; more are refused by OpenAI and by vLLM's default
_MARKS = (
    " \t\r\n\u2581\u0120\u010a\"'*.,:"  # spaces as tokenizers write them, and what quotes a word
)
_FINAL = re.compile(r"Final Score:[\s*]*(\d+(?:\.\d+)?)", re.IGNORECASE)


class VLMJudge(ServedReward):
    """A vision-language model's opinion of an image, in [0, 1].

    Images that it gives no opinion on are NaN, and a server that fails is an error after
    `retries`; see `RemoteReward`.

    Args:
        url: Of the server, with or without a last `/v1`.
        model: Its name at the server.
        question: What to ask; `{prompt}` stands for the prompt. None asks the mode's own.
        mode: "yes_no" or "score"; see the module. "yes_no" needs log probabilities of the server,
            and gives a finer scale from one token.
        image_size: Height and width that images are resized to, bicubic; None sends them as they
            are.
        api_key_variable: Environment variable that holds the key, where the server needs one.
        timeout: Seconds for one request.
        retries: Further attempts per request.
        retry_wait: Seconds before the first of them; each further wait is twice as long, up to 30.
        deadline: Seconds for one call with all its requests; below the process group's time-out.
        concurrency: Requests, of one image each, at the same time.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        url: str,
        model: str,
        question: str | None = None,
        mode: Mode = "yes_no",
        image_size: int | None = 512,
        api_key_variable: str = "LIT_ALIGN_JUDGE_KEY",
        timeout: float = 300.0,
        retries: int = 2,
        retry_wait: float = 0.5,
        deadline: float = 540.0,
        concurrency: int = 8,
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"`mode` must be 'yes_no' or 'score', got {mode!r}.")
        if image_size is not None and image_size < 1:
            raise ValueError(f"`image_size` must be 1 or more, got {image_size}.")
        url = url.rstrip("/").removesuffix("/v1")
        client = JSONClient(url, None, api_key_variable, timeout, retries, retry_wait)
        super().__init__(client, deadline, 1, concurrency, "png")
        self.model, self.mode, self.image_size = model, mode, image_size
        self.question = QUESTIONS[mode] if question is None else question
        self.needs_prompt = "{prompt}" in self.question  # type: ignore[misc]

    def prepared(self, images: Tensor) -> Tensor:
        """Return the images resized to `image_size`."""
        if self.image_size is None:
            return images
        return resize(images, self.image_size, self.image_size)

    def ask(self, items: list[Item], ends: float) -> Answer:
        """Return the judge's score of one image; see the base class."""
        (item,) = items
        body = to_json(self._request(item))
        answer = self.client.retry(
            lambda: self.client.send("POST", "/v1/chat/completions", body, ends), ends
        )
        try:
            choice = answer["choices"][0]
            score, why = yes_share(choice) if self.mode == "yes_no" else final_score(choice)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ProtocolError(
                f"{self.client.url} gave no chat completion ({type(error).__name__}: {error}): "
                f"{repr(answer)[:200]}."
            ) from error
        return [score], [why] if math.isnan(score) else []

    def _request(self, item: Item) -> dict[str, Any]:
        picture = f"data:image/png;base64,{base64.b64encode(item.data).decode()}"
        # Not `format`: prompts and questions may hold braces of their own.
        text = self.question.replace("{prompt}", item.prompt)
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": text},
        ]
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": _MAX_TOKENS[self.mode],
        }
        if self.mode == "yes_no":
            request |= {"logprobs": True, "top_logprobs": _TOP}
        return request


def yes_share(choice: dict[str, Any]) -> tuple[float, str]:
    """Return P(yes) / (P(yes) + P(no)) of a completion's first token, or NaN and why.

    Raises:
        ProtocolError: If the server told no log probabilities.
    """
    content = (choice.get("logprobs") or {}).get("content")
    if not content:
        raise ProtocolError(
            "The judge's server tells no log probabilities; start it so that it does, or use "
            "`mode='score'`"
        )
    mass = {"yes": 0.0, "no": 0.0}
    for token, probability in _alternatives(content[0]):
        if (word := token.strip(_MARKS).lower()) in mass:
            mass[word] += probability
    total = mass["yes"] + mass["no"]
    if not total > 0:
        return math.nan, f"the answer begins with {content[0]['token']!r}, not with yes or no"
    return mass["yes"] / total, ""


def _alternatives(position: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the tokens that may stand at a position and their probabilities."""
    for entry in position.get("top_logprobs") or [position]:
        logprob = entry["logprob"]
        if isinstance(logprob, bool) or not isinstance(logprob, int | float) or logprob > 1e-3:
            raise ProtocolError(f"The judge's server tells a log probability of {logprob!r}")
        if not math.isnan(logprob):
            yield entry["token"], math.exp(logprob)


def final_score(choice: dict[str, Any]) -> tuple[float, str]:
    """Return the last final score of a completion over 5, or NaN and why."""
    text = choice["message"]["content"] or ""
    if choice.get("finish_reason") == "length":
        return math.nan, f"the answer was cut: {text[-80:]!r}"
    found = _FINAL.findall(text)
    if not found or not 1 <= float(found[-1]) <= 5:
        return math.nan, f"the answer ends without a final score from 1 to 5: {text[-80:]!r}"
    return float(found[-1]) / 5, ""
