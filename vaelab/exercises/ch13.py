"""第 13 章“从 VAE 到隐扩散”的练习：检查，以及它认得的错答。"""

import math

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from vaelab.exercises.judging import Wrong, ask, checks, known_wrong, number, numbers, tensor

_EVERY = (0, 2, 3)  # 图与位置


def _normalized(z: Tensor, over: tuple[int, ...] = _EVERY, *, shift: bool = True, correction: int = 0, power: float = 0.5) -> Tensor:
    """逐通道归一；在哪些轴上算、减不减均值、除以几、标准差还是方差，都可以换成写错的。"""
    centre = z.mean(over, keepdim=True)
    var = z.var(over, correction=correction, keepdim=True)
    top = z - centre if shift else z
    return torch.where(var > 0, top / var.clamp_min(1e-300) ** power, torch.zeros_like(z))


@checks("13.1")
def normalized_by_channel(answer: object) -> None:
    """逐通道归一。"""
    generator = torch.Generator().manual_seed(131)
    spread = torch.tensor([0.5, 3.0, 1.7, 0.2, 2.2], dtype=torch.float64)
    for shape, dead in (((6, 3, 4, 5), None), ((2, 5, 3, 3), None), ((7, 2, 1, 1), None), ((5, 4, 2, 3), 2)):
        count, channels = shape[:2]
        z = torch.randn(*shape, generator=generator, dtype=torch.float64) * spread[:channels].view(1, -1, 1, 1)
        z = z + 4 * torch.randn(1, channels, 1, 1, generator=generator, dtype=torch.float64) + torch.rand(count, 1, 1, 1, generator=generator)
        if dead is not None:
            z[:, dead] = 0.75  # 坍塌的通道；0.75 求平均没有舍入
        given = z.clone()
        result = ask(answer, given)
        if not torch.equal(given, z):
            raise Wrong("你改动了输入：z 后面还要用，请不要用就地的运算（-=、sub_ 一类）。")
        got = tensor(result, shape, f"形状 {list(shape)} 的张量，与输入相同", "恒为常数的通道标准差是 0，除以它之前先想好")
        if getattr(result, "dtype", z.dtype) != z.dtype:
            raise Wrong(f"输入是 {z.dtype}，你返回的是 {getattr(result, 'dtype', None)}；中途不要换精度。")
        where = f"形状 {list(shape)} 时"

        def near(other: Tensor, got: Tensor = got) -> bool:
            return bool((got - other).abs().max() < 1e-6)

        if near(_normalized(z)):
            continue
        if near(_normalized(z, (0, 1, 2, 3))):
            raise Wrong(f"{where}所有通道混在一起算了：题目要逐通道的。")
        if near(_normalized(z, (2, 3))):
            raise Wrong(f"{where}每张图各算各的：均值、方差要跨过图，不然不同的图就没有了亮暗之差。")
        if near(_normalized(z, (0,))):
            raise Wrong(f"{where}每个位置各算各的：要跨过位置 H、W。")
        if near(_normalized(z, shift=False)):
            raise Wrong(f"{where}没有减均值。")
        if near(_normalized(z, power=1.0)):
            raise Wrong(f"{where}除以的是方差，应除以标准差。")
        if near(_normalized(z, correction=1)):
            raise Wrong(f"{where}方差除以了个数减 1：题目要 correction=0。")
        if dead is not None and near(torch.where(torch.arange(channels).view(1, -1, 1, 1) == dead, got, _normalized(z))):
            raise Wrong("恒为常数的通道应得到全 0，你给出的不是。")
        raise Wrong(f"{where}不对：第 0 个通道归一之后，均值 {got[:, 0].mean():.3g}，方差 {got[:, 0].var(correction=0):.3g}。")


def _in_place(z: Tensor) -> Tensor:
    z -= z.mean(_EVERY, keepdim=True)
    return z


