"""拟合的先验：EM 是对的，什么样的隐变量都不出 NaN。"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions

from vaelab.data import load
from vaelab.images import to_float
from vaelab.prior import Mixture, codes, expectation_maximization, fit_mixture, fit_prior, load_prior, save_prior
from vanilla_vae import VanillaVAE


def known(dim: int, k: int, seed: int = 0) -> Mixture:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(k, dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    means = 3 * torch.randn(k, dim, generator=generator, dtype=torch.float64)
    weights = torch.rand(k, generator=generator, dtype=torch.float64) + 0.3
    return Mixture(weights / weights.sum(), means, a @ a.mT + 0.1 * torch.eye(dim, dtype=torch.float64))


@pytest.mark.parametrize("dim, k", [(1, 1), (2, 3), (16, 5)])
def test_density_and_samples_are_those_of_torch_distributions(dim, k):
    mixture = known(dim, k)
    parts = distributions.MultivariateNormal(mixture.means, mixture.covariances)
    other = distributions.MixtureSameFamily(distributions.Categorical(mixture.weights), parts)
    z = mixture.sample(20_000, torch.Generator().manual_seed(1))
    torch.testing.assert_close(mixture.log_prob(z), other.log_prob(z), rtol=1e-10, atol=1e-10)
    stderr = (z.var(0) / len(z)).sqrt()
    assert ((z.mean(0) - other.mean) / stderr).abs().max() < 5
    assert (z.var(0) / other.variance - 1).abs().max() < 0.1
    assert torch.equal(z, mixture.sample(20_000, torch.Generator().manual_seed(1)))


def test_a_known_mixture_is_recovered():
    true = known(2, 3, seed=4)
    z, held = (true.sample(n, torch.Generator().manual_seed(n)) for n in (6_000, 5_000))
    fitted = fit_mixture(z, components=(1, 2, 3, 4, 6))
    assert len(fitted.weights) == 3
    gap = true.log_prob(held) - fitted.log_prob(held)  # KL(true ‖ fitted) 的估计；每个参数约花 1/(2N) nat
    assert -0.01 < gap.mean() < 0.02
    nearest = torch.cdist(true.means, fitted.means)
    assert nearest.min(1).values.max() < 0.25


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), dim=st.integers(1, 6), k=st.integers(1, 6), n=st.integers(2, 200))
def test_every_step_raises_the_objective(seed, dim, k, n):
    """目标是训练对数似然加协方差的先验；EM 的定理说它一步也不降。"""
    z = known(dim, 3, seed).sample(n, torch.Generator().manual_seed(seed))
    values = [value for _, value in expectation_maximization(z, k, torch.Generator().manual_seed(0), tolerance=1e-9)]
    assert all(b >= a - 1e-9 * (1 + abs(a)) for a, b in zip(values, values[1:]))


def test_held_out_likelihood_rises_and_the_likelihood_of_large_samples_too():
    true = known(4, 4, seed=2)
    z, held = (true.sample(n, torch.Generator().manual_seed(n)) for n in (4_000, 3_000))
    walked = [(mixture.log_prob(z).mean(), mixture.log_prob(held).mean()) for mixture, _ in expectation_maximization(z, 4, torch.Generator())]
    assert len(walked) > 3 and walked[-1][1] > walked[0][1]
    assert all(b[0] >= a[0] - 1e-4 for a, b in zip(walked, walked[1:]))  # 先验只值一个样本，四千个里几乎看不见


DEGENERATE = {
    "全同": torch.zeros(50, 4),
    "两个值": torch.tensor([[0.0, 1.0]] * 30 + [[1.0, 0.0]] * 30),
    "一个样本": torch.randn(1, 4, generator=torch.Generator().manual_seed(0)),
    "样本比维数少": torch.randn(5, 40, generator=torch.Generator().manual_seed(0)),
    "几维坍塌": torch.cat([torch.randn(300, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(300, 2)], 1),
    "一个离群": torch.cat([torch.randn(100, 2, generator=torch.Generator().manual_seed(0)), torch.full((1, 2), 1e6)]),
    "极窄": 1e-20 * torch.randn(100, 2, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("z", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_codes_never_give_nan(z):
    for mixture in (fit_mixture(z), *(m for k in (1, 3, 8) for m, _ in expectation_maximization(z.double(), k, torch.Generator().manual_seed(0)))):
        samples = mixture.sample(50, torch.Generator().manual_seed(0))
        assert samples.isfinite().all() and mixture.log_prob(z).isfinite().all() and mixture.log_prob(samples).isfinite().all()
        assert mixture.weights.sum() == pytest.approx(1)


def test_too_few_samples_fall_back_to_one_gaussian_and_nothing_is_refused():
    assert len(fit_mixture(known(40, 3).sample(60, torch.Generator().manual_seed(0))).weights) == 1
    for wrong, said in ((torch.zeros(0, 3), "至少一行"), (torch.tensor([[1.0, float("nan")]]), "有 1 个不是"), (torch.zeros(3), "一行一个编码")):
        with pytest.raises(ValueError, match=said):
            fit_mixture(wrong)


def test_what_is_fitted_are_samples_of_the_posterior(tmp_path):
    """拟合的是 z ~ q(z|x) 而不是 mu：没有训练过的编码器 log_var = 0，样本的方差比 mu 的多 1。"""
    torch.manual_seed(0)
    model, data = VanillaVAE(3, 3, [4, 8], image_size=16), load("faces", image_size=16, count=3000)
    z = codes(model, data.train, seed=3)
    with torch.no_grad():
        mu = model.eval().encode(to_float(data.train))[0].double()
    n = len(z)
    assert ((z - mu).var(0) - 1).abs().max() < 5 * (2 / n) ** 0.5
    torch.testing.assert_close(z, codes(model, data.train, seed=3))
    prior, again = fit_prior(model, data.train, seed=3), fit_prior(model, data.train, seed=3)
    assert torch.equal(prior.means, again.means)
    assert (prior.covariances.mean(0).diagonal() > 0.5).all()
    save_prior(tmp_path / "prior.pt", "这些权重", prior)
    assert torch.equal(load_prior(tmp_path / "prior.pt", "这些权重").log_prob(z), prior.log_prob(z))
    assert load_prior(tmp_path / "prior.pt", "别的权重") is None and load_prior(tmp_path / "没有", "这些权重") is None


def test_a_mixture_that_is_none_gets_a_sentence():
    weights, means = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    covariances = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    with pytest.raises(ValueError, match=r"协方差 \[K, L, L\]，收到 \[2\]、\[2, 3\]、\[2, 2, 2\]"):
        Mixture(weights, means, covariances[:, :2, :2])
    empty = Mixture(2 * weights * torch.tensor([1, 0]), means, covariances.clone())  # 空的分量：抽不到，也不是 NaN
    assert empty.log_prob(torch.zeros(4, 3)).isfinite().all() and empty.sample(5).isfinite().all()
    covariances[1, 2, 2] = 0
    with pytest.raises(ValueError, match="第 1 个分量的协方差不是正定的"):
        Mixture(weights, means, covariances)
