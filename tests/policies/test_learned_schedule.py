import math

import pytest
import torch
from torch import nn

from lit_align.functional.beta import beta_around, beta_log_prob
from lit_align.functional.noise import sample_generators
from lit_align.policies import DiffusionPolicy, LearnedSchedule, TimePredictor
from lit_align.policies.features import FeatureTaps
from lit_align.rewards.base import uint8_images
from tests.conftest import tiny_pipeline, tiny_policy
from tests.schedulers.test_levels import ddim, flow

PROMPTS = ["a red circle", "a blue square", "a triangle", "two circles"]
FAMILIES = pytest.mark.parametrize("family", ["sd", "sd3", "flux"])


def generators():
    return sample_generators("test", 0, 0, range(len(PROMPTS)))


def schedule_of(policy, init=(2.5, 1.0), start=0, **options):
    torch.manual_seed(1)
    biases = {} if start else {"init_alpha": init[0], "init_beta": init[1]}
    head = TimePredictor.for_policy(policy, 16, **biases, init_steps=start)
    with torch.no_grad():
        head.out.weight.normal_(std=0.5)  # so that samples take different numbers of steps
    return LearnedSchedule(head, **{"guidance_scale": 1.0, **options})


def sample(policy, schedule, rows=None, **options):
    rows = list(range(len(PROMPTS))) if rows is None else rows
    texts = policy.encode_prompt([PROMPTS[row] for row in rows])
    return schedule.sample(policy, texts, [generators()[row] for row in rows], **options)


class Constant(nn.Module):
    """A head whose Beta has the same narrow mode at every step."""

    def __init__(self, mode, concentration=1e4):
        super().__init__()
        self.mode, self.concentration = mode, concentration

    def check_fits(self, policy):
        pass

    def forward(self, maps, embedding, levels):
        return beta_around(torch.full((len(maps),), self.mode), self.concentration)


class Levels:
    """Notes the levels that a scheduler goes between, and the rows that a network computes."""

    def __init__(self, policy):
        self.steps, self.rows, self.taken = [], 0, policy.scheduler.advance
        policy.scheduler.advance = self.advance
        policy.denoiser.register_forward_pre_hook(self.count, with_kwargs=True)

    def advance(self, output, latents, levels, following):
        self.steps.append((levels.tolist(), following.tolist()))
        return self.taken(output, latents, levels, following)

    def count(self, module, args, kwargs):
        self.rows += len(args[0] if args else kwargs["hidden_states"])


# Ratio and t_min, and how many steps bring the level below it.
STEPS = [
    (0.8176, 0.01, 23),
    (0.8176, 0.001, 35),
    (0.7311, 0.01, 15),
    (0.7311, 0.001, 23),
    (0.9002, 0.01, 44),
    (0.9002, 0.001, 66),
]


@pytest.mark.parametrize(("ratio", "t_min", "steps"), STEPS)
def test_a_constant_ratio_takes_the_steps_that_it_must(ratio, t_min, steps):
    assert math.ceil(math.log(t_min) / math.log(ratio)) == steps
    policy = GaussianPolicy(flow(), flow_output)
    levels = Levels(policy)
    schedule = LearnedSchedule(Constant(ratio), guidance_scale=1.0, max_steps=70, t_min=t_min)
    extras = sample(policy, schedule, [0, 1]).extras
    assert extras["alive"].sum(dim=1).tolist() == [steps, steps]
    expected = [ratio**n for n in range(steps)]
    assert extras["levels"][0, :steps].tolist() == pytest.approx(expected, rel=1e-4)
    arrived = [following[0] for _, following in levels.steps]
    assert arrived[:-1] == pytest.approx(expected[1:], rel=1e-4)
    assert arrived[-1] == 0


@pytest.mark.parametrize(("mode", "expected"), [(1 - 1e-5, 1 - 1e-3), (1e-5, 1e-3)])
@pytest.mark.parametrize("explore", [True, False])
def test_ratios_stay_away_from_the_ends(explore, mode, expected):
    schedule = LearnedSchedule(Constant(mode, 1e6), guidance_scale=1.0, max_steps=3, t_min=1e-12)
    trajectory = sample(GaussianPolicy(flow(), flow_output), schedule, explore=explore)
    ratios = trajectory.extras["ratios"]
    torch.testing.assert_close(ratios, torch.full_like(ratios, expected))
    alpha, beta = trajectory.extras["shapes"].unbind(dim=2)
    torch.testing.assert_close(trajectory.log_probs, beta_log_prob(ratios, alpha, beta))


