"""Flow-GRPO, its ratios and trust regions, and windows of steps."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributions import Normal

from lit_align.algorithms import FlowGRPO
from lit_align.data.windows import StepWindow
from lit_align.functional.noise import sample_generators
from lit_align.rewards import Colorfulness, RewardModule
from lit_align.schedulers import StochasticFlowMatch
from tests.algorithms.harness import PROMPTS, fit, make_method, weights
from tests.conftest import tiny_policy

STEPS = 5
KINDS = {"flow": 0.7, "dance": 0.3, "cps": 0.8, "memoryless": 0.0}


class OneProcess:
    """Stands in for a trainer."""

    world_size, global_rank = 1, 0


def make_policy(kind="flow", **options):
    scheduler = partial(StochasticFlowMatch, kind=kind, noise_level=KINDS[kind])
    return tiny_policy("sd3", train="full", scheduler=scheduler, **options)


def draw(policy, guidance_scale=1.0, key=0, start=0, **options):
    """Return the paths of four prompts, with advantages of both signs."""
    path = policy.sample(
        policy.encode_prompt(PROMPTS[:4]),
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        generator=sample_generators("steps", 0, key, range(4)),
        initial_generator=sample_generators("start", 0, start, range(4)),
        **options,
    )
    return path.replace(advantages=torch.tensor([1.0, -0.5, 2.0, -1.5]), weights=torch.ones(4))


def at(path, step):
    return path.transitions(torch.arange(4), torch.full((4,), step))


def pairs_of(path, steps):
    samples = torch.arange(4).repeat(len(steps))
    return path.transitions(samples, torch.tensor(steps).repeat_interleave(4))


def move(policy, size=0.003):
    """Change the weights, the same way every time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.denoiser.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_are_those_that_were_sampled_bit_by_bit(kind, guidance_scale):
    policy = make_policy(kind)
    for noisy in (None, (1, 2)):  # all steps, a window
        path = draw(policy, guidance_scale, stochastic_steps=noisy, keep=("mean",))
        assert path.timesteps[0, 0] == 1000
        for step in noisy or range(STEPS - 1):
            batch = at(path, step)
            again = policy.replay(batch, cfg_grad="cond_only")
            assert torch.equal(again.log_prob, batch.old_log_prob)
            assert torch.equal(again.mean, batch.extras["mean"])
            assert again.std.isfinite().all()
            assert again.std.min() > 0


def test_outside_the_window_the_sampler_is_deterministic():
    policy = make_policy()
    window = StepWindow(2, start=1, stop=4).steps(0, 0, range(STEPS - 1))
    first = window[0]
    one, other = (draw(policy, key=key, stochastic_steps=window) for key in (0, 1))
    assert torch.equal(one.latents[:, : first + 1], other.latents[:, : first + 1])
    for step in range(first + 1, STEPS + 1):
        assert not torch.equal(one.latents[:, step], other.latents[:, step])
    finite = one.log_probs.isfinite()
    assert finite.all(dim=0).nonzero().flatten().tolist() == list(window)
    assert finite.any(dim=0).sum() == len(window)
    sigmas = policy.scheduler.sigmas
    for step in set(range(STEPS)) - set(window):  # Euler's step of the ODE
        x, times = one.latents[:, step], one.timesteps[:, step]
        velocity = policy.predict(x, times, one.conditioning, 1.0)
        expected = x + (sigmas[step + 1] - sigmas[step]) * velocity
        torch.testing.assert_close(one.latents[:, step + 1], expected, atol=1e-5, rtol=0)


def attached(policy, **options):
    module = FlowGRPO(policy, Colorfulness(), num_inference_steps=STEPS, **options)
    module._trainer = OneProcess()
    return module


