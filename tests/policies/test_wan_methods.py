"""One round of a method of each regime on a tiny Wan, and what else sees videos on the way."""

import csv
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from lit_align import verbs
from lit_align.algorithms import AWM, DDPO, DiffusionNFT, DRaFT, DRTune, FlowDPO, FlowGRPO
from lit_align.callbacks import CrossRewardCallback, SampleGallery
from lit_align.data.preferences import PreferenceDataModule
from lit_align.functional.frames import over_frames, side_by_side
from lit_align.metrics import DriftStatistics
from lit_align.metrics.drift import STATISTICS, image_statistics
from lit_align.rewards import Colorfulness, PairwiseDiversityReward, RewardModule, ShapesCLIP
from lit_align.rewards.scoring import RewardError, call_reward
from lit_align.schedulers import StochasticFlowMatch
from lit_align.trajectory import PromptBatch
from tests.algorithms.harness import (
    ONLINE,
    POLICY_GRADIENT,
    Recorder,
    fit,
    maker,
    prompt_loader,
    weights,
)
from tests.conftest import tiny_policy

GRADIENT = {
    "num_inference_steps": 2, "guidance_scale": 3.0, "prompts_per_round": 2,
    "samples_per_prompt": 2, "minibatch_size": 2, "lr": 1e-2,
}  # fmt: skip
FIRST = {"decode_latents": 1}
METHODS = {
    "DDPO": (maker(DDPO, POLICY_GRADIENT), {"decode_frames": 2}),
    "FlowGRPO": (maker(FlowGRPO, POLICY_GRADIENT), {}),
    "DiffusionNFT": (maker(DiffusionNFT, ONLINE), FIRST),
    "AWM": (maker(AWM, {**ONLINE, "trained_times": 1, "timestep_fraction": 1.0}), FIRST),
    "DRaFT": (maker(DRaFT, {**GRADIENT, "num_lv_samples": 1}), {"decode_frames": 2}),
    "DRTune": (maker(DRTune, {**GRADIENT, "truncation_steps": 1, "beta": 0.1}), FIRST),
}


def batch_of(count):
    ids = torch.arange(count)
    return PromptBatch(["a red circle"] * count, [None] * count, ids, ids, ids)


@pytest.mark.parametrize("name", METHODS)
def test_a_round_trains_the_adapters_and_nothing_else(name):
    make, options = METHODS[name]
    module = make("wan", policy_options=options)
    before = {trainable: weights(module, trainable) for trainable in (True, False)}
    recorder = Recorder()
    fit(module, val=True, callbacks=[recorder])
    for trainable in (True, False):
        after = weights(module, trainable)
        same = [torch.equal(after[n], p) for n, p in before[trainable].items()]
        assert all(same) if not trainable else not all(same)
    if "train/ratio" in recorder.metrics[0]:
        assert recorder.metrics[0]["train/ratio"] == pytest.approx(1, abs=1e-5)
    assert all(torch.isfinite(p).all() for p in weights(module, True).values())
    if name in ("DDPO", "FlowGRPO"):
        assert "train/ratio" in recorder.metrics[0]


def test_drtune_on_the_first_frame_raises_its_reward():
    """The regime of video reward training: the first frame's reward, many steps of the video."""

    class Brightness(RewardModule):
        differentiable = True

        def forward(self, images, prompts, metadata=None, group_ids=None):
            assert images.ndim == 4  # the first frame, no video
            return images.mean((1, 2, 3))

    module = METHODS["DRTune"][0]("wan", reward=Brightness(), policy_options=FIRST, lr=3e-2)
    batch = next(iter(prompt_loader(shuffle=False)))
    before = module.generate(batch)[0].mean()
    fit(module, max_epochs=8)
    assert module.generate(batch)[0].mean() > before  # of the same noise


def write_video(path, level):
    frames = [Image.new("RGB", (32, 32), (level, 10 * i, 255 - level)) for i in range(5)]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)


def test_flow_dpo_on_judged_videos(tmp_path):
    rows = []
    for number, prompt in enumerate(["a red circle", "a blue square", "a triangle", "two circles"]):
        for side, level in (("A", 20), ("B", 200)):
            write_video(tmp_path / f"{number}{side}.webp", level + number)
        rows.append([f"{number}A.webp", f"{number}B.webp", prompt, *"AAB", 8, 5, 8, 5])
    columns = ["path_A", "path_B", "prompt", "VQ", "MQ", "TA", "fps_A", "num_frames_A", "fps_B",
               "num_frames_B"]  # fmt: skip
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    data = PreferenceDataModule(
        str(tmp_path / "pairs.csv"), format="videoreward", axis="visual_quality", batch_size=2,
        image_size=32, num_frames=5, val_fraction=0.0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = FlowDPO(
            tiny_policy("wan"), None, {"gold": Colorfulness()}, lr=1e-2, num_inference_steps=2,
            beta=50.0,
        )  # fmt: skip
        recorder, before = Recorder(), weights(module, True)
        Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
            callbacks=[recorder],
        ).fit(module, datamodule=data)  # fmt: skip
    assert len(recorder.metrics) == 2
    # The policy is its own reference before the first update.
    assert recorder.metrics[0]["train/loss"] == pytest.approx(0.693147, abs=1e-5)
    assert any(not torch.equal(p, before[n]) for n, p in weights(module, True).items())