@FAMILIES
def test_levels_fall_each_at_its_own_rate(family):
    policy = tiny_policy(family, train="none")
    levels = Levels(policy)
    trajectory = sample(policy, schedule_of(policy), explore=True)
    extras, alive = trajectory.extras, trajectory.extras["alive"]
    steps = alive.sum(dim=1)
    assert len(set(steps.tolist())) > 1
    assert steps.max() <= 28
    assert alive.tolist() == [[n < count for n in range(28)] for count in steps.tolist()]
    assert levels.rows == steps.sum()  # finished ones are not computed
    for row, count in enumerate(steps.tolist()):
        own, ratios = extras["levels"][row, :count], extras["ratios"][row, :count]
        assert own[0] == 1
        assert (own.diff() < 0).all()
        torch.testing.assert_close(own[1:], (own * ratios)[:-1], rtol=0, atol=0)
        assert (own >= 0.01).all()
        assert own[-1] * ratios[-1] < 0.01 or count == 28
        times = policy.scheduler.network_times(own)
        assert torch.equal(trajectory.timesteps[row, :count], times)
    for name, values in {**extras, "log_probs": trajectory.log_probs}.items():
        assert not values[~alive].any(), name
    assert trajectory.latents.shape[:2] == (4, 2)


@FAMILIES
@pytest.mark.parametrize("explore", [True, False])
def test_a_sample_does_not_depend_on_the_others(family, explore):
    """Finished samples are unchanged by what follows, and the rest by their leaving."""
    policy = tiny_policy(family, train="none")
    schedule = schedule_of(policy, t_min=0.2)
    whole = sample(policy, schedule, explore=explore)
    torch.manual_seed(7)
    for row in range(len(PROMPTS)):
        alone = sample(policy, schedule, [row], explore=explore)
        torch.testing.assert_close(alone.latents[0], whole.latents[row], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            alone.extras["ratios"][0], whole.extras["ratios"][row], atol=1e-5, rtol=1e-5
        )
    assert not torch.equal(whole.extras["ratios"][0, :2], whole.extras["ratios"][1, :2])


@pytest.mark.parametrize("final_to_zero", [True, False])
@pytest.mark.parametrize("explore", [True, False])
def test_where_the_last_step_ends(explore, final_to_zero):
    """At 0 below t_min; at the cap with the noise that is left, but for evaluation."""
    policy = tiny_policy("sd3", train="none")
    levels = Levels(policy)
    options = {"t_min": 0.2, "max_steps": 8, "final_to_zero": final_to_zero}
    schedule = schedule_of(policy, (1.5, 0.5), **options)
    extras = sample(policy, schedule, explore=explore).extras
    steps = extras["alive"].sum(dim=1).tolist()
    assert min(steps) < 8
    left = (extras["levels"] * extras["ratios"])[torch.arange(4), torch.tensor(steps) - 1]
    ends = sorted(
        following[place]
        for number, (_, following) in enumerate(levels.steps)
        for place, row in enumerate([r for r in range(4) if steps[r] > number])
        if steps[row] == number + 1
    )
    if final_to_zero:
        left = left.where((left >= 0.2) & explore, 0.0)
    assert ends == pytest.approx(sorted(left.tolist()), abs=1e-7)
    short = LearnedSchedule(Constant(0.9), guidance_scale=1.0, **{**options, "max_steps": 3})
    sample(policy, short, explore=explore)
    expected = 0.0 if final_to_zero and not explore else 0.9**3
    assert levels.steps[-1][1] == pytest.approx([expected] * 4, abs=0.03)


class Affine(nn.Module):
    """The network of a Gaussian: its output is known in closed form."""

    def __init__(self, output):
        super().__init__()
        self.first, self.last, self.embedding = nn.Identity(), nn.Identity(), nn.Identity()
        self.output = output
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x, times):
        self.embedding(times[:, None])
        return self.last(self.output(self.first(x), times.view(-1, 1, 1, 1)))


class GaussianPolicy(DiffusionPolicy):
    """Draws images of independent elements ~ N(MEAN, STD^2) by the exact network."""

    patch_size, pretrained, image_size = 1, "toy", (8, 8)

    def __init__(self, scheduler, output):
        nn.Module.__init__(self)
        self.scheduler, self.denoiser = scheduler, Affine(output)

    def forward(self, latents, timesteps, conditioning):
        return self.denoiser(latents, timesteps)

    def encode_prompt(self, prompts):
        return {}

    def latent_shape(self, height=None, width=None):
        return 1, 8, 8

    def feature_taps(self):
        return FeatureTaps("first", "last", "embedding", 1, 1)


MEAN, STD = 1.3, 0.4


def flow_output(x, times):
    t = times / 1000
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) * (x - (1 - t) * MEAN) / variance


def ddim_output(x, times):
    abar = ddim()._log_snr(times.flatten() / 999).sigmoid().view_as(times)
    variance = abar * STD**2 + 1 - abar
    return (1 - abar).sqrt() * (x - abar.sqrt() * MEAN) / variance


