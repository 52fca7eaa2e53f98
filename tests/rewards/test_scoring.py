import threading
import time

import pytest
import torch

from lit_align.rewards import Colorfulness, RewardModule, WeightedReward
from lit_align.rewards.scoring import RewardError, call_reward, check_background, in_thread
from lit_align.trajectory import PromptBatch
from tests.algorithms.harness import fit, make_ddpo
from tests.algorithms.test_online import Recorder, weights

PROMPTS = ["a red circle", "a blue square", "a triangle", "two circles"]
IDS = torch.arange(4)
BATCH = PromptBatch(PROMPTS, [None] * 4, IDS, IDS, IDS)
IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Brightness(RewardModule):
    def forward(self, images, prompts, metadata=None, group_ids=None):
        return images.mean(dim=(1, 2, 3))


class Broken(RewardModule):
    def forward(self, images, prompts, metadata=None, group_ids=None):
        raise ConnectionError("the judge is gone")


class Square(RewardModule):
    def forward(self, images, prompts, metadata=None, group_ids=None):
        return images.new_zeros(len(images), len(images))


class Hanging(RewardModule):
    """Answers when released."""

    def __init__(self, release):
        super().__init__()
        self.release = release

    def forward(self, images, prompts, metadata=None, group_ids=None):
        self.release.wait(60)
        return images.mean(dim=(1, 2, 3))


def test_scores_are_those_of_the_reward():
    expected = IMAGES.mean(dim=(1, 2, 3))
    assert torch.equal(call_reward(Brightness(), IMAGES, BATCH), expected)
    assert torch.equal(call_reward(Brightness(), IMAGES, BATCH, timeout=30), expected)


@pytest.mark.parametrize("timeout", [None, 30])
@pytest.mark.parametrize(
    ("reward", "what"),
    [
        (Broken(), "ConnectionError: the judge is gone"),
        (Square(), r"ValueError: Square must return one score per image, shape \[4\], got"),
    ],
)
def test_failures_name_the_reward_and_the_prompts(reward, what, timeout):
    prompts = "'a red circle', 'a blue square', 'a triangle', ..."
    told = f"{reward.name} failed for 4 image.* of the prompts {prompts}: {what}"
    with pytest.raises(RewardError, match=told):
        call_reward(reward, IMAGES, BATCH, timeout)


def test_a_reward_that_hangs_is_given_up():
    release = threading.Event()
    with pytest.raises(RewardError, match=r"did not answer within 0\.05 seconds .*'a red circle'"):
        call_reward(Hanging(release), IMAGES, BATCH, timeout=0.05)
    release.set()


def test_autocast_is_off_and_images_are_float32():
    class Dtypes(RewardModule):
        def forward(self, images, prompts, metadata=None, group_ids=None):
            flat = images.flatten(1)
            assert images.dtype == (flat @ flat.T).dtype == torch.float32
            return flat.mean(1)

    for timeout in (None, 30):
        with torch.autocast("cpu", torch.bfloat16):
            call_reward(Dtypes(), IMAGES.bfloat16(), BATCH, timeout)


def test_a_thread_has_the_grad_mode_of_its_caller():
    with torch.no_grad():
        assert in_thread(torch.is_grad_enabled).result() is False
    assert in_thread(torch.is_grad_enabled).result() is True
    with pytest.raises(ZeroDivisionError):
        in_thread(lambda: 1 / 0).result()


def test_background_scores_are_those_of_the_foreground():
    runs = []
    for background in (False, True):
        recorder = Recorder()
        options = {"rollout_batch_size": 2, "background_rewards": background}
        module = make_ddpo(reward=Colorfulness(), **options)
        fit(module, callbacks=[recorder], max_epochs=2)
        runs.append((weights(module, True), recorder.metrics))
    for name, value in runs[0][0].items():
        assert torch.equal(value, runs[1][0][name]), name
    name = "rollout/reward/Colorfulness"
    assert [m[name] for m in runs[0][1]] == [m[name] for m in runs[1][1]]


def test_background_scoring_overlaps_with_sampling():
    """The first batch's score is only given once the second batch is being sampled."""
    module = make_ddpo(rollout_batch_size=4, background_rewards=True)
    rollout, started = module.rollout, threading.Event()
    rounds = []

    def counted(batch, round_index):
        rounds.append(len(batch))
        if len(rounds) == 2:
            started.set()
        return rollout(batch, round_index)

    class Waits(RewardModule):
        def forward(self, images, prompts, metadata=None, group_ids=None):
            if len(images) == 4 and "" not in prompts:
                assert started.wait(60)
            return images.mean(dim=(1, 2, 3))

    module.rollout = counted
    module.reward = Waits()
    fit(module)
    assert rounds == [4, 4]


def test_failures_in_the_background_reach_the_trainer():
    module = make_ddpo(rollout_batch_size=4, background_rewards=True)
    module.reward = Broken()
    module.rewards = {}
    with pytest.raises(RewardError, match="the judge is gone"):
        fit(module)


def test_rewards_that_need_the_whole_round_are_not_scored_by_batch():
    running = WeightedReward({"c": Colorfulness()}, {"c": 1.0})
    with pytest.raises(ValueError, match="keeps statistics; leave it out"):
        fit(make_ddpo(reward=running, background_rewards=True))
    check_background(Brightness())


class SomeInvalid(RewardModule):
    """Gives NaN for the first `share` of the images."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, images, prompts, metadata=None, group_ids=None):
        scores = images.mean(dim=(1, 2, 3))
        scores[: round(self.share * len(images))] = torch.nan
        return scores


def test_more_invalid_scores_than_allowed_stop_the_run():
    told = r"could not score 4 of the round's 8 images, more than .* \(0\.05\) allows"
    with pytest.raises(RewardError, match=told):
        fit(make_ddpo(reward=SomeInvalid(0.5)))
    recorder = Recorder()
    module = make_ddpo(reward=SomeInvalid(0.125), max_invalid_fraction=0.125)
    fit(module, callbacks=[recorder])
    assert recorder.metrics[0]["rollout/invalid"] == 1
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 1\.5"):
        make_ddpo(max_invalid_fraction=1.5)


class FailsAtRound(RewardModule):
    """Works for the checks and two rounds."""

    calls = 0

    def forward(self, images, prompts, metadata=None, group_ids=None):
        self.calls += 1
        if self.calls > 3:
            raise ConnectionError("the judge is gone")
        return images.mean(dim=(1, 2, 3))


def test_a_reward_that_fails_in_round_3_ends_the_run_with_its_name():
    module = make_ddpo(reward=FailsAtRound())
    with pytest.raises(RewardError, match="FailsAtRound failed for 8 image"):
        fit(module, max_epochs=4)
    assert module.counters["reward_queries"] == 16


def test_time_limits_hold_in_training():
    class Sleepy(RewardModule):
        def forward(self, images, prompts, metadata=None, group_ids=None):
            if len(images) == 8:
                time.sleep(5)
            return images.mean(dim=(1, 2, 3))

    with pytest.raises(RewardError, match=r"Sleepy did not answer within 1 seconds"):
        fit(make_ddpo(reward=Sleepy(), reward_timeout=1))
