"""vanilla_vae.py：与公开实现的数值一致，形状与报错，以及编译、导出、混合精度、各设备上的行为。"""

import copy
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, kl_divergence

from vaelab.plan import _choose_compile
from vanilla_vae import VanillaVAE

REFERENCE = Path(__file__).parent.parent.parent / "shared/reference/public_vanilla_vae.npz"


def tiny(size: int = 16, widths=(4, 6), channels: int = 3) -> tuple[VanillaVAE, torch.Tensor]:
    """一个小模型和一批图；走过几步训练态的前向，批归一化的统计量已不是默认值，log_var 也不全是零。"""
    torch.manual_seed(0)
    model = VanillaVAE(channels, 5, list(widths), size)
    nn.init.normal_(model.fc_var.weight, std=0.1)
    x = torch.rand(4, channels, size, size) * 2 - 1
    for _ in range(3):
        model(x)
    return model, x


def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model.loss_function(*model(x), M_N=0.01)["loss"]


def seeded_step(model: nn.Module, x: torch.Tensor, run=step) -> torch.Tensor:
    torch.manual_seed(1)
    return run(model, x)


# —— 与公开实现一致 ——


def test_public_checkpoint_gives_the_same_numbers():
    if not REFERENCE.exists():
        pytest.skip("没有 ../shared/reference/public_vanilla_vae.npz")
    with np.load(REFERENCE) as file:
        data = {key: torch.from_numpy(file[key]) for key in file.files}
    model = VanillaVAE(3, 4, [4, 4, 8, 8, 512]).eval()
    model.load_state_dict({k.removeprefix("sd/"): v for k, v in data.items() if k.startswith("sd/")}, strict=True)
    with torch.no_grad():
        mu, log_var = model.encode(data["x"])
        losses = model.loss_function(data["rec"], data["x"], data["mu"], data["log_var"], M_N=0.00025)
        ours = [mu, log_var, model.decode(data["z"]), *losses.values()]
    expected = ["mu", "log_var", "rec", "loss", "mse", "kld_upstream_sign"]
    assert list(losses) == ["loss", "Reconstruction_Loss", "KLD"]
    for name, value in zip(expected, ours, strict=True):
        sign = -1 if name == "kld_upstream_sign" else 1
        torch.testing.assert_close(sign * value, data[name], rtol=0, atol=1e-5, check_dtype=False, msg=name)


def test_default_size():
    model = VanillaVAE(3, 128)
    assert sum(p.numel() for p in model.parameters()) == 3_937_635
    assert len(model.state_dict()) == 78


# —— 形状 ——


@settings(max_examples=40, deadline=None)
@given(
    channels=st.integers(1, 5),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    latent=st.integers(1, 5),
    multiple=st.integers(1, 3),
    batch=st.integers(2, 4),
    seed=st.integers(0, 1000),
)
def test_any_architecture_keeps_shapes_and_range(channels, widths, latent, multiple, batch, seed):
    torch.manual_seed(seed)
    size, given_widths = multiple * 2 ** len(widths), list(widths)
    model = VanillaVAE(channels, latent, widths, size)
    x = torch.rand(batch, channels, size, size) * 2 - 1
    recons, same, mu, log_var = outputs = model(x)
    losses = model.loss_function(*outputs, M_N=0.1)
    assert widths == given_widths and same is x
    assert recons.shape == x.shape and recons.abs().max() <= 1
    assert mu.shape == log_var.shape == (batch, latent)
    assert torch.equal(log_var, torch.zeros_like(log_var))  # fc_var 从零开始
    assert losses["KLD"] >= 0 and not losses["KLD"].requires_grad
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.sample(3).shape == (3, channels, size, size)


def test_every_output_pixel_depends_on_the_latent_and_every_latent_on_the_input():
    model, x = tiny(widths=(8, 8))
    model.eval()
    z = torch.randn(4, 5, requires_grad=True)
    spread = model.decode(torch.randn(64, 5)).std(dim=0)
    assert (spread > 0).all()
    (grad,) = torch.autograd.grad(model.decode(z)[0].sum(), z)
    assert grad[1:].abs().max() == 0 and grad[0].abs().min() > 0  # eval 下各图互不影响


# —— 损失 ——


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 3), weight=st.floats(0, 10))
def test_loss_agrees_with_torch_distributions(seed, scale, weight):
    g = torch.Generator().manual_seed(seed)
    recons, x = torch.rand(2, 3, 2, 4, 4, generator=g).double()
    mu, log_var = scale * torch.randn(2, 3, 5, generator=g).double()
    losses = VanillaVAE(2, 5, [2], 4).loss_function(recons, x, mu, log_var, M_N=weight)
    mse = sum((a - b) ** 2 for a, b in zip(recons.flatten().tolist(), x.flatten().tolist())) / x.numel()
    kld = kl_divergence(Normal(mu, (log_var / 2).exp()), Normal(0.0, 1.0)).sum(dim=1).mean().item()
    assert losses["Reconstruction_Loss"].item() == pytest.approx(mse, rel=1e-12)
    assert losses["KLD"].item() == pytest.approx(kld, rel=1e-9)
    assert losses["loss"].item() == pytest.approx(mse + weight * kld, rel=1e-9)