known_wrong(
    "13.1",
    ("你改动了输入", _in_place),
    ("与输入相同", lambda z: _normalized(z).mean(0)),
    ("先想好", lambda z: (z - z.mean(_EVERY, keepdim=True)) / z.std(_EVERY, correction=0, keepdim=True)),
    ("中途不要换精度", lambda z: _normalized(z).float()),
    ("所有通道混在一起", lambda z: _normalized(z, (0, 1, 2, 3))),
    ("每张图各算各的", lambda z: _normalized(z, (2, 3))),
    ("每个位置各算各的", lambda z: _normalized(z, (0,))),
    ("没有减均值", lambda z: _normalized(z, shift=False)),
    ("除以的是方差", lambda z: _normalized(z, power=1.0)),
    ("correction=0", lambda z: _normalized(z, correction=1)),
    ("应得到全 0", lambda z: torch.where(z.var(_EVERY, keepdim=True) > 0, _normalized(z), z)),
    ("第 0 个通道归一之后", lambda z: 2 * _normalized(z)),
)


def _schedule(*, square: bool = True) -> Tensor:
    ends = torch.tensor([0.00085, 0.012], dtype=torch.float64)
    roots = ends.sqrt() if square else ends
    return torch.linspace(float(roots[0]), float(roots[1]), 1000, dtype=torch.float64) ** (2 if square else 1)


def _snr(betas: Tensor, factor: float, *, step: float = 1.0, std: bool = False) -> tuple[float, int]:
    """（最后一步的 SNR，SNR > 1 的步数）；factor 乘在信号的方差上。"""
    bar = torch.cumprod(1 - step * betas, 0)
    ratio = bar / (1 - bar) * factor
    ratio = ratio.sqrt() if std else ratio
    return float(ratio[-1]), int((ratio > 1).sum())


@checks("13.2")
def snr_when_the_scale_is_forgotten(answer: object) -> None:
    """忘了乘 scale：最后一步的 SNR 与信号占上风的步数。"""
    what = "两个数：最后一步的 SNR，与信号占上风的步数"
    for scale in (0.13025, 0.18215, 0.41407, 1.3):
        got, steps = numbers(ask(answer, scale), 2, what)
        truth, count = _snr(_schedule(), scale**-2)
        where = f"scale = {scale:g} 时"

        def same(case: tuple[float, int], got: float = got, steps: float = steps) -> bool:
            return abs(got - case[0]) < 2e-4 * abs(case[0]) and abs(steps - case[1]) <= 1

        if same((truth, count)):
            continue
        if same(_snr(_schedule(), 1.0)):
            raise Wrong(f"{where}这是乘对了的：忘了乘，信号的方差不是 1。")
        if same(_snr(_schedule(), scale**2)):
            raise Wrong(f"{where}方向反了：乘 scale 之后方差才是 1，不乘时方差是 1/scale²。")
        if same(_snr(_schedule(), 1 / scale)):
            raise Wrong(f"{where}信号的标准差是 1/scale，方差要再平方。")
        if same(_snr(_schedule(), scale**-2, std=True)):
            raise Wrong(f"{where}你算的是标准差之比；SNR 是方差之比。")
        if same(_snr(_schedule(square=False), scale**-2)):
            raise Wrong(f"{where}噪声表不对：等距的是 √β，你让 β 自己等距。")
        if same((count, truth)):
            raise Wrong(f"{where}两个数的次序反了：先 SNR，后步数。")
        if abs(got - truth) < 2e-4 * truth and abs(steps - (1000 - count)) <= 1:
            raise Wrong(f"{where}你数的是噪声占上风的步数；题目要信号占上风的。")
        if abs(got - truth) < 2e-4 * truth:
            raise Wrong(f"{where}SNR 对了，步数应为 {count}，你给出 {steps:g}。")
        raise Wrong(f"{where}最后一步的 SNR 应为 {truth:.4g}，你给出 {got:.4g}；SNR 是 ᾱ/(1−ᾱ) 乘信号的方差。")


known_wrong(
    "13.2",
    ("应交两个数", lambda scale: _snr(_schedule(), scale**-2)[0]),
    ("这是乘对了的", lambda scale: _snr(_schedule(), 1.0)),
    ("方向反了", lambda scale: _snr(_schedule(), scale**2)),
    ("方差要再平方", lambda scale: _snr(_schedule(), 1 / scale)),
    ("你算的是标准差之比", lambda scale: _snr(_schedule(), scale**-2, std=True)),
    ("等距的是 √β", lambda scale: _snr(_schedule(square=False), scale**-2)),
    ("次序反了", lambda scale: _snr(_schedule(), scale**-2)[::-1]),
    ("噪声占上风的步数", lambda scale: (_snr(_schedule(), scale**-2)[0], 1000 - _snr(_schedule(), scale**-2)[1])),
    ("步数应为", lambda scale: (_snr(_schedule(), scale**-2)[0], 354)),
    ("乘信号的方差", lambda scale: (0.00466, 354)),
)