def expected_loss(module, path, steps, old):
    """Return the loss of every pair, one at a time and from the formulas; `old` are its means."""
    policy, scheduler, losses = module.policy, module.policy.scheduler, []
    sigmas = scheduler.sigmas
    for step in steps:
        t, h = float(sigmas[step]), float(sigmas[step] - sigmas[step + 1])
        remaining = 1 - float(sigmas[1]) if step == 0 else 1 - t
        dance = scheduler.kind == "dance"
        s = scheduler.noise_level if dance else scheduler.noise_level * (t / remaining) ** 0.5
        for sample in range(4):
            x, after = path.latents[sample, step], path.latents[sample, step + 1]
            arguments = (
                x[None], path.timesteps[sample, step, None],
                {key: value[sample, None] for key, value in path.conditioning.items()}, 1.0,
            )  # fmt: skip
            v = policy.predict(*arguments)[0]
            with torch.no_grad(), policy.reference():
                v_ref = policy.predict(*arguments)[0]

            def mean(v, x=x, s=s, t=t, h=h):
                return x - v * h - s**2 / 2 / t * (x + (1 - t) * v) * h

            std, mu_old = s * h**0.5, old[sample, step]
            gap = mean(v) - mu_old
            log_ratio = (
                Normal(mean(v), std).log_prob(after) - Normal(mu_old, std).log_prob(after)
            ).mean()
            delta = 1.0
            if module.ratio == "norm":
                log_ratio = std * (log_ratio + gap.square().mean() / (2 * std**2))
                delta = (1 + s**2 * (1 - t) / (2 * t) * dance) / h
            ratio, advantage = log_ratio.exp(), path.advantages[sample]
            if module.trust == "clip":
                clipped = ratio.clamp(1 - module.clip_range, 1 + module.clip_range)
                surrogate = torch.max(-advantage * ratio, -advantage * clipped)
            else:
                beyond = gap.square().mean() / (2 * std**2) > module.kl_threshold
                away = (advantage > 0) == (ratio > 1)
                surrogate = -advantage * ratio * (not (beyond and away))
            penalty = {
                "velocity": (v - v_ref).square().mean(),
                "gaussian": (mean(v) - mean(v_ref)).square().mean() / (2 * std**2),
                "drift": (mean(v) - mean(v_ref)).square().mean() / (2 * s**2),
            }[module.kl]
            losses.append(path.weights[sample] * (delta * surrogate + module.beta * penalty))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kl", ["velocity", "gaussian", "drift"])
@pytest.mark.parametrize("trust", ["clip", "kl_mask"])
@pytest.mark.parametrize(
    ("ratio", "kind"), [("plain", "flow"), ("norm", "flow"), ("norm", "dance")]
)
def test_loss_and_gradient_are_those_of_the_formulas(ratio, kind, trust, kl):
    policy = make_policy(kind)
    clip_range = {"plain": 3e-3, "norm": 3e-4}[ratio]
    module = attached(
        policy, ratio=ratio, trust=trust, kl=kl, beta=0.5, clip_range=clip_range, kl_threshold=3e-4
    )
    steps = list(range(STEPS - 1))
    path = draw(policy, keep=("mean",)).replace(weights=torch.tensor([1.0, 2.0, 0.0, 0.5]))
    old = path.extras["mean"]
    move(policy)

    def gradient(loss):
        policy.zero_grad()
        loss.backward()
        found = torch.cat([p.grad.flatten() for p in policy.denoiser.parameters()])
        return loss.detach(), found

    wanted, wanted_gradient = gradient(expected_loss(module, path, steps, old))
    loss, logs = module.loss(pairs_of(path, steps))
    found, found_gradient = gradient(loss)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    error = (found_gradient - wanted_gradient).norm() / wanted_gradient.norm()
    assert error < 2e-3
    share = logs["train/masked_fraction" if trust == "kl_mask" else "train/clip_fraction"]
    assert 0 < share < 1
    assert module.counters["denoiser_calls"] == 16  # of the reference; `training_step` counts own


def test_divergences_relate_as_derived_and_pull_back():
    """drift = h gaussian, and gaussian = (h / 2) (s (1 - t) / (2 t) + 1 / s)^2 velocity."""
    policy, found = make_policy(), {}
    for kl in ("velocity", "gaussian", "drift"):
        module = attached(policy, kl=kl, beta=1.0)
        if kl == "velocity":
            path = draw(policy)
            move(policy)
        rows = []
        for step in range(1, STEPS - 1):
            batch = at(path, step)
            loss, logs = module.loss(batch.replace(advantages=torch.zeros(4)))
            torch.testing.assert_close(loss, logs["train/kl_to_reference"])
            policy.zero_grad()
            loss.backward()
            assert policy.denoiser.proj_out.weight.grad.abs().max() > 0
            rows.append((loss.item(), logs["train/velocity_kl"].item()))
        found[kl] = rows
    sigmas = policy.scheduler.sigmas.tolist()
    for place, step in enumerate(range(1, STEPS - 1)):
        t, h = sigmas[step], sigmas[step] - sigmas[step + 1]
        s = 0.7 * (t / (1 - t)) ** 0.5
        velocity, gaussian, drift = (found[kl][place][0] for kl in found)
        assert drift == pytest.approx(h * gaussian, rel=1e-3)
        factor = h / 2 * (s * (1 - t) / (2 * t) + 1 / s) ** 2
        assert gaussian == pytest.approx(factor * velocity, rel=1e-3)
        assert {found[kl][place][1] for kl in found} == {found["velocity"][place][0]}