@settings(deadline=None)
@given(values=st.lists(st.floats(-(2**-9), 2**-9, width=32), min_size=1, max_size=5))
def test_kld_of_a_collapsed_posterior_is_never_negative(values):
    x = torch.zeros(1, 1, 2, 2)
    log_var = torch.tensor([values])
    losses = VanillaVAE(1, 5, [1], 2).loss_function(x, x, torch.zeros_like(log_var), log_var, M_N=1.0)
    assert losses["KLD"] >= 0


def test_numbers_of_every_kind_weigh_alike():
    model, x = tiny()
    outputs = model(x)
    weights = [2.0, 2, np.float32(2), np.float64(2), np.int64(2), torch.tensor(2.0), torch.tensor(2.0).double()]
    losses = [model.loss_function(*outputs, M_N=weight)["loss"] for weight in weights]
    assert losses[0].dim() == 0 and losses[0].requires_grad
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0])  # 类型也要相同：权重是 float64 不该改变损失的类型


def test_gradients_agree_with_finite_differences():
    model = VanillaVAE(1, 2, [2], 2).double()
    g = torch.Generator().manual_seed(0)
    recons, x = torch.rand(2, 3, 1, 2, 2, generator=g).double().requires_grad_()
    mu, log_var = torch.randn(2, 3, 2, generator=g).double().requires_grad_()

    def loss(recons, x, mu, log_var):
        return model.loss_function(recons, x, mu, log_var, M_N=0.3)["loss"]

    def z(mu, log_var):
        return model.reparameterize(mu, log_var, torch.Generator().manual_seed(0))

    assert torch.autograd.gradcheck(loss, (recons, x, mu, log_var))
    assert torch.autograd.gradcheck(z, (mu, log_var))


def test_reparameterize_has_the_mean_and_std_it_was_told():
    mu = torch.tensor([[-1.0, 2.0]]).expand(100_000, 2)
    log_var = torch.tensor([[math.log(4.0), math.log(0.25)]]).expand_as(mu)
    z = VanillaVAE(1, 2, [2], 2).reparameterize(mu, log_var, torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.mean(dim=0), mu[0], rtol=0, atol=5 * 2 / math.sqrt(len(mu)))
    torch.testing.assert_close(z.std(dim=0), torch.tensor([2.0, 0.5]), rtol=0.02, atol=0)


@pytest.mark.parametrize("bias", [-1e6, 1e6])
def test_extreme_log_var_stays_finite(bias):
    model, x = tiny()
    model.fc_var.bias.data.fill_(bias)
    loss = seeded_step(model, x)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# —— 抽样与重建没有副作用 ——


@pytest.mark.parametrize("train", [True, False])
def test_sample_and_generate_change_nothing(train):
    model, x = tiny()
    model.train(train)
    model.encoder[0][1].eval()  # 单独冻结的批归一化
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())

    def seeded():
        return torch.Generator().manual_seed(3)

    calls = [
        lambda: model.sample(4, generator=seeded()),
        lambda: model.sample(4, 0, generator=seeded()),  # 公开实现的写法：第二个参数是设备号
        lambda: model.generate(x, deterministic=False, generator=seeded()),
        lambda: model.generate(x),
    ]
    for call in calls:
        first, second = call(), call()
        assert torch.equal(first, second) and first.shape == x.shape
        assert not first.requires_grad
    with pytest.raises(ValueError):
        model.generate(x[:, :, 1:])
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    assert not torch.equal(model.sample(4), model.sample(4))  # 没给发生器就用全局的随机数
    assert not torch.equal(calls[2](), calls[3]())
    model.eval()
    with torch.no_grad():
        mu, _ = model.encode(x)
        assert torch.equal(model.generate(x), model.decode(mu))
        assert torch.equal(model.sample(4, generator=seeded()), model.decode(torch.randn(4, 5, generator=seeded())))


# —— 报错 ——


def vae(in_channels=3, latent_dim=2, hidden_dims=(2, 3), image_size=8):
    return VanillaVAE(in_channels, latent_dim, hidden_dims, image_size)


def loss_with(weight, recons_channels=3):
    x, z = torch.zeros(2, 3, 8, 8), torch.zeros(2, 2)
    return vae().loss_function(torch.zeros(2, recons_channels, 8, 8), x, z, z, M_N=weight)