def _step(x_t: Tensor, eps: Tensor, bar: Tensor, bar_before: Tensor, noise: Tensor, *, beta=None, root=True, deviation=True) -> Tensor:
    """祖先抽样的一步；三处都可以留着错。"""
    beta = 1 - bar / bar_before if beta is None else beta(bar)
    x_0 = (x_t - ((1 - bar).sqrt() if root else 1 - bar) * eps) / bar.sqrt()
    mean = (bar_before.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - bar_before) * x_t) / (1 - bar)
    var = beta * (1 - bar_before) / (1 - bar)
    return mean + (var.sqrt() if deviation else var) * noise


def _bayes(x_t: Tensor, eps: Tensor, bar: Tensor, bar_before: Tensor, noise: Tensor) -> Tensor:
    """由 (x_{t-1}, x_t) 的联合高斯取条件，不用配方得来的系数。"""
    x_0 = (x_t - (1 - bar).sqrt() * eps) / bar.sqrt()
    alpha = bar / bar_before
    cov = torch.stack([torch.stack([1 - bar_before, alpha.sqrt() * (1 - bar_before)]), torch.stack([alpha.sqrt() * (1 - bar_before), 1 - bar])])
    joint = MultivariateNormal(torch.zeros(2, dtype=torch.float64), cov).covariance_matrix
    gain = joint[0, 1] / joint[1, 1]
    mean = bar_before.sqrt() * x_0 + gain * (x_t - bar.sqrt() * x_0)
    return mean + (joint[0, 0] - gain * joint[0, 1]).sqrt() * noise


_MISTAKES = {
    "beta": "β 还错着：1 − ᾱ_t 是走 t 步一共掺进的，一步的是 1 − ᾱ_t/ᾱ_{t−1}",
    "root": "猜 x_0 时还错着：噪声前面的系数是 √(1 − ᾱ_t)",
    "deviation": "加噪声时还错着：乘在标准正态前面的是标准差，你乘的是方差",
}


def _variant(kept: tuple[str, ...]):
    """kept 里的错还留着。"""
    options: dict = {}
    if "beta" in kept:
        options["beta"] = lambda bar: 1 - bar
    if "root" in kept:
        options["root"] = False
    if "deviation" in kept:
        options["deviation"] = False
    return lambda *given: _step(*given, **options)


@checks("13.3")
def one_step_back(answer: object) -> None:
    """改对祖先抽样的一步：与联合高斯的条件分布比。"""
    generator = torch.Generator().manual_seed(133)
    subsets = [tuple(name for place, name in enumerate(_MISTAKES) if kept >> place & 1) for kept in range(1, 8)]
    for now, previous in ((0.5, 0.7), (0.05, 0.2), (0.9, 0.99)):
        x_t, eps, noise = torch.randn(3, 4, 3, generator=generator, dtype=torch.float64)
        bar, bar_before = torch.tensor([now, previous], dtype=torch.float64)
        given = (x_t, eps, bar, bar_before, noise)
        got = tensor(ask(answer, *(each.clone() for each in given)), (4, 3), "与 x_t 同样形状的张量")
        if bool((got - _bayes(*given)).abs().max() < 1e-8):
            continue
        for kept in sorted(subsets, key=len):
            if bool((got - _variant(kept)(*given)).abs().max() < 1e-8):
                raise Wrong("；".join(_MISTAKES[name] for name in kept) + "。")
        if bool((got - _bayes(*given[:4], torch.zeros_like(noise))).abs().max() < 1e-8):
            raise Wrong("均值对了，新的噪声没有加上：祖先抽样每一步都要加。")
        x_0 = (x_t - (1 - bar).sqrt() * eps) / bar.sqrt()
        if bool((got - bar_before.sqrt() * x_0 - (1 - bar_before).sqrt() * eps).abs().max() < 1e-8):
            raise Wrong("这是 DDIM 的一步，式(13.11)；题目要祖先抽样，均值是式(13.7)，再加新的噪声。")
        if bool((got - _bayes(*given[:4], torch.zeros_like(noise)) - (1 - bar / bar_before).sqrt() * noise).abs().max() < 1e-8):
            raise Wrong("均值对了，噪声的方差你用了 β_t；题目（与式(13.7)）要 β̃_t。")
        raise Wrong(f"ᾱ_t = {now}、ᾱ_{{t−1}} = {previous} 时，与式(13.7) 最多差 {(got - _bayes(*given)).abs().max():.3g}；只改三处，其余不动。")


