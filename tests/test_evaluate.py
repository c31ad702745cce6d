"""vaelab.evaluate：在真值已知的线性高斯模型（概率 PCA）上核对，其余用 torch.distributions 核对。"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from vaelab.evaluate import (
    bits_per_dim,
    elbo_from_mse,
    evaluate,
    gaussian_log_density,
    gaussian_log_likelihood,
    kl_to_standard_normal,
    log_likelihood_bound,
    optimal_kld_weight,
)
from vaelab.images import to_float
from vanilla_vae import VanillaVAE

C, H, W = 1, 2, 4
D = C * H * W


class LinearGaussian(nn.Module):
    """p(x|z) = N(Wz + b, σ²I)，W 的各列正交，所以真后验恰好是对角高斯；``bad`` 把 q 故意弄坏。"""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, sigma2: float, bad: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.sigma2, self.bad = sigma2, bad
        self.batches: list[tuple[str, int]] = []
        self.codes: list[torch.Tensor] = []

    def encode(self, x):
        assert not self.training
        self.batches.append(("encode", len(x)))
        precision = self.weight.square().sum(dim=0) / self.sigma2 + 1
        mu = (x.flatten(1) - self.bias) @ self.weight / self.sigma2 / precision
        log_var = -precision.log().expand_as(mu)
        return [mu + 0.2, log_var + math.log(2.5)] if self.bad else [mu, log_var]

    def decode(self, z):
        self.batches.append(("decode", len(z)))
        self.codes.append(z)
        return (z @ self.weight.T + self.bias).view(-1, C, H, W)

    def truth(self, images):
        """逐图的 log p(x) = log N(x; b, WWᵀ + σ²I)。"""
        covariance = self.weight @ self.weight.T + self.sigma2 * torch.eye(D).double()
        x = to_float(images).double().flatten(1)
        return MultivariateNormal(self.bias, covariance).log_prob(x).detach()


def fitted(count: int, bad: bool = False) -> tuple[LinearGaussian, torch.Tensor]:
    """一组 8 位图像，和它们的概率 PCA 极大似然解（Tipping & Bishop, 1999，式 (7)(8)），L = 2。"""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, generator=g) @ torch.randn(2, D, generator=g) * 0.2
    x = x + 0.1 * torch.randn(count, D, generator=g)
    images = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).view(-1, C, H, W)
    x = to_float(images).double().flatten(1)
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    sigma2 = values[:-2].mean().item()
    return LinearGaussian(vectors[:, -2:] * (values[-2:] - sigma2).sqrt(), x.mean(dim=0), sigma2, bad), images


def test_exact_posterior_closes_the_gap():
    model, images = fitted(4000)
    truth = model.truth(images)
    result = evaluate(model, images)
    # 极大似然解处最优 σ² 就是模型的 σ²，ELBO 就是 log p(x)；只剩每图一个 z 的抽样误差。
    assert result.sigma2 == result.mse == pytest.approx(model.sigma2, rel=0.02)
    assert result.elbo == pytest.approx(truth.mean().item(), abs=5 * math.sqrt(1 / len(images)))
    # 权重 p(x, z)/q(z|x) 恒等于 p(x)，所以一个样本就够，且没有抽样误差。
    bound, error = log_likelihood_bound(model, images, model.sigma2, 1)
    assert bound == pytest.approx(truth.mean().item(), abs=1e-9)
    assert error == pytest.approx((truth.std() / math.sqrt(len(images))).item(), rel=1e-9)


def test_elbo_agrees_with_torch_distributions_for_any_q():
    model, images = fitted(50, bad=True)
    result = evaluate(model, images)
    x = to_float(images).double()
    mu, log_var = model.eval().encode(x)
    z = next(z for z in model.codes if not torch.allclose(z, mu))
    recons = model.decode(z)
    log_p = Normal(recons, math.sqrt(result.sigma2)).log_prob(x).sum() / 50
    kld = kl_divergence(Normal(mu, (log_var / 2).exp()), Normal(0.0, 1.0)).mean(dim=0)
    assert result.reconstruction == pytest.approx(log_p.item(), rel=1e-12)
    torch.testing.assert_close(result.kld_per_dim, kld.detach())
    assert result.kld == pytest.approx(kld.sum().item())
    assert result.elbo == result.reconstruction - result.kld
    assert result.baseline_mse == pytest.approx(x.var(dim=0, correction=0).mean().item())
    mse = (model.decode(mu) - x).square().mean().item()
    assert result.psnr == pytest.approx(20 * math.log10(2 / math.sqrt(mse)))
    assert result.active_units == 2 and (result.count, result.dim) == (50, D)
    # 噪声是标准正态：z 标准化后的均值与方差（100 个数）。
    eps = (z - mu) / (log_var / 2).exp()
    assert abs(eps.mean()) < 0.4 and 0.6 < eps.var() < 1.5


def test_variance_from_elsewhere_and_the_standard_error():
    model, images = fitted(60, bad=True)
    free = evaluate(model, images)
    for sigma2 in (free.mse * 0.7, free.mse, free.mse * 2):
        model.codes.clear()
        fixed = evaluate(model, images, sigma2=sigma2)
        x = to_float(images).double()
        mu, log_var = model.eval().encode(x)
        recons = model.decode(next(z for z in model.codes if not torch.allclose(z, mu)))
        log_p = Normal(recons, math.sqrt(sigma2)).log_prob(x).flatten(1).sum(dim=1)
        each = log_p - kl_divergence(Normal(mu, (log_var / 2).exp()), Normal(0.0, 1.0)).sum(dim=1)  # [60]，逐图的 ELBO
        assert fixed.elbo == pytest.approx(each.mean().item()) and fixed.sigma2 == sigma2
        assert fixed.elbo_stderr == pytest.approx(each.std().item() / math.sqrt(60), rel=1e-9)
        assert fixed.mse == free.mse == free.sigma2 and fixed.elbo <= free.elbo + 1e-9
        assert fixed.bits_per_dim == pytest.approx(bits_per_dim(fixed.elbo, D))
    assert math.isnan(evaluate(model, images[:1]).elbo_stderr)
    with pytest.raises(ValueError, match="应为有限的正数，收到 0"):
        evaluate(model, images, sigma2=0)


def test_bound_rises_with_samples_to_the_truth():
    model, images = fitted(100, bad=True)
    images = images[:1].expand(1000, C, H, W)  # 同一张图：标准误差里只剩抽样误差
    truth = model.truth(images[:1]).item()
    bounds = [log_likelihood_bound(model, images, model.sigma2, k, chunk=500) for k in (1, 5, 50, 500)]
    for bound, error in bounds:
        assert 0 < error < 0.1 and bound < truth + 4 * error
    for (low, low_error), (high, high_error) in zip(bounds, bounds[1:]):
        assert low < high + 4 * math.hypot(low_error, high_error)
    assert bounds[0][0] < bounds[1][0] < bounds[2][0] < truth  # 这几步远大于标准误差
    assert bounds[0][0] < truth - 0.5 and bounds[3][0] == pytest.approx(truth, abs=0.02)
    # K = 1 的期望是 ELBO，它有闭式。
    x = to_float(images[:1]).double()
    mu, log_var = model.eval().encode(x)
    noise = (model.weight.square().sum(dim=0) * log_var.exp()).sum() / D
    mse = (model.decode(mu) - x).square().mean() + noise
    elbo = gaussian_log_likelihood(mse, model.sigma2, D) - kl_to_standard_normal(mu, log_var).sum()
    assert abs(bounds[0][0] - elbo.item()) < 4 * bounds[0][1]


def test_results_do_not_depend_on_batching_and_memory_does_not_grow():
    model, images = fitted(37, bad=True)
    results = []
    for batch_size in (1, 7, 1000):
        model.batches.clear()
        results.append(evaluate(model, images, batch_size=batch_size))
        assert max(size for _, size in model.batches) == min(batch_size, 37)
    for other in results[1:]:
        for name, value in vars(results[0]).items():
            torch.testing.assert_close(getattr(other, name), value, msg=name)
    bounds = []
    for samples, chunk in ((10, 1), (10, 7), (10, 64), (10, 1000)):
        model.batches.clear()
        bounds.append(log_likelihood_bound(model, images, model.sigma2, samples, chunk=chunk))
        assert max(size for _, size in model.batches) <= chunk
        assert sum(size for name, size in model.batches if name == "decode") == 37 * samples
        assert bounds[-1] == pytest.approx(bounds[0], rel=1e-9)
    assert evaluate(model, images, seed=1).elbo != results[0].elbo
    assert log_likelihood_bound(model, images, model.sigma2, 10, seed=1)[0] != pytest.approx(bounds[0][0], rel=1e-9)


def tiny_vae() -> tuple[VanillaVAE, torch.Tensor]:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8)
    model = VanillaVAE(3, 4, [4, 6], 8)
    for _ in range(5):
        model(to_float(images))  # 让批归一化的统计量离开默认值
    return model, images


def test_model_and_global_random_state_are_left_as_they_were():
    model, images = tiny_vae()
    model.encoder[0][1].eval()  # 单独冻结的批归一化
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = torch.get_rng_state()
    result = evaluate(model, images, batch_size=4)
    bound, _ = log_likelihood_bound(model, images, result.sigma2, 20, chunk=8)
    with pytest.raises(ValueError):
        evaluate(model, images[:, :1])  # 通道不符：模型报错，模式仍要恢复
    assert math.isfinite(result.elbo) and math.isfinite(bound)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(before, torch.get_rng_state())
    assert not result.kld_per_dim.requires_grad and all(p.grad is None for p in model.parameters())
    for text in ("9 张图", "D = 192", "nat/图", "比特/维", "/4", "dB", "2σ²/D"):
        assert text in result.summary()


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_devices_agree(device):
    if not (torch.cuda if device == "cuda" else torch.backends.mps).is_available():
        pytest.skip(f"这台机器没有 {device}")
    model, images = tiny_vae()
    cpu = evaluate(model, images), log_likelihood_bound(model, images, 0.1, 20)
    model.to(device)
    assert evaluate(model, images).elbo == pytest.approx(cpu[0].elbo, rel=1e-4)
    assert log_likelihood_bound(model, images, 0.1, 20) == pytest.approx(cpu[1], rel=1e-4)


def test_half_precision_model():
    model, images = tiny_vae()
    assert evaluate(model.bfloat16(), images).mse == pytest.approx(evaluate(model.float(), images).mse, rel=0.02)


finite = st.floats(-5, 5)


@settings(deadline=None)
@given(mu=finite, log_var=finite, x=finite)
def test_gaussian_formulas(mu, log_var, x):
    mu, log_var, x = (torch.tensor([[v]], dtype=torch.float64) for v in (mu, log_var, x))
    q = Normal(mu, (log_var / 2).exp())
    torch.testing.assert_close(gaussian_log_density(x, mu, log_var), q.log_prob(x))
    torch.testing.assert_close(kl_to_standard_normal(mu, log_var), kl_divergence(q, Normal(0.0, 1.0)))


@settings(deadline=None)
@given(log_var=st.floats(-(2**-10), 2**-10, width=32))
def test_kld_of_a_collapsed_dimension_is_never_negative(log_var):
    assert kl_to_standard_normal(torch.zeros(1, 1), torch.tensor([[log_var]])).item() >= 0


@settings(deadline=None)
@given(mse=st.floats(1e-4, 4), kld=st.floats(0, 100), dim=st.integers(1, 12288), factor=st.floats(1.05, 20))
def test_optimal_variance_maximises_the_elbo(mse, kld, dim, factor):
    best = elbo_from_mse(mse, kld, dim)
    for sigma2 in (mse * factor, mse / factor):
        assert gaussian_log_likelihood(mse, sigma2, dim) - kld < best
    # 换一种说法：σ² = wD/2 时，损失 MSE + w·KL 正是 −2σ²/D·ELBO，差一个与模型无关的常数。
    weight, sigma2 = optimal_kld_weight(mse, dim), mse
    loss_plus_constant = mse + weight * kld + sigma2 * math.log(2 * math.pi * sigma2)
    assert loss_plus_constant == pytest.approx(-weight * best, rel=1e-9, abs=1e-9)


def test_bits_per_dim_by_hand():
    # [-1, 1] 上的均匀密度是 1/2；换到 0–255 的灰阶，密度 1/255，即 log2(255) 比特。
    assert bits_per_dim(10 * math.log(0.5), 10) == pytest.approx(math.log2(255))
    assert elbo_from_mse(0.0, 3.0, 10) == math.inf


@pytest.mark.parametrize(
    ("change", "error", "came"),
    [
        ({"images": torch.zeros(2, 3, 8, 8)}, TypeError, "float32"),
        ({"images": [[1]]}, TypeError, "list"),
        ({"images": torch.zeros(0, 3, 8, 8, dtype=torch.uint8)}, ValueError, r"\[0, 3, 8, 8\]"),
        ({"images": torch.zeros(3, 8, 8, dtype=torch.uint8)}, ValueError, r"\[3, 8, 8\]"),
        ({"seed": -1}, ValueError, "-1"),
        ({"sigma2": 0.0}, ValueError, "0.0"),
        ({"sigma2": math.nan}, ValueError, "nan"),
        ({"num_samples": 0}, ValueError, "收到 0"),
        ({"chunk": 1.5}, TypeError, "收到 1.5"),
    ],
)
def test_bad_input_is_named(change, error, came):
    model, images = tiny_vae()
    with pytest.raises(error, match=f"应为.*{came}.*。"):
        log_likelihood_bound(model, **{"images": images, "sigma2": 0.1, "num_samples": 2, **change})
    if set(change) <= {"images", "seed"}:
        with pytest.raises(error, match=f"应为.*{came}.*。"):
            evaluate(model, **{"images": images, **change})


def test_active_units_threshold():
    model, images = fitted(100)
    model.weight.data[:, 0] = 0  # 解码器不用第一维，后验退回先验
    result = evaluate(model, images)
    assert result.active_units == 1
    assert result.kld_per_dim[0] == 0 and result.kld_per_dim[1] > 0.1