@pytest.mark.parametrize("trust", ["clip", "kl_mask"])
@pytest.mark.parametrize("ratio", ["plain", "norm"])
def test_before_an_update_every_ratio_is_one_and_nothing_is_held_back(ratio, trust):
    policy = make_policy()
    path = draw(policy, guidance_scale=4.5, keep=("mean",))
    module = attached(policy, ratio=ratio, trust=trust)
    losses = []
    for step in range(STEPS - 1):
        loss, logs = module.loss(at(path, step))
        assert logs["train/ratio"] == 1
        assert logs["train/approx_kl"] == logs["train/clip_fraction"] == 0
        assert logs.get("train/masked_fraction", 0) == 0
        sigmas = policy.scheduler.sigmas
        delta = 1 / float(sigmas[step] - sigmas[step + 1]) if ratio == "norm" else 1.0
        losses.append((loss.item(), -0.25 * delta))  # minus the mean of the advantages
    assert [loss for loss, _ in losses] == pytest.approx([e for _, e in losses], rel=1e-3)


def test_only_what_needs_the_old_means_keeps_them():
    for options, kept in (
        ({}, ()), ({"ratio": "norm"}, ("mean",)), ({"trust": "kl_mask"}, ("mean",)),
    ):  # fmt: skip
        assert attached(make_policy(), **options).keep == kept


def recorded(module, **options):
    """Train; return the trajectories and the minibatches."""
    trajectories, minibatches = [], []
    collect, loss = module.collect, module.loss
    module.collect = lambda *a: (trajectories.append(collect(*a)), trajectories[-1])[1]
    module.loss = lambda m: (minibatches.append(m), loss(m))[1]
    fit(module, **options)
    return trajectories, minibatches


def make(family="sd3", train="full", **options):
    return make_method("FlowGRPO", family, train, **options)


def test_rounds_add_noise_and_train_in_their_window():
    window = StepWindow(2, strategy="progressive", every=1)
    module = make(num_inference_steps=5, window=window, minibatch_size=4, ratio="norm")
    trajectories, minibatches = recorded(module, max_epochs=4)
    expected = [(0, 1), (1, 2), (2, 3), (0, 1)]
    assert len(minibatches) == 4 * 4
    for number, (path, steps) in enumerate(zip(trajectories, expected, strict=True)):
        finite = path.log_probs.isfinite().all(dim=0).nonzero().flatten().tolist()
        assert tuple(finite) == steps
        trained = torch.cat([m.timesteps for m in minibatches[4 * number : 4 * number + 4]])
        assert trained.tolist().count(path.timesteps[0, steps[0]]) == 8
        assert trained.tolist().count(path.timesteps[0, steps[1]]) == 8


def test_a_share_of_the_window_is_trained():
    module = make(
        num_inference_steps=5, window=StepWindow(4), timestep_fraction=0.5, minibatch_size=4
    )
    _, minibatches = recorded(module)
    assert len(torch.cat([m.timesteps for m in minibatches])) == 8 * 2


def test_plain_and_clipped_it_is_ddpo():
    options = {"advantage_eps": 1e-4, "std_unbiased": False, "cfg_grad": "both", "beta": 0.1}
    options |= {"guidance_scale": 2.0, "clip_range": 1e-4}
    runs = []
    for name, own in (("DDPO", {}), ("FlowGRPO", {"kl": "gaussian"})):
        module = make_method(name, "sd3", "full", **options, **own)
        fit(module, max_epochs=2)
        runs.append(weights(module, True))
    assert runs[0].keys() == runs[1].keys()
    for key, value in runs[0].items():
        assert torch.equal(value, runs[1][key]), key


class Circles(RewardModule):
    """The brightness of images of circles, 1 for all others."""

    needs_prompt = True

    def forward(self, images, prompts, metadata=None, group_ids=None):
        circle = torch.tensor(["circle" in prompt for prompt in prompts])
        return images.mean(dim=(1, 2, 3)).where(circle.to(images.device), 1.0)