@pytest.mark.parametrize(
    ("scheduler", "output"),
    [(flow(), flow_output), (ddim(), ddim_output)],
    ids=["flow", "ddim"],
)
def test_with_many_steps_a_gaussian_is_drawn(scheduler, output):
    """Elementwise: the exact flow maps the noise by an affine function to the image."""
    policy = GaussianPolicy(scheduler, output)
    schedule = LearnedSchedule(Constant(0.98), guidance_scale=1.0, max_steps=300, t_min=1e-3)
    initial, final = sample(policy, schedule).latents.unbind(dim=1)
    abar = ddim().scheduler.alphas_cumprod[-1] if output is ddim_output else torch.tensor(0.0)
    start = (initial - abar.sqrt() * MEAN) / (abar * STD**2 + 1 - abar).sqrt()
    torch.testing.assert_close(final, MEAN + STD * start, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("start", [0, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@FAMILIES
def test_stored_features_give_the_log_probabilities_again(family, guidance_scale, dtype, start):
    policy = tiny_policy(family, train="none")
    schedule = schedule_of(policy, start=start, guidance_scale=guidance_scale, t_min=0.1)
    trajectory = sample(policy, schedule, explore=True, feature_dtype=dtype)
    extras, alive = trajectory.extras, trajectory.extras["alive"]
    assert extras["features"].dtype == dtype
    assert extras["features"].shape[2] == schedule.head.channels
    seen = [extras[name] for name in ("features", "embedding", "levels")]
    for step in range(int(alive.sum(dim=1).max())):  # in the batches of the rollout: bit by bit
        now = alive[:, step]
        shapes = schedule.head(*(values[now, step] for values in seen))
        assert torch.equal(torch.stack(shapes, dim=1), extras["shapes"][now, step])
        again = beta_log_prob(extras["ratios"][now, step], *shapes)
        assert torch.equal(again, trajectory.log_probs[now, step])
    whole = schedule.head(*(values[alive] for values in seen))
    again = beta_log_prob(extras["ratios"][alive], *whole)
    torch.testing.assert_close(again, trajectory.log_probs[alive], atol=1e-4, rtol=1e-4)
    mode = sample(policy, schedule)
    assert "features" not in mode.extras


def test_a_process_that_is_finished_calls_on_for_the_others():
    policy = tiny_policy("sd", train="none")
    schedule = schedule_of(policy, t_min=0.3)
    alone = sample(policy, schedule, explore=True)
    levels = Levels(policy)
    together = sample(policy, schedule, explore=True, anywhere=lambda condition: True)
    steps = alone.extras["alive"].sum(dim=1)
    assert steps.max() < 28
    assert levels.rows == steps.sum() + 28 - steps.max()
    assert torch.equal(together.latents, alone.latents)
    for name, values in alone.extras.items():
        assert torch.equal(together.extras[name], values), name


def test_draws_are_those_of_the_generators():
    policy = tiny_policy("sd", train="none")
    schedule = schedule_of(policy, t_min=0.2)
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runs.append(sample(policy, schedule, explore=True).latents)
    assert torch.equal(*runs)
    mode = sample(policy, schedule)
    assert torch.equal(mode.latents[:, 0], runs[0][:, 0])  # the same noise
    assert not torch.equal(mode.latents[:, 1], runs[0][:, 1])


@pytest.mark.parametrize("start", [0, 6])
@FAMILIES
def test_a_saved_schedule_draws_the_same_images_with_a_plain_pipeline(family, start, tmp_path):
    policy = tiny_policy(family, train="none")
    name = type(policy.pipeline).__name__
    schedule = schedule_of(
        policy, start=start, pipeline=name, max_steps=9, t_min=0.05, guidance_scale=2.0
    )
    trajectory = sample(policy, schedule)
    expected = uint8_images(policy.decode(trajectory.latents[:, -1]))
    schedule.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"schedule.json", "schedule.safetensors"}
    again = LearnedSchedule.from_pretrained(tmp_path)
    assert again.options() == schedule.options()
    size = {"image_size": 32} if family == "flux" else {}
    pipe = tiny_pipeline(family)
    images = again(pipe, PROMPTS, generator=generators(), output_type="pt", **size)
    assert torch.equal(uint8_images(images), expected)
    (picture,) = again(pipe, PROMPTS[0], generator=generators()[:1], **size)
    assert picture.size == (32, 32)


def test_a_plain_pipeline_keeps_its_dtypes():
    policy = tiny_policy("sd", train="none")
    schedule = schedule_of(policy, max_steps=2)
    pipe = tiny_pipeline("sd")
    pipe.unet.to(torch.bfloat16)
    (first,) = schedule(pipe, "a red circle", output_type="pt")
    (second,) = schedule(pipe, "a red circle", output_type="pt")
    assert not torch.equal(first, second)  # without generators noise is new each time
    assert pipe.unet.dtype == torch.bfloat16
    assert pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32


def test_a_schedule_for_another_model_is_refused(tmp_path):
    policy = tiny_policy("sd", train="none")
    schedule = schedule_of(policy, pipeline="StableDiffusionPipeline")
    with pytest.raises(ValueError, match="on a StableDiffusionPipeline, but .* is a StableDiff"):
        sample(tiny_policy("sd3", train="none"), schedule)
    wide = schedule_of(tiny_policy("sd3", train="none"))
    with pytest.raises(ValueError, match="reads 32 channels .* width 16, but .* has 16 and 8"):
        sample(policy, wide)
    with pytest.raises(FileNotFoundError, match=r"no folder with a schedule.json"):
        LearnedSchedule.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The pipeline is a Linear, which has no policy"):
        schedule(nn.Linear(1, 1), "a red circle")