@pytest.mark.parametrize(
    ("call", "came"),
    [
        *[((lambda v=v: vae(in_channels=v)), repr(v)) for v in (0, -1, True, 3.0, "3", None)],
        *[((lambda v=v: vae(latent_dim=v)), repr(v)) for v in (0, 2.5, None)],
        *[((lambda v=v: vae(hidden_dims=v)), repr(v)) for v in ([], (), "32", 32)],
        *[((lambda v=v: vae(hidden_dims=[4, v])), repr(v)) for v in (0, -8, 2.0, True, "8")],
        *[((lambda v=v: vae(image_size=v)), repr(v)) for v in (0, 10, 8.0)],
        (lambda: VanillaVAE(3, 2, image_size=50), "50"),
        (lambda: vae()(torch.zeros(2, 1, 8, 8)), "[2, 1, 8, 8]"),
        (lambda: vae()(torch.zeros(2, 3, 8, 9)), "[2, 3, 8, 9]"),
        (lambda: vae()(torch.zeros(3, 8, 8)), "[3, 8, 8]"),
        (lambda: vae()(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), "uint8"),
        (lambda: vae()(torch.zeros(2, 3, 8, 8, dtype=torch.long)), "int64"),
        (lambda: vae(image_size=4)(torch.zeros(1, 3, 4, 4)), "1 张"),
        (lambda: vae().generate(torch.zeros(2, 1, 8, 8)), "[2, 1, 8, 8]"),
        (lambda: vae().decode(torch.zeros(2, 5)), "[2, 5]"),
        (lambda: vae().decode(torch.zeros(2)), "[2]"),
        *[((lambda v=v: vae().sample(v)), repr(v)) for v in (0, 2.0)],
        *[((lambda v=v: loss_with(v)), repr(v)) for v in (None, True, "0.1", [0.1], math.nan, math.inf, -1.0, 1j)],
        (lambda: loss_with(torch.tensor([0.1])), "tensor([0.1000])"),
        (lambda: loss_with(0.1, recons_channels=1), "[2, 1, 8, 8]"),
    ],
)
def test_bad_input_is_named_in_one_chinese_sentence(call, came):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    assert came in message and "应" in message and message.endswith("。") and message.count("。") == 1


def test_missing_kl_weight_is_an_error():
    model, x = tiny()
    with pytest.raises(TypeError, match="M_N.*None"):
        model.loss_function(*model(x))


def test_image_size_advice_is_valid():
    with pytest.raises(ValueError) as caught:
        VanillaVAE(3, 2, image_size=50)
    advice = int(re.search(r"请改用 (\d+)", str(caught.value)).group(1))
    assert VanillaVAE(3, 2, image_size=advice).image_size == advice


def test_batch_of_one_works_wherever_batch_norm_can():
    model, x = tiny(size=16)  # 最深一级 4×4
    assert model(x[:1])[0].shape == x[:1].shape
    model, x = tiny(size=4)  # 最深一级 1×1
    assert model.eval()(x[:1])[0].shape == x[:1].shape


# —— 编译、导出、混合精度、内存格式、设备 ——


def test_compiled_training_step_equals_eager():
    model, x = tiny()
    other = copy.deepcopy(model)
    if _choose_compile("on", torch.device("cpu"), 0)[0]:
        # fallback_random：编译后的随机数与 eager 相同，才能逐数比较。
        compiled = torch.compile(step, fullgraph=True, options={"fallback_random": True})
    else:
        compiled = torch.compile(step, fullgraph=True, backend="eager")
    ours, expected = seeded_step(other, x, compiled), seeded_step(model, x)
    ours.backward()
    expected.backward()
    torch.testing.assert_close(ours, expected)
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)


def test_exported_program_takes_any_batch():
    model, x = tiny()
    model.eval()
    shapes = {"input": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
    for batch in (x, x[:2], torch.cat([x, x, x])):
        torch.manual_seed(0)
        ours = program(batch)
        torch.manual_seed(0)
        for a, b in zip(ours, model(batch), strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_keeps_the_loss_in_float32():
    model, x = tiny()
    model.eval()
    exact = seeded_step(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = seeded_step(model, x)
        assert all(value.dtype == torch.float32 for value in model.encode(x))
        assert model.fc_mu(torch.zeros(1, model.fc_mu.in_features)).dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_channels_last_equals_contiguous():
    model, x = tiny()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(seeded_step(other, x.to(memory_format=torch.channels_last)), seeded_step(model, x))


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_devices_agree(device):
    if not (torch.cuda if device == "cuda" else torch.backends.mps).is_available():
        pytest.skip(f"这台机器没有 {device}")
    model, x = tiny()
    model.eval()
    other = copy.deepcopy(model).to(device)
    g = torch.Generator()
    for ours, expected in zip(other(x.to(device), generator=g.manual_seed(0)), model(x, generator=g.manual_seed(0)), strict=True):
        assert ours.device.type == device
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-3, atol=1e-4)
    sampled = other.sample(4, generator=g.manual_seed(0))
    torch.testing.assert_close(sampled.cpu(), model.sample(4, generator=g.manual_seed(0)), rtol=1e-3, atol=1e-4)