def test_images_without_advantage_do_not_count():
    module = make(reward=Circles(), advantage_norm="group_mean", prompts_per_round=8)
    (path,), minibatches = recorded(module)
    circle = torch.tensor(["circle" in prompt for prompt in path.batch.prompts])
    assert 0 < circle.float().mean() < 1
    assert torch.equal(path.weights == 0, ~circle)
    torch.testing.assert_close(path.weights.mean(), torch.tensor(1.0))
    assert not path.advantages[~circle].any()
    assert path.advantages[circle].all()
    assert module._round_logs["rollout/zero_std_fraction"] == pytest.approx(
        1 - circle.float().mean().item()
    )
    assert all(m.advantages.isfinite().all() for m in minibatches)


def test_advantages_are_those_of_the_code():
    # The mean of the group, the population's deviation of all rewards plus 1e-4, bounded by 5.
    default = attached(make_policy()).normalizer
    assert (default.kind, default.eps, default.correction) == ("group_mean", 1e-4, 0)
    (path,), _ = recorded(make(advantage_norm="group_mean"))
    rewards, groups = path.rewards.double().view(4, 2), path.batch.group_ids.view(4, 2)
    assert torch.equal(groups[:, 0], groups[:, 1])
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(correction=0) + 1e-4)
    assert expected.abs().max() < 5
    torch.testing.assert_close(path.advantages, expected.flatten().float())


ALL_OPTIONS = {
    "window": StepWindow(2, stop=3), "ratio": "norm", "trust": "kl_mask", "beta": 0.1,
    "kl": "drift", "num_inference_steps": 4, "minibatch_size": 8,
}  # fmt: skip


def test_a_round_is_resumed_in_its_middle_bit_by_bit(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole, resumed = make(**ALL_OPTIONS), make(**ALL_OPTIONS)
    fit(whole, callbacks=[saver], enable_checkpointing=True, max_epochs=2)
    stored = torch.load(tmp_path / "step=1.ckpt", weights_only=True)
    assert (
        "mean"
        in stored["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["trajectory"]["extras"]
    )
    fit(resumed, resume=tmp_path / "step=1.ckpt", max_epochs=2)
    found = weights(resumed, True)
    for key, value in weights(whole, True).items():
        assert torch.equal(value, found[key]), key
    assert resumed.counters == whole.counters
    assert whole.counters["denoiser_calls"] == 2 * (8 * 4 + 2 * 16)  # rollout, own and reference

    kept = stored["hyper_parameters"]["window"]
    assert isinstance(kept, dict)
    assert make(**{**ALL_OPTIONS, "window": kept}).window == ALL_OPTIONS["window"]


@pytest.mark.parametrize("options", [{"ratio": "norm"}, {"kl": "drift", "beta": 0.1}])
def test_what_needs_the_time_of_flow_matching_is_refused_for_ddim(options):
    module = make("sd", "lora", **options)
    module.collect = lambda *_: pytest.fail("it samples before it checks")
    with pytest.raises(ValueError, match="StochasticDDIM has no steps .* use a flow-matching mod"):
        fit(module)


def test_the_rest_works_with_ddim():
    module = make("sd", "lora", trust="kl_mask", beta=0.1, window=StepWindow(2), kl="gaussian")
    (path,), _ = recorded(module)
    assert path.log_probs.isfinite().all(dim=0).sum() == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_range": 0.0}, "`clip_range` and `kl_threshold` must be positive .* got 0.0, 1e-05"),
        ({"kl_threshold": -1.0}, "got 0.0001, -1.0 and 0.0"),
        ({"beta": -0.1}, "`beta` not negative, got 0.0001, 1e-05 and -0.1"),
        ({"kl": "x"}, "`kl` must be one of 'velocity', 'gaussian', 'drift', got 'x'"),
        ({"ratio": "x"}, "`ratio` must be one of 'plain', 'norm', got 'x'"),
        ({"trust": "x"}, "`trust` must be one of 'clip', 'kl_mask', got 'x'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FlowGRPO(make_policy(), Colorfulness(), **options)


def test_a_window_that_does_not_fit_is_refused():
    with pytest.raises(
        ValueError, match="A window of 3 steps does not fit into the 2 of its range"
    ):
        fit(make(num_inference_steps=3, window=StepWindow(3)))