known_wrong(
    "13.3",
    ("同样形状的张量", lambda x_t, *rest: x_t[0]),
    ("β 还错着", _variant(("beta",))),
    ("猜 x_0 时还错着", _variant(("root",))),
    ("加噪声时还错着", _variant(("deviation",))),
    ("猜 x_0 时还错着", _variant(("beta", "root", "deviation"))),
    ("新的噪声没有加上", lambda *given: _bayes(*given[:4], 0 * given[4])),
    ("这是 DDIM 的一步", lambda x, e, bar, b, n: b.sqrt() * (x - (1 - bar).sqrt() * e) / bar.sqrt() + (1 - b).sqrt() * e),
    ("噪声的方差你用了 β_t", lambda x, e, bar, b, n: _bayes(x, e, bar, b, 0 * n) + (1 - bar / b).sqrt() * n),
    ("只改三处", lambda x_t, *rest: x_t),
)


@checks("13.4")
def sigma_of_another_loss(answer: object) -> None:
    """MSE 取平均、KL 也取平均的损失，替解码器定下的 σ。"""
    for weight, pixels, latents in ((1e-6, 786_432, 16_384), (0.5, 3072, 8), (2e-3, 100, 50), (1.0, 12, 12)):
        got = number(ask(answer, weight, pixels, latents), "一个数：解码器的标准差 σ")
        truth = math.sqrt(weight * pixels / (2 * latents))
        where = f"weight = {weight:g}、pixels = {pixels}、latents = {latents} 时"

        def near(value: float, got: float = got) -> bool:
            return abs(got - value) < 1e-6 * value

        if near(truth):
            continue
        if near(truth**2):
            raise Wrong(f"{where}这是方差 σ²，题目要标准差。")
        if near(math.sqrt(weight * pixels / 2)):
            raise Wrong(f"{where}漏了 latents：kl.mean() 是求和的 KL 除以 latents，求和的 KL 的权重只有 weight/latents。")
        if near(math.sqrt(weight * pixels * latents / 2)):
            raise Wrong(f"{where}latents 乘反了：平均的 KL 比求和的小，折算成求和的权重也更小。")
        if near(math.sqrt(weight / (2 * latents))):
            raise Wrong(f"{where}漏了 pixels：mse_loss 是平方误差之和除以 pixels。")
        if near(math.sqrt(weight * pixels / latents)):
            raise Wrong(f"{where}大了 √2 倍：高斯的 −log p 里是 SE/(2σ²)，有一个 2。")
        if near(weight * pixels / latents):
            raise Wrong(f"{where}这是拉普拉斯解码器的尺度 b（绝对误差的换法）；平方误差用高斯。")
        raise Wrong(f"{where}你给出 {got:.4g}，应为 {truth:.4g}；先把两项都写成求和，再与式(6.9) 比。")


known_wrong(
    "13.4",
    ("应交一个数", lambda weight, pixels, latents: "大"),
    ("这是方差", lambda weight, pixels, latents: weight * pixels / (2 * latents)),
    ("漏了 latents", lambda weight, pixels, latents: math.sqrt(weight * pixels / 2)),
    ("latents 乘反了", lambda weight, pixels, latents: math.sqrt(weight * pixels * latents / 2)),
    ("漏了 pixels", lambda weight, pixels, latents: math.sqrt(weight / (2 * latents))),
    ("大了 √2 倍", lambda weight, pixels, latents: math.sqrt(weight * pixels / latents)),
    ("拉普拉斯", lambda weight, pixels, latents: weight * pixels / latents),
    ("先把两项都写成求和", lambda weight, pixels, latents: 1.0),
)
