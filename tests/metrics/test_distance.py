import math

import pytest
import torch

from lit_align.metrics import CMMD, FrechetDistance, KernelDistance

RTOL = 1e-6


def measure(metric, real, fake):
    for part in real.split(7):
        metric.update(part, real=True)
    metric.update(fake, real=False)
    return metric.compute().item()


def with_moments(number, mean, std):
    """Return rows whose mean and (diagonal, unbiased) covariance are exactly those given."""
    rows = torch.randn(number, len(mean), dtype=torch.float64)
    rows = rows - rows.mean(0)
    covariance = rows.T @ rows / (number - 1)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), rows.T, upper=False).T
    return white * torch.tensor(std) + torch.tensor(mean)


def test_frechet_distance_of_equal_covariances_is_that_of_the_means():
    real, fake = (
        with_moments(40, [0.0, 1, 2], [1.0, 2, 3]),
        with_moments(30, [3.0, 1, -2], [1.0, 2, 3]),
    )
    assert measure(FrechetDistance(3), real, fake) == pytest.approx(9 + 16, rel=RTOL)


def test_frechet_distance_of_diagonal_covariances():
    # sum of (m1 - m2)^2 + (s1 - s2)^2 = 1 + (1 - 3)^2 + (2 - 1)^2
    real, fake = with_moments(40, [0.0, 0], [1.0, 2]), with_moments(30, [1.0, 0], [3.0, 1])
    assert measure(FrechetDistance(2), real, fake) == pytest.approx(6, rel=RTOL)


def test_frechet_distance_to_itself_is_zero():
    rows = torch.randn(50, 4)
    assert measure(FrechetDistance(4), rows, rows) == pytest.approx(0, abs=1e-6)


def kernel_distance_by_loop(x, y):
    def k(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_is_the_loop(monkeypatch):
    monkeypatch.setattr("lit_align.metrics.distance._CHUNK", 4)  # several chunks, the last shorter
    x, y = torch.randn(9, 5), torch.randn(6, 5) + 0.5
    expected = kernel_distance_by_loop(x.double(), y.double())
    assert measure(KernelDistance(5), x, y) == pytest.approx(expected, rel=RTOL)


def test_kernel_distance_over_subsets_is_near_that_over_all():
    x, y = torch.randn(40, 3), torch.randn(40, 3) + 1
    everything = measure(KernelDistance(3), x, y)
    subsets = measure(KernelDistance(3, subset_size=20), x, y)
    assert subsets != everything
    assert subsets == pytest.approx(everything, rel=0.15)
    # A subset of all the samples is all the samples.
    assert measure(KernelDistance(3, subset_size=40), x, y) == pytest.approx(everything, rel=RTOL)


def test_the_global_generator_is_not_touched():
    x, y = torch.randn(10, 3), torch.randn(10, 3)
    state = torch.get_rng_state()
    values = [measure(KernelDistance(3, subset_size=4), x, y) for _ in range(2)]
    measure(KernelDistance(3), x, y)
    measure(CMMD(), x, y)
    measure(FrechetDistance(3), x, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert values[0] == values[1]


def cmmd_by_loop(x, y, sigma, scale):
    def mean(rows, columns):
        values = [math.exp(-float((a - b).square().sum()) / (2 * sigma**2))
                  for a in rows for b in columns]  # fmt: skip
        return sum(values) / len(values)

    return scale * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


@pytest.mark.parametrize(("sigma", "scale"), [(10.0, 1000.0), (0.5, 2.0)])
def test_cmmd_is_the_loop(monkeypatch, sigma, scale):
    monkeypatch.setattr("lit_align.metrics.distance._CHUNK", 4)
    x, y = torch.randn(9, 5), torch.randn(6, 5) + 0.5
    unit = [rows.double() / rows.double().norm(dim=1, keepdim=True) for rows in (x, y)]
    expected = cmmd_by_loop(*unit, sigma, scale)
    assert measure(CMMD(sigma=sigma, scale=scale), x, y) == pytest.approx(expected, rel=RTOL)


def test_cmmd_is_ten_times_the_squared_distance_of_the_means():
    # 1 - exp(-s / 200) is nearly s / 200 for s <= 4, and the squares of the norms cancel:
    # 1000 * 2 |mu_x - mu_y|^2 / 200.
    x, y = torch.randn(60, 16) + 0.3, torch.randn(50, 16) - 0.3
    unit = [torch.nn.functional.normalize(rows.double()) for rows in (x, y)]
    expected = 10 * (unit[0].mean(0) - unit[1].mean(0)).square().sum().item()
    assert measure(CMMD(), x, y) == pytest.approx(expected, rel=0.01)
    assert measure(CMMD(), x, x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("make", [lambda **o: FrechetDistance(3, **o),
                                  lambda **o: KernelDistance(3, **o), CMMD])  # fmt: skip
def test_the_reference_survives_a_reset(make):
    real, first, second = torch.randn(20, 3), torch.randn(20, 3) + 1, torch.randn(20, 3) + 2
    metric, fresh = make(), make()
    measure(metric, real, first)
    for _ in range(2):
        metric.reset()
    metric.update(second, real=False)
    assert metric.compute().item() == pytest.approx(measure(fresh, real, second), rel=RTOL)
    metric.reset()
    with pytest.raises(ValueError, match="must be 3 wide"):
        metric.update(torch.randn(20, 4), real=False)
    forgetful = make(reset_real_features=True)
    measure(forgetful, real, first)
    forgetful.reset()
    forgetful.update(second, real=False)
    with pytest.raises((ValueError, RuntimeError), match=r"real|[Mm]ore than one sample"):
        forgetful.compute()


def test_bad_arguments_are_named():
    metric = KernelDistance(3, subset_size=5)
    metric.update(torch.randn(4, 3), real=True)
    metric.update(torch.randn(6, 3), real=False)
    with pytest.raises(ValueError, match="at least 5 samples, got 4 real and 6 generated"):
        metric.compute()
    with pytest.raises(ValueError, match="`subset_size` must be at least 2, got 1"):
        KernelDistance(3, subset_size=1)
    with pytest.raises(ValueError, match="`sigma` must be positive"):
        CMMD(sigma=0)
