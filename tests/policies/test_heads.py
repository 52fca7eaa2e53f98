import pytest
import torch
from torch import nn

from lit_align.policies import TemporalCritic
from lit_align.rewards import ShapesCLIP

ATOL = 1e-5


class FakeTower(nn.Module):
    """Embeds the mean colour, padded to D dimensions."""

    def __init__(self, width=8):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.width = width

    def embed_images(self, images):
        means = self.scale * images.mean(dim=(2, 3))
        return nn.functional.pad(means, (0, self.width - 3))


def critic(width=8, **options):
    return TemporalCritic(FakeTower(width), **{"hidden": (16, 8, 8, 4), **options})


@pytest.mark.parametrize(("width", "count"), [(768, 927_969), (1024, 1_190_113)])
def test_the_papers_sizes(width, count):
    built = TemporalCritic(FakeTower(width))
    assert sum(p.numel() for p in built.parameters()) == count
    assert built.init_std == 1 / (width + 1)


def test_a_fresh_critic_expects_nothing():
    embeddings = nn.functional.normalize(torch.randn(64, 768), dim=1)
    values = TemporalCritic(FakeTower(768))(embeddings)
    assert values.abs().max() < 1e-3
    assert values.std() > 0


def test_weights_start_as_small_as_they_should():
    built = TemporalCritic(FakeTower(64))
    for layer in built.layers[:3]:
        assert layer.weight.std().item() == pytest.approx(1 / 65, rel=0.1)
        assert not layer.bias.any()


def test_it_is_affine_in_the_embedding():
    torch.manual_seed(1)
    built = critic().eval()
    for layer in built.layers:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    first, second = torch.randn(2, 5, 8)
    mixed = built(0.3 * first + 0.7 * second)
    torch.testing.assert_close(
        mixed, 0.3 * built(first) + 0.7 * built(second), atol=ATOL, rtol=ATOL
    )


def test_a_nonlinearity_and_layer_norm_are_options():
    torch.manual_seed(1)
    embeddings = torch.randn(6, 8)
    bent = critic(nonlinearity="relu")
    for layer in bent.layers:
        nn.init.normal_(layer.weight)
    middle = bent((embeddings[:3] + embeddings[3:]) / 2)
    assert not torch.allclose(middle, (bent(embeddings[:3]) + bent(embeddings[3:])) / 2)
    normed = critic(layer_norm=True)
    extra = 2 * (16 + 8 + 8 + 4)  # scale and shift
    assert sum(p.numel() for p in normed.parameters()) == extra + sum(
        p.numel() for p in critic().parameters()
    )


def test_dropout_belongs_to_the_row():
    torch.manual_seed(1)
    built = critic(hidden=(32, 16), dropout=(0.5, 0.25))
    for layer in built.layers:
        nn.init.normal_(layer.weight)
    embeddings, keys = torch.randn(6, 8), torch.arange(6) + 7
    state = torch.get_rng_state()
    dropped = built(embeddings, keys)
    assert torch.equal(torch.get_rng_state(), state)
    order = torch.tensor([5, 3, 0])
    torch.testing.assert_close(built(embeddings[order], keys[order]), dropped[order])
    assert not torch.allclose(built(embeddings, keys + 1), dropped)
    assert not torch.allclose(built(embeddings), dropped)
    torch.testing.assert_close(built.eval()(embeddings, keys), built(embeddings))
    assert built.train().evaluate(embeddings[None]).shape == (1, 6)
    assert built.training


def test_dropout_keeps_the_expected_value():
    built = critic(hidden=(4,), dropout=(0.5,))
    nn.init.ones_(built.layers[0].weight)
    nn.init.ones_(built.layers[1].weight)
    embeddings = torch.ones(4000, 8)
    values = built(embeddings, torch.arange(4000))
    assert values.mean().item() == pytest.approx(32, rel=0.05)
    assert set(values.tolist()) == {0.0, 16.0, 32.0, 48.0, 64.0}


def test_the_tower_is_frozen_and_in_no_checkpoint():
    built = critic()
    assert not any(p.requires_grad for p in built.tower.parameters())
    assert not any("tower" in name for name in built.state_dict())
    real = TemporalCritic(ShapesCLIP(), hidden=(4,), dropout=())
    assert real.layers[0].in_features == 64
    embeddings = real.embed(torch.rand(2, 3, 32, 32))
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="`tower` needs `embed_images`, Linear has none"):
        TemporalCritic(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"`nonlinearity` must be None or 'relu', got 'gelu'"):
        critic(nonlinearity="gelu")
    with pytest.raises(ValueError, match=r"shares in \[0, 1\) of at most 4 hidden layers"):
        critic(dropout=(1.0,))