def test_a_video_scores_the_mean_of_its_frames():
    videos = torch.rand(2, 3, 3, 16, 16)
    scores = call_reward(Colorfulness(), videos, batch_of(2))
    frames = [call_reward(Colorfulness(), videos[:, i], batch_of(2)) for i in range(3)]
    torch.testing.assert_close(scores, torch.stack(frames).mean(0))


def test_a_frame_that_cannot_be_scored_makes_the_video_nan():
    class Picky(RewardModule):
        def forward(self, images, prompts, metadata=None, group_ids=None):
            means = images.mean((1, 2, 3))
            return means.where(means < 0.9, torch.nan)

    videos = torch.full((2, 3, 3, 8, 8), 0.5)
    videos[1, 2] = 1.0
    scores = call_reward(Picky(), videos, batch_of(2))
    assert scores[0] == 0.5
    assert scores[1].isnan()


def test_prompts_and_metadata_follow_their_frames():
    class Seen(RewardModule):
        def forward(self, images, prompts, metadata=None, group_ids=None):
            assert prompts == ["one", "one", "two", "two"]
            assert metadata == [{"n": 1}, {"n": 1}, {"n": 2}, {"n": 2}]
            assert group_ids.tolist() == [5, 5, 6, 6]
            return images.mean((1, 2, 3))

    ids = torch.tensor([5, 6])
    batch = PromptBatch(["one", "two"], [{"n": 1}, {"n": 2}], ids, ids, ids)
    assert call_reward(Seen(), torch.rand(2, 2, 3, 8, 8), batch).shape == (2,)


def test_a_reward_of_videos_gets_them_whole():
    class Motion(RewardModule):
        reads_videos = True

        def forward(self, images, prompts, metadata=None, group_ids=None):
            return images.diff(dim=1).abs().mean((1, 2, 3, 4))

    still = torch.rand(1, 1, 3, 8, 8).expand(2, 4, 3, 8, 8)
    assert call_reward(Motion(), still, batch_of(2)).tolist() == [0, 0]


def test_a_comparison_of_images_refuses_videos():
    reward = PairwiseDiversityReward(ShapesCLIP())
    with pytest.raises(RewardError, match=r"compares images .*decode_latents: 1"):
        call_reward(reward, torch.rand(2, 3, 3, 32, 32), batch_of(2))


def test_statistics_of_videos_are_means_over_frames():
    videos = torch.rand(2, 3, 3, 16, 16)
    metric = DriftStatistics()
    metric.update(videos)
    for name in STATISTICS:
        expected = image_statistics(videos.flatten(0, 1))[name].mean()
        torch.testing.assert_close(metric.compute()[name].float(), expected)


def test_frames_side_by_side():
    videos = torch.rand(2, 3, 3, 8, 10)
    strip = side_by_side(videos)
    assert strip.shape == (2, 3, 8, 30)
    assert torch.equal(strip[:, :, :, 10:20], videos[:, 1])
    images = videos[:, 0]
    assert side_by_side(images) is images
    assert torch.equal(over_frames(lambda x: x, images), images)


def test_gallery_and_held_out_rewards_take_videos(tmp_path):
    module = METHODS["FlowGRPO"][0]("wan")
    gallery, cross = SampleGallery(num_prompts=2), CrossRewardCallback(embedder=ShapesCLIP())
    trainer = fit(module, val=True, callbacks=[cross, gallery], default_root_dir=tmp_path)
    assert gallery.base.shape == (2, 32, 5 * 32, 3)
    assert trainer.callback_metrics["val/diversity"] >= 0


def test_generate_writes_animations(tmp_path, monkeypatch):
    policy = tiny_policy("wan", train="none", decode_latents=1)
    monkeypatch.setattr(verbs, "open_policy", lambda *a: verbs.Opened(policy, 2, 1.0))
    verbs.generate(["a red circle"], str(tmp_path), pretrained="wan", images_per_prompt=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["0000_0.webp", "0000_1.webp"]
    with Image.open(tmp_path / "0000_0.webp") as video:
        assert video.n_frames == 5  # the whole video, whatever rewards look at
        assert video.size == (32, 32)


def test_the_noise_of_the_first_step_is_finite_for_every_kind():
    for kind in ("flow", "dance", "cps", "memoryless"):
        policy = tiny_policy("wan", scheduler=partial(StochasticFlowMatch, kind=kind))
        generator = [torch.Generator().manual_seed(k) for k in range(2)]
        trajectory = policy.sample(
            policy.encode_prompt(["a red circle"] * 2), num_inference_steps=3, guidance_scale=1.0,
            generator=generator,
        )  # fmt: skip
        assert trajectory.latents.isfinite().all()
        assert trajectory.latents.abs().max() < 50
