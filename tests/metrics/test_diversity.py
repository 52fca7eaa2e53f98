import math

import pytest
import torch

from lit_align.metrics import PairwiseDiversity, VendiScore
from lit_align.metrics.base import normalized
from lit_align.metrics.diversity import pairwise_diversity, vendi_score

ATOL = 1e-6


def test_identical_embeddings_are_one_image():
    same = torch.randn(1, 8).expand(5, 8) * torch.arange(1, 6)[:, None]  # lengths do not matter
    for metric, expected in ((PairwiseDiversity(), 0), (VendiScore(), 1)):
        metric.update(same)
        assert metric.compute().item() == pytest.approx(expected, abs=ATOL)


def test_orthogonal_embeddings_are_n_images():
    for metric, expected in ((PairwiseDiversity(), 1), (VendiScore(), 5)):
        metric.update(3 * torch.eye(5, 8))
        assert metric.compute().item() == pytest.approx(expected, abs=ATOL)


def test_pairwise_diversity_is_the_loop_over_pairs():
    rows = normalized(torch.randn(6, 4, dtype=torch.float64))
    pairs = [1 - rows[i] @ rows[j] for i in range(6) for j in range(i)]
    expected = torch.stack(pairs).mean()
    torch.testing.assert_close(pairwise_diversity(rows), expected)


def test_two_images_at_an_angle_have_a_known_score():
    # Eigenvalues of [[1, c], [c, 1]] / 2 are (1 +- c) / 2.
    cos = 0.6
    rows = torch.tensor([[1.0, 0.0], [cos, 0.8]], dtype=torch.float64)
    entropy = -sum(p * math.log(p) for p in ((1 + cos) / 2, (1 - cos) / 2))
    assert vendi_score(rows).item() == pytest.approx(math.exp(entropy))


def test_both_forms_of_the_score_agree():
    rows = normalized(torch.randn(20, 6, dtype=torch.float64))  # 6 < 20: the smaller matrix
    eigenvalues = torch.linalg.eigvalsh(rows @ rows.T / 20)[-6:]  # the other 14 are zero
    expected = torch.exp(-(eigenvalues * eigenvalues.log()).sum())
    torch.testing.assert_close(vendi_score(rows), expected)
    padded = torch.nn.functional.pad(rows, (0, 20))  # 26 > 20: the other matrix
    torch.testing.assert_close(vendi_score(padded), expected)


def test_groups_are_averaged_whatever_the_order_and_batches():
    rows = torch.cat([torch.ones(2, 3), torch.eye(3), torch.ones(1, 3)])
    ids = torch.tensor([7, 7, -2, -2, -2, 4])
    order = torch.randperm(6)
    pairs, vendi = PairwiseDiversity(), VendiScore()
    for part in order.split(4):
        pairs.update(rows[part], ids[part])
        vendi.update(rows[part], ids[part])
    assert pairs.compute().item() == pytest.approx((0 + 1) / 2, abs=ATOL)  # no pair in group 4
    assert vendi.compute().item() == pytest.approx((1 + 3 + 1) / 3, abs=ATOL)


def test_without_a_pair_the_diversity_is_nan():
    metric = PairwiseDiversity()
    metric.update(torch.eye(3), torch.arange(3))
    assert metric.compute().isnan()


def test_the_embedder_sees_the_images():
    metric = VendiScore(embedder=lambda images: images.mean((2, 3)))
    images = torch.zeros(3, 3, 4, 4)
    images[[0, 1, 2], [0, 1, 2]] = 0.5  # red, green, blue
    metric.update(images, torch.zeros(3, dtype=torch.int64))
    assert metric.compute().item() == pytest.approx(3, abs=ATOL)


def test_groups_must_fit_the_images():
    with pytest.raises(ValueError, match=r"`group_ids` must be \[3\].*got \[2\]"):
        VendiScore().update(torch.eye(3), torch.zeros(2, dtype=torch.int64))
