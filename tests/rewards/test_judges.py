"""VLMJudge against a server that answers as a chat model's would."""

import base64
import io
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from lit_align.rewards import VLMJudge
from lit_align.rewards.http_client import ServerRefusalError, ServerUnavailableError
from lit_align.rewards.judges import final_score, yes_share
from lit_align.rewards.wire import ProtocolError
from tests.rewards.faulty_server import IMAGES, PROMPTS, always, answer, failure, serving

QUICK = {"timeout": 30.0, "retry_wait": 0.01, "deadline": 60.0, "model": "judge-7b"}
ATOL = 1e-6


def tokens(**logprobs):
    """Return a completion whose first token may be any of these, each given as a probability."""
    listed = [{"token": t, "logprob": math.log(p)} for t, p in logprobs.items()]
    return completion(logprobs={"content": [{**listed[0], "top_logprobs": listed}]})


def completion(text="", finish_reason="stop", logprobs=None):
    message = {"role": "assistant", "content": text}
    choice = {"message": message, "finish_reason": finish_reason, "logprobs": logprobs}
    return {"choices": [{"index": 0, **choice}]}


def seen(request):
    """Return the image that a request holds, and its text."""
    picture, text = request["messages"][0]["content"]
    head, data = picture["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), text["text"]


def by_brightness(number, request):
    share = seen(request)[0].mean() / 255
    return tokens(**{"Yes": 0.8 * share, "No": 0.8 * (1 - share), "Maybe": 0.2})


def test_one_question_per_image():
    with serving(by_brightness) as server:
        judge = VLMJudge(server.url, image_size=16, **QUICK)
        scores = judge(IMAGES, PROMPTS)
        assert server.gets == []
    torch.testing.assert_close(scores, torch.tensor([0.2, 0.4, 0.6, 0.8]), atol=ATOL, rtol=0)
    assert scores.dtype == torch.float32
    assert [path for _, _, path in server.posts] == ["/v1/chat/completions"] * 4
    for request, headers, _ in server.posts:
        image, text = seen(request)
        assert image.shape == (16, 16, 3)
        expected = {"model": "judge-7b", "temperature": 0, "max_tokens": 1, "logprobs": True,
                    "top_logprobs": 20}  # fmt: skip
        assert {key: request[key] for key in request if key != "messages"} == expected
        prompt = PROMPTS[round(float(image.mean()) / 51) - 1]
        assert f'"{prompt}"' in text
        assert "Authorization" not in headers


def test_keys_come_from_the_environment_only(monkeypatch):
    monkeypatch.setenv("MY_KEY", "key-1")
    with serving(by_brightness) as server:
        judge = VLMJudge(f"{server.url}/v1/", api_key_variable="MY_KEY", **QUICK)
        judge(IMAGES[:1], PROMPTS[:1])
    assert server.posts[0][1]["Authorization"] == "Bearer key-1"
    assert server.posts[0][2] == "/v1/chat/completions"
    assert b"key-1" not in pickle.dumps(judge)


def test_questions_are_templates():
    with serving(by_brightness) as server:
        judge = VLMJudge(server.url, question="{a} {prompt}?", image_size=None, **QUICK)
        judge(IMAGES[:1], ["{b} {prompt} %s"])
        assert judge.needs_prompt
        assert not VLMJudge(server.url, question="Is it sharp?", **QUICK).needs_prompt
    image, text = seen(server.posts[0][0])
    assert text == "{a} {b} {prompt} %s?"
    assert image.shape == (8, 8, 3)


def test_spellings_are_summed():
    share = {"Yes": 0.3, " yes": 0.1, "\u2581YES": 0.1, "\u0120yes": 0.05, "No": 0.1, "no.": 0.1}
    other = {"Yesterday": 0.1, "None": 0.05, "not": 0.1}
    choice = tokens(**share, **other)["choices"][0]
    assert yes_share(choice) == (pytest.approx(0.55 / 0.75), "")


def test_one_sided_and_impossible_answers():
    assert yes_share(tokens(Yes=0.9)["choices"][0]) == (1.0, "")
    assert yes_share(tokens(No=0.9)["choices"][0]) == (0.0, "")  # the judge said so
    lone = {"content": [{"token": "No", "logprob": -0.1, "top_logprobs": []}]}
    assert yes_share(completion(logprobs=lone)["choices"][0]) == (0.0, "")
    never = {"content": [{"token": "Yes", "logprob": -math.inf}]}
    score, told = yes_share(completion(logprobs=never)["choices"][0])
    assert math.isnan(score)
    assert "'Yes'" in told


@pytest.mark.parametrize("logprob", [True, "high", 0.5, None])
def test_what_is_no_log_probability_is_refused(logprob):
    content = {"content": [{"token": "Yes", "logprob": logprob}]}
    with pytest.raises(ProtocolError, match="a log probability of"):
        yes_share(completion(logprobs=content)["choices"][0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It fits. Final Score: 4", 0.8),
        ("Final Score: 3.5", 0.7),
        ("Final Score:5.", 1.0),
        ("**Final Score:** 4.25/5", 0.85),
        ("final score: 1", 0.2),
        ("Final Score: 2 at first. Final Score: 3", 0.6),
        ("Final Score: 0", math.nan),
        ("Final Score: 5.5", math.nan),
        ("Final Score: 45", math.nan),
        ("Final Score: -3", math.nan),
        ("Final Score: good", math.nan),
        ("Score: 4", math.nan),
        ("", math.nan),
        (None, math.nan),
    ],
)
def test_final_scores(text, expected):
    score, told = final_score(completion(text)["choices"][0])
    assert score == pytest.approx(expected, nan_ok=True)
    assert bool(told) == math.isnan(expected)


def test_an_answer_that_was_cut_is_no_score():
    score, told = final_score(completion("Final Score: 4", "length")["choices"][0])
    assert math.isnan(score)
    assert "was cut" in told


def test_answers_without_an_opinion_are_not_a_number():
    def behave(number, request):
        text = seen(request)[1]
        return completion("I cannot say." if "square" in text else "Final Score: 4")

    with serving(behave) as server:
        judge = VLMJudge(server.url, mode="score", **QUICK)
        with pytest.warns(UserWarning, match="could not score 1 of 4 .* without a final score"):
            scores = judge(IMAGES, PROMPTS)
    expected = torch.tensor([0.8, math.nan, 0.8, 0.8])
    torch.testing.assert_close(scores, expected, atol=ATOL, rtol=0, equal_nan=True)
    assert judge.counts == {"requests": 4, "unscored": 1}
    assert server.posts[0][0].keys() == {"model", "messages", "temperature", "max_tokens"}
    assert seen(server.posts[0][0])[0].shape == (512, 512, 3)


def test_a_judge_that_says_neither_yes_nor_no():
    with serving(always(tokens(Maybe=0.9))) as server:
        judge = VLMJudge(server.url, **QUICK)
        with pytest.warns(UserWarning, match="begins with 'Maybe', not with yes or no"):
            assert judge(IMAGES[:1], PROMPTS[:1]).isnan().all()


@pytest.mark.parametrize(
    ("behave", "kind", "told", "posts"),
    [
        (always(completion("Yes")), ProtocolError, "no log probabilities; .* `mode='score'`", 1),
        (always({"error": "?"}), ProtocolError, r"gave no chat completion \(KeyError", 1),
        (always([]), ProtocolError, "gave no chat completion", 1),
        (always({"choices": []}), ProtocolError, "gave no chat completion", 1),
        (always(failure(404)), ServerRefusalError, "HTTP 404: the judge is ill", 1),
        (always(failure(401)), ServerRefusalError, "set LIT_ALIGN_JUDGE_KEY", 1),
        (always(failure(500)), ServerUnavailableError, "3 attempt.*HTTP 500", 3),
        (always(answer(b"oops")), ServerUnavailableError, "no JSON", 3),
    ],
)
def test_a_server_that_fails(behave, kind, told, posts):
    with serving(behave) as server:
        with pytest.raises(kind, match=told):
            VLMJudge(server.url, **QUICK)(IMAGES[:1], PROMPTS[:1])
        assert len(server.posts) == posts


def test_a_server_that_recovers():
    with serving(lambda n, r: failure(503) if n < 2 else by_brightness(n, r)) as server:
        scores = VLMJudge(server.url, concurrency=1, **QUICK)(IMAGES, PROMPTS)
        assert len(server.posts) == 6
    torch.testing.assert_close(scores, torch.tensor([0.2, 0.4, 0.6, 0.8]), atol=ATOL, rtol=0)


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="`mode` must be 'yes_no' or 'score', got 'rank'"):
        VLMJudge("http://127.0.0.1:1", "m", mode="rank")
    with pytest.raises(ValueError, match="`image_size` must be 1 or more, got 0"):
        VLMJudge("http://127.0.0.1:1", "m", image_size=0)
    assert VLMJudge("http://127.0.0.1:1", "m").client.timeout == 300
