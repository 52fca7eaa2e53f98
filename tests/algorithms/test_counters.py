import pytest

from tests.algorithms.harness import fit, make_method

WITH_REFERENCE = [
    ("DDPO", {"beta": 0.1}),
    ("TDPO", {"kl_coef": 0.1}),
    ("FlowGRPO", {"beta": 0.1}),
    ("NablaGFlowNet", {}),
    ("AdjointMatching", {}),
]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(("name", "options"), WITH_REFERENCE)
def test_calls_of_the_pretrained_model_are_counted_too(name, options, guidance):
    module = make_method(name, guidance_scale=guidance, **options)
    rows = []
    module.policy.register_forward_hook(lambda _, inputs, output: rows.append(len(inputs[0])))
    fit(module)
    assert module.counters["denoiser_calls"] == sum(rows)


def test_the_penalty_of_tdpo_replays_no_more_samples_at_once_than_a_rollout_draws():
    module = make_method("TDPO", kl_coef=0.1, rollout_batch_size=2, minibatch_size=2)
    rows = []
    module.policy.register_forward_hook(lambda _, inputs, output: rows.append(len(inputs[0])))
    fit(module)
    assert set(rows) == {2}
