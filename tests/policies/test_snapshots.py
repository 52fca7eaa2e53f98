"""Averaged weights: their arithmetic, and swapping them in and out."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lit_align.policies.snapshots import Snapshot, ramp, warm_up
from tests.conftest import tiny_policy

PROMPTS = ["a red circle", "a blue square"]
TRAINED = pytest.mark.parametrize(
    ("family", "train"), [("sd", "lora"), ("sd", "full"), ("sd3", "lora"), ("sd3", "full")]
)


def trainable(module):
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def copies(tensors):
    return {n: t.detach().clone() for n, t in tensors.items()}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert left
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def disturb(module, seed=0, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainable(module).values():
            p.add_(size * torch.randn(p.shape, generator=generator))


def attached(module, step=0):
    snapshot = Snapshot()
    snapshot.attach(module)
    snapshot.start(step)
    return snapshot


def output(policy):
    conditioning = policy.encode_prompt(PROMPTS)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, *policy.latent_shape(), generator=generator)
    return policy.predict(latents, torch.tensor([300, 700]), conditioning, 1.0)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.1), (1, 2 / 11), (8, 0.5), (80, 0.9), (81, 0.9), (10_000, 0.9)]
)
def test_a_young_average_forgets_its_start(step, expected):
    assert warm_up(step, 0.9) == pytest.approx(expected, abs=1e-15)
    assert warm_up(step, 1.0) == pytest.approx((1 + step) / (10 + step), abs=1e-15)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (10, 0.0), (11, 0.25), (12, 0.5), (13, 0.6), (99, 0.6)]
)
def test_ramp_is_flat_then_linear_then_flat(step, expected):
    assert ramp(step, flat=10, rate=0.25, hold=0.6) == expected


def test_average_by_hand():
    module = nn.Linear(2, 1, bias=False)
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    module.register_parameter("frozen", frozen)
    module.weight.data = torch.tensor([[1.0, 2.0]])
    snapshot = attached(module)
    assert set(snapshot.average) == {"weight"}
    for values, decay in (([3.0, 2.0], 0.5), ([4.0, 6.0], 0.75)):
        module.weight.data = torch.tensor([values])
        snapshot.update(decay)
    # (1 + 3) / 2 = 2, then 3/4 of it and 1/4 of 4; (2 + 2) / 2 = 2, then 3/4 of it and 1/4 of 6
    assert snapshot.average["weight"].tolist() == [[2.5, 3.0]]
    assert module.weight.tolist() == [[4.0, 6.0]]


def test_without_decay_it_is_a_copy_bit_by_bit():
    policy = tiny_policy("sd")
    snapshot = attached(policy)
    disturb(policy)
    snapshot.update(0.0)
    assert_equal(snapshot.average, copies(trainable(policy)))
    disturb(policy, seed=1)
    before = copies(snapshot.average)
    snapshot.update(1.0)
    assert_equal(snapshot.average, before)


def test_one_update_for_an_optimiser_step():
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    snapshot = attached(module, step=3)
    module.weight.data.fill_(8.0)
    seen = []
    for step in (3, 4, 4, 4, 6):  # 3 is where it started; 4 is asked for again
        snapshot.refresh(step, 0.5)
        seen.append(snapshot.average["weight"].item())
    assert seen == [0, 4, 4, 4, 6]


def test_sixteen_bit_weights_are_averaged_in_float32():
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    module.weight.data.fill_(1.0)
    snapshot = attached(module)
    module.weight.data.fill_(2.0)
    snapshot.update(0.999)
    assert snapshot.average["weight"].dtype == torch.float32
    assert snapshot.average["weight"].item() == pytest.approx(1.001)
    with snapshot.applied():
        assert module.weight.item() == 1
    assert module.weight.item() == 2


@TRAINED
def test_the_average_predicts_while_it_is_applied(family, train):
    """And the pretrained weights are what they were, inside and outside."""
    policy = tiny_policy(family, train=train)
    policy.keep_reference()
    with torch.no_grad():
        pretrained = output(policy)
        disturb(policy, seed=0)
        snapshot, old = attached(policy), output(policy)
        disturb(policy, seed=1)
        weights, new = copies(trainable(policy)), output(policy)
        assert not torch.equal(old, new)
        with snapshot.applied():
            assert torch.equal(output(policy), old)
            with policy.reference():
                assert torch.equal(output(policy), pretrained)
            assert_equal(snapshot.displaced, weights)
        assert snapshot.displaced == {}
        assert_equal(copies(trainable(policy)), weights)
        assert torch.equal(output(policy), new)
        with policy.reference():
            assert torch.equal(output(policy), pretrained)


def test_the_weights_are_back_whatever_happens():
    module = nn.Linear(2, 2)
    snapshot = attached(module)
    disturb(module)
    weights = copies(trainable(module))
    with pytest.raises(KeyError), snapshot.applied():  # noqa: PT012
        assert_equal(copies(trainable(module)), snapshot.average)
        with snapshot.applied():  # in place already
            pass
        assert_equal(copies(trainable(module)), snapshot.average)
        raise KeyError
    assert_equal(copies(trainable(module)), weights)


def test_nothing_is_applied_before_the_start_and_after_it_is_forgotten():
    module, snapshot = nn.Linear(2, 2), Snapshot()
    weights = copies(trainable(module))
    snapshot.attach(module)
    with snapshot.applied():
        assert_equal(copies(trainable(module)), weights)
    snapshot.start(5)
    snapshot.clear()
    assert (snapshot.average, snapshot.step) == ({}, 0)


def test_autocast_forgets_its_copies_of_the_weights():
    """It keeps 16-bit ones from call to call, those made without gradient too."""
    torch.manual_seed(0)
    module, inputs = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), torch.randn(3, 4)
    snapshot, before = attached(module), copy.deepcopy(module)
    disturb(module, size=1.0)
    after = copy.deepcopy(module)
    with torch.autocast("cpu", torch.bfloat16):
        module(inputs)
        with torch.no_grad(), snapshot.applied():
            old = module(inputs)
        result = module(inputs)
    result.float().sum().backward()
    outputs = []
    for each in (before, after):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(each(inputs))
    assert torch.equal(old, outputs[0])
    assert torch.equal(result, outputs[1])
    assert not torch.equal(result, old)
    outputs[1].float().sum().backward()
    for p, expected in zip(module.parameters(), after.parameters(), strict=True):
        assert torch.equal(p.grad, expected.grad)


def test_state_round_trip(tmp_path):
    policy = tiny_policy("sd")
    snapshot = attached(policy, step=7)
    disturb(policy)
    snapshot.update(0.3)
    torch.save(snapshot.state_dict(), tmp_path / "state.pt")
    other = Snapshot()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other.attach(policy)
    assert other.step == 7
    assert_equal(other.average, snapshot.average)
    disturb(policy, seed=1)
    for each in (snapshot, other):
        each.update(0.3)
    assert_equal(other.average, snapshot.average)


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0,
                            world_size=1)  # fmt: skip
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_weights_are_swapped_and_stored_whole(mesh):
    """The outermost module of FSDP2 stays gathered after a forward: it must forget that."""
    module = nn.Sequential(nn.Linear(2, 1, bias=False))
    nn.init.ones_(module[0].weight)
    fully_shard(module, mesh=mesh)
    snapshot, ones = attached(module), torch.ones(1, 2)
    with torch.no_grad():
        module[0].weight.mul_(3)
        assert module(ones).item() == 6
        with snapshot.applied():
            assert module(ones).item() == 2
        assert module(ones).item() == 6
    snapshot.update(0.5)
    state = snapshot.state_dict()
    assert type(state["average"]["0.weight"]) is torch.Tensor
    assert state["average"]["0.weight"].tolist() == [[2, 2]]
    resumed = Snapshot()
    resumed.load_state_dict(state)
    resumed.attach(module)
    assert isinstance(resumed.average["0.weight"], DTensor)
    with resumed.applied():
        output = module(ones)
        assert output.item() == 4
    loss = module(ones).sum()
    loss.backward()
    assert loss.item() == 6
    assert module[0].weight.grad.full_tensor().tolist() == [[1, 1]]
