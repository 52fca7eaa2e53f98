"""A misspelt word must not silently choose another method, also without the command line."""

import re
from functools import partial

import pytest

from lit_align.algorithms import Task
from lit_align.rewards import Colorfulness
from lit_align.schedulers import StochasticFlowMatch
from tests.algorithms.harness import make_method
from tests.conftest import tiny_policy

UNKNOWN = [
    ("DDPO", {"estimator": "score"}),
    ("DDPO", {"minibatch_order": "timestep-major"}),
    ("DDPO", {"step_choice": "per-sample"}),
    ("DDPO", {"cfg_grad": "cond"}),
    ("DDPO", {"advantage_norm": "groups"}),
    ("TDPO", {"critic_input": "x0"}),
    ("TDPO", {"kl_kind": "k3"}),
    ("LargeScaleRL", {"pretraining": "seperate"}),
]


@pytest.mark.parametrize(("name", "options"), UNKNOWN)
def test_an_unknown_word_is_refused_with_those_that_are_known(name, options):
    ((option, word),) = options.items()
    told = rf"`{option}` must be one of '.*', got {re.escape(repr(word))}"
    with pytest.raises(ValueError, match=told):
        make_method(name, **options)


def test_a_task_is_asked_for_a_known_normalisation():
    tasks = {"color": Task(Colorfulness(), advantage_norm="groups")}
    with pytest.raises(ValueError, match="`advantage_norm` must be one of .* got 'groups'"):
        make_method("LargeScaleRL", tasks=tasks)


def test_an_unknown_density_of_cps_is_refused():
    scheduler = partial(StochasticFlowMatch, kind="cps", cps_log_prob="exact")
    with pytest.raises(ValueError, match="`cps_log_prob` must be one of .* got 'exact'"):
        tiny_policy("sd3", scheduler=scheduler)
