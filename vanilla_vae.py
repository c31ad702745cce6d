r"""变分自动编码器（VAE），一个文件，从上到下十分钟读完。

    x ──编码器──▶ (mu, log_var) ──重参数化──▶ z ──解码器──▶ recons
    [B, C, H, W]      [B, L]               [B, L]         [B, C, H, W]

编码器给出近似后验 q(z|x) = N(mu, diag(exp(log_var)))，解码器给出似然 p(x|z) = N(recons, σ²I)，
先验 p(z) = N(0, I)。训练最大化证据下界（ELBO）：E_q[log p(x|z)] − KL(q(z|x) ‖ p(z))。

属性名、方法名与广为流传的公开 VanillaVAE 一致，它的检查点可以直接载入（``load_state_dict(strict=True)``）；
它的错处在这里已改正，逐条见 notebooks/01_walkthrough.ipynb。

来源：Kingma & Welling, *Auto-Encoding Variational Bayes*, arXiv:1312.6114，式 (10)。

``python vanilla_vae.py`` 训练一个模型并画出它学到了什么；``--help`` 列出其余用法。
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # 别的程序也在忙时少空转；须在 import torch 之前，只对 GCC 的 OpenMP 起作用

import torch
from torch import nn
from torch.nn import functional as F

from _type import Generator, LossDict, Sequence, Tensor

# log_var 的范围：std 从 3e-7 到 2.2e4。界外的指数会下溢或上溢，而界内的数原样通过。
LOG_VAR_MIN, LOG_VAR_MAX = -30.0, 20.0


class VanillaVAE(nn.Module):
    """卷积 VAE，高斯后验，标准正态先验。

    Args:
        in_channels: 图像通道数 C ≥ 1；输出的通道数与它相同。
        latent_dim: 隐变量维数 L ≥ 1。
        hidden_dims: 编码器各级的通道数，解码器反过来用；默认 ``[32, 64, 128, 256, 512]``。只读，不会被改动。
        image_size: 图像边长（像素），须能被 ``2 ** len(hidden_dims)`` 整除。

    Raises:
        TypeError, ValueError: 参数不合要求；信息说明收到什么、应为什么、怎么改。
    """

    def __init__(
        self,
        in_channels: int,
        latent_dim: int,
        hidden_dims: Sequence[int] | None = None,
        image_size: int = 64,
    ) -> None:
        super().__init__()
        if hidden_dims is None:
            hidden_dims = [32, 64, 128, 256, 512]
        if not isinstance(hidden_dims, (list, tuple)):
            raise TypeError(f"hidden_dims 应为整数列表，收到 {hidden_dims!r}；请写成如 [32, 64, 128] 的形式。")
        if not hidden_dims:
            raise ValueError(f"hidden_dims 应为非空的整数列表，收到 {hidden_dims!r}；请至少给一级，如 [32, 64, 128]。")
        widths = [positive_int("hidden_dims 的每一项", width) for width in hidden_dims]
        self.in_channels = positive_int("in_channels", in_channels)
        self.latent_dim = positive_int("latent_dim", latent_dim)
        self.image_size = positive_int("image_size", image_size)
        self.hidden_dims = tuple(widths)
        shrink = 2 ** len(widths)
        if self.image_size % shrink:
            raise ValueError(
                f"image_size 应能被 2 的 {len(widths)} 次方（{shrink}）整除，因为 hidden_dims 的 {len(widths)} 级各减半一次；"
                f"收到 {image_size}，请改用 {max(shrink, round(image_size / shrink) * shrink)}，或减少级数。"
            )
        self.bottom = self.image_size // shrink  # 最深一级特征图的边长

        # 编码器：[B, C, H, W] → [B, widths[-1], bottom, bottom]
        channels = [self.in_channels, *widths]
        self.encoder = nn.Sequential(*(down_block(a, b) for a, b in zip(channels, channels[1:])))
        features = widths[-1] * self.bottom**2
        self.fc_mu = nn.Linear(features, self.latent_dim)
        self.fc_var = nn.Linear(features, self.latent_dim)
        # 从 log_var = 0（q 的方差等于先验）出发，KL 起步时不推它。头三步主要靠小的学习率：默认初始化下，0.005 可以
        # 冲过 1e6，0.001 冲不到 1e4；同样的离群图再来一次，0.001 也会冲过 1e5，从 0 出发才只有几百（量法在 01 章）。
        nn.init.zeros_(self.fc_var.weight)
        nn.init.zeros_(self.fc_var.bias)

        # 解码器：[B, L] → [B, C, H, W]
        self.decoder_input = nn.Linear(self.latent_dim, features)
        mirrored = widths[::-1]
        self.decoder = nn.Sequential(*(nn.Sequential(*up_block(a, b)) for a, b in zip(mirrored, mirrored[1:])))
        self.final_layer = nn.Sequential(
            *up_block(widths[0], widths[0]),
            nn.Conv2d(widths[0], self.in_channels, kernel_size=3, padding=1),
            nn.Tanh(),  # 值域 (-1, 1)，与输入的 [-1, 1] 约定一致
        )

    def encode(self, input: Tensor) -> list[Tensor]:
        """图像 → 近似后验的参数。

        Args:
            input: 浮点图像 ``[B, C, H, W]``，值域 [-1, 1]。

        Returns:
            ``[mu, log_var]``，各 ``[B, L]``，至少 float32；``log_var = log σ²`` 截在 [-30, 20]，
            所以它的指数总是有限（截住的那一维梯度为 0）。

        Raises:
            TypeError, ValueError: 类型、形状不符，或训练时的批太小而批归一化无从统计。
        """
        self._check_images(input)
        result = self.encoder(input)
        result = torch.flatten(result, start_dim=1)  # [B, widths[-1]·bottom²]
        mu = self.fc_mu(result)
        log_var = self.fc_var(result)
        # 半精度装不下 exp(20)，从这里起用 float32（输入是 float64 时仍是 float64）。
        dtype = torch.promote_types(mu.dtype, torch.float32)
        return [mu.to(dtype), log_var.to(dtype).clamp(LOG_VAR_MIN, LOG_VAR_MAX)]

    def decode(self, z: Tensor) -> Tensor:
        """隐变量 ``[B, L]`` → 图像 ``[B, C, H, W]``，值域 [-1, 1]，是 p(x|z) 的均值。"""
        if not isinstance(z, Tensor) or z.dim() != 2 or z.shape[1] != self.latent_dim:
            came = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"隐变量应为张量 [B, {self.latent_dim}]，收到 {came}；请检查 latent_dim。")
        result = self.decoder_input(z.to(self.decoder_input.weight.dtype))
        result = result.view(-1, self.hidden_dims[-1], self.bottom, self.bottom)
        result = self.decoder(result)
        return self.final_layer(result)

    def reparameterize(self, mu: Tensor, log_var: Tensor, generator: Generator | None = None) -> Tensor:
        """重参数化：z = mu + σ·eps，eps ~ N(0, I)，于是 z 对 mu、log_var 可导。

        Args:
            mu: 均值 ``[B, L]``。
            log_var: 对数方差 log σ² ``[B, L]``（不是标准差）。
            generator: 随机源；给了 CPU 的发生器，同一颗种子在任何设备上抽到同样的 eps。
        """
        std = torch.exp(0.5 * log_var)
        return mu + std * self._noise(mu.shape, mu, generator)

    def forward(self, input: Tensor, generator: Generator | None = None) -> list[Tensor]:
        """一次前向：``[recons, input, mu, log_var]``，正是 :meth:`loss_function` 的前四个参数。"""
        mu, log_var = self.encode(input)
        z = self.reparameterize(mu, log_var, generator)
        return [self.decode(z), input, mu, log_var]

    def loss_function(self, recons: Tensor, input: Tensor, mu: Tensor, log_var: Tensor, M_N: float | Tensor | None = None) -> LossDict:
        r"""``loss = MSE + M_N · KLD``，即负 ELBO 乘以 2σ²/D（差一个与参数无关的常数）。

        MSE 对全部像素取平均；KLD 对隐变量求和、对批取平均，单位 nat：

            KL(N(mu, σ²) ‖ N(0, 1)) = ½ Σ_j (mu_j² + σ_j² − 1 − log σ_j²)        （arXiv:1312.6114，附录 B）

        Args:
            recons, input: ``[B, C, H, W]``，形状必须相同。
            mu, log_var: ``[B, L]``。
            M_N: KL 的权重 w = 2σ²/D，σ² 是解码器的噪声方差，D = C·H·W（推导见 06 章）。非负数或零维张量。

        Returns:
            ``loss``（可反传）、``Reconstruction_Loss``、``KLD``（两者只供记录，不带梯度，KLD ≥ 0）。
        """
        is_scalar_tensor = isinstance(M_N, Tensor) and M_N.dim() == 0
        if not is_scalar_tensor and (not isinstance(M_N, Real) or isinstance(M_N, bool)):
            raise TypeError(f"M_N（KL 的权重）应为一个数，收到 {M_N!r}；请传入如 M_N=0.00025，含义是 2σ²/D。")
        if not is_scalar_tensor and not (math.isfinite(M_N) and M_N >= 0):
            raise ValueError(f"M_N（KL 的权重）应为有限的非负数，收到 {M_N!r}；它等于 2σ²/D，不会是负数。")
        if mu.shape != log_var.shape:
            raise ValueError(f"mu {list(mu.shape)} 与 log_var {list(log_var.shape)} 形状应相同；请检查 encode 的结果。")
        if recons.shape != input.shape:
            raise ValueError(f"重建 {list(recons.shape)} 与输入 {list(input.shape)} 形状应相同；否则广播会悄悄算错损失。")
        recons_loss = F.mse_loss(recons.to(mu.dtype), input.to(mu.dtype))
        # expm1(a) = exp(a) − 1，在 a ≈ 0 处不损失精度，坍塌的维给出 0 而不是负的舍入误差。
        kld_loss = 0.5 * torch.sum(mu**2 + log_var.expm1() - log_var, dim=1).mean()
        weight = M_N.to(kld_loss) if is_scalar_tensor else float(M_N)
        loss = recons_loss + weight * kld_loss
        return {"loss": loss, "Reconstruction_Loss": recons_loss.detach(), "KLD": kld_loss.detach()}

    @torch.no_grad()
    def sample(self, num_samples: int, current_device: object = None, generator: Generator | None = None) -> Tensor:
        """从先验抽样再解码：``[num_samples, C, H, W]``，值域 [-1, 1]，不带梯度。

        用批归一化的运行统计量，且不改动它们。``current_device`` 只为兼容公开实现的调用方式而收下：
        模型在哪个设备，z 就在哪个设备。
        """
        shape = (positive_int("num_samples", num_samples), self.latent_dim)
        with eval_mode(self):
            return self.decode(self._noise(shape, self.fc_mu.weight, generator))

    @torch.no_grad()
    def generate(self, x: Tensor, deterministic: bool = True, generator: Generator | None = None) -> Tensor:
        """重建 ``[B, C, H, W]`` → 同形，不带梯度。默认由 mu 重建；``deterministic=False`` 时由 z ~ q(z|x) 重建。"""
        with eval_mode(self):
            mu, log_var = self.encode(x)
            return self.decode(mu if deterministic else self.reparameterize(mu, log_var, generator))

    def _check_images(self, x: Tensor) -> None:
        size = self.image_size
        if not isinstance(x, Tensor) or not x.is_floating_point():
            came = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"图像应为 [-1, 1] 的浮点张量，收到 {came}；uint8 图像请先用 vaelab.images.to_float 转换。")
        dtype = self.fc_mu.weight.dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"图像应与模型同为 {dtype}，收到 {x.dtype}；请先 .to({dtype})，或在 torch.autocast 之内调用。")
        if x.dim() != 4 or tuple(x.shape[1:]) != (self.in_channels, size, size):
            raise ValueError(
                f"图像应为 [B, {self.in_channels}, {size}, {size}]，收到 {list(x.shape)}；请调整图像，或用相符的 in_channels、image_size 建模型。"
            )
        if self.training and self.bottom == 1 and x.shape[0] == 1:
            raise ValueError("训练时的批应至少有 2 张图，收到 1 张：最深一级特征图只有 1×1，批归一化没有可统计的量；请加大批，或先调用 eval()。")

    @staticmethod
    def _noise(shape: Sequence[int], like: Tensor, generator: Generator | None) -> Tensor:
        if generator is None:
            return torch.randn(shape, device=like.device, dtype=like.dtype)
        return torch.randn(shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def positive_int(name: str, value: object) -> int:
    """``value`` 是正整数就原样返回，否则报 TypeError 或 ValueError，并说明 ``name`` 应该是什么。"""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} 应为正整数，收到 {value!r}（{type(value).__name__}）；请传入如 128 这样的整数。")
    if value < 1:
        raise ValueError(f"{name} 应为正整数，收到 {value}；请改为 1 或更大的整数。")
    return int(value)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """临时进入 eval，出来时每个子模块恢复原样（包括被单独冻结的）。"""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training


def down_block(c_in: int, c_out: int) -> nn.Sequential:
    """编码器的一级：``[B, c_in, H, W]`` → ``[B, c_out, H/2, W/2]``，H、W 为偶数。"""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel_size=3, stride=2, padding=1),
        nn.BatchNorm2d(c_out),
        nn.LeakyReLU(inplace=True),
    )


def up_block(c_in: int, c_out: int) -> list[nn.Module]:
    """解码器的一级：``[B, c_in, H, W]`` → ``[B, c_out, 2H, 2W]``。``output_padding=1`` 补足被取整丢掉的一行。"""
    return [
        nn.ConvTranspose2d(c_in, c_out, kernel_size=3, stride=2, padding=1, output_padding=1),
        nn.BatchNorm2d(c_out),
        nn.LeakyReLU(inplace=True),
    ]


if __name__ == "__main__":
    from vaelab.cli import main

    raise SystemExit(main())
