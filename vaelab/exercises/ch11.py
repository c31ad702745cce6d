"""第 11 章“速度”的练习：检查，以及它认得的错答。"""

import math

import numpy as np
import torch
from torch import Tensor

from vaelab.exercises.judging import Wrong, ask, checks, known_wrong, number, numbers, shown, tensor
from vanilla_vae import VanillaVAE


@checks("11.1")
def growth_with_the_side(answer: object) -> None:
    """边长加倍、改用 bf16，四样东西各变成几倍。"""
    flops, image, kept, gradient = numbers(answer, 4, "四个数 (运算, 图像, 留下的, 梯度)")
    with torch.device("meta"):
        before, after = (sum(p.numel() for p in VanillaVAE(3, 128, image_size=size).parameters()) for size in (64, 128))
    if abs(flops - 2) < 1e-6:
        raise Wrong("运算：边长加倍，面积是 4 倍；卷积在每个位置都要算一遍，精度不改变运算的次数。")
    if abs(flops - 4) > 0.1:
        raise Wrong("运算：由式(7.8)，卷积的运算数与输出的面积成正比；精度不改变运算的次数。")
    if abs(image - 2) < 1e-6 or abs(image - 8) < 1e-6:
        raise Wrong("图像：存的总是 uint8，与训练用什么精度无关；像素数是几倍？")
    if abs(image - 4) > 0.1:
        raise Wrong("图像：一个像素一个通道 1 字节，只看像素数。")
    if abs(kept - 4) < 0.1:
        raise Wrong("留下的：个数是 4 倍，可是每个数从 4 字节变成了 2 字节。")
    if abs(kept - 2) > 0.1:
        raise Wrong("留下的：由式(11.2) 之前的 n_l 看个数是几倍，再乘以每个数的字节之比。")
    if abs(gradient - 1) < 0.05:
        raise Wrong("梯度：卷积的权重与图像大小无关，全连接层的却要接 4 倍的特征，数一数它们占多少。")
    if abs(gradient * 2 - after / before) < 0.05:
        raise Wrong("梯度：autocast 之下权重与梯度仍是 float32，不减半。")
    if abs(gradient - 4) < 0.05:
        raise Wrong("梯度：只有三个全连接层的权重是 4 倍，卷积的不变；要按各占多少来平均。")
    if abs(gradient + 1 - after / before) < 0.06:
        raise Wrong("梯度：这是多出来的占原来的几成；问的是变成几倍，要加上原来的 1。")
    if abs(gradient - after / before) > 0.06:
        raise Wrong(f"梯度：参数从 {before:,} 个变成几？可以建两个模型数一数。")


known_wrong(
    "11.1",
    ("应交四个数", (4, 4, 2)),
    ("运算：边长加倍", (2, 4, 2, 1.6)),
    ("运算：由式(7.8)", (8, 4, 2, 1.6)),
    ("与训练用什么精度无关", (4, 2, 2, 1.6)),  # 以为 bf16 让图像减半
    ("与训练用什么精度无关", (4, 8, 2, 1.6)),  # 以为从 uint8 变成了 2 字节
    ("1 字节，只看像素数", (4, 16, 2, 1.6)),
    ("个数是 4 倍，可是", (4, 4, 4, 1.6)),
    ("再乘以每个数的字节之比", (4, 4, 1, 1.6)),  # 边长 2 倍，字节减半
    ("数一数它们占多少", (4, 4, 2, 1)),
    ("不减半", (4, 4, 2, 0.8)),
    ("按各占多少来平均", (4, 4, 2, 4)),
    ("要加上原来的 1", (4, 4, 2, 0.6)),
    ("可以建两个模型数一数", (4, 4, 2, 2)),
)


@checks("11.2")
def arithmetic_intensity(answer: object) -> None:
    """步长 2 的卷积的算术强度。"""
    from torch.utils.flop_counter import FlopCounterMode

    for B, c_in, c_out, K, H, each in ((1, 64, 128, 3, 8, 8), (16, 3, 8, 3, 16, 2), (4, 8, 8, 5, 12, 2)):
        # meta 设备上只有形状：数得出运算，不必真算，也不动读者的随机数
        layer = torch.nn.Conv2d(c_in, c_out, K, stride=2, padding=K // 2, bias=False, device="meta")
        x = torch.zeros(B, c_in, H, H, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out = layer(x)
        flops, data, weights = counter.get_total_flops(), x.numel() + out.numel(), layer.weight.numel()
        got = number(ask(answer, B, c_in, c_out, K, H, each))
        truth = flops / each / (data + weights)
        mistakes = {
            truth / 2: "一次乘加算两次浮点运算，你只算了一次。",
            truth * 4: "步长 2，输出的边长只有 H/2，运算数按输出的面积算。",
            4 * flops / each / (x.numel() + 4 * out.numel() + weights): "步长 2，输出的边长只有 H/2，运算数与输出的字节都按它算。",
            truth * each: "忘了乘以每个数的字节数 each。",
            flops / each / data: "权重也要读一遍；批小、通道多的时候它不能忽略。",
            flops / each / (data + B * weights): "权重一批只读一次，要摊到 B 张图上，不是每张读一次。",
            flops / each / (x.numel() + weights): "输出也要写一遍。",
            flops / each / (out.numel() + weights): "输入也要读一遍。",
            truth / 8: "each 已经是字节，不必再换成比特。",
            truth / B: "字节算了 B 张，运算只算了一张。",
            1 / truth: "倒过来了：强度是运算数除以字节数。",
        }
        if abs(got - truth) < 1e-5 * truth:
            continue
        for value, message in mistakes.items():
            if abs(got - value) < 1e-5 * value:
                raise Wrong(message)
        raise Wrong(f"B={B}、{c_in}→{c_out} 通道、K={K}、H={H}、每个数 {each} 字节：应得 {truth:.4g}，你的是 {got:.4g}。")


def _conv_parts(B, c_in, c_out, K, H, side):
    """运算、输入、输出、权重各多少个，输出的边长按 ``side`` 算。"""
    weights = K * K * c_in * c_out
    return 2 * weights * side**2 * B, B * c_in * H**2, B * c_out * side**2, weights


def _intensity(ratio, full=False):
    """由四样的个数求强度；``full`` 忘了步长，输出的边长当作 H。"""
    return lambda B, c_in, c_out, K, H, each: ratio(B, each, *_conv_parts(B, c_in, c_out, K, H, H if full else H // 2))


known_wrong(
    "11.2",
    ("应交一个数", _intensity(lambda B, each, flops, x, out, w: (flops, each * (x + out + w)))),  # 没有相除
    ("你只算了一次", _intensity(lambda B, each, flops, x, out, w: flops / 2 / each / (x + out + w))),
    ("运算数按输出的面积算", _intensity(lambda B, each, flops, x, out, w: 4 * flops / each / (x + out + w))),
    ("运算数与输出的字节都按它算", _intensity(lambda B, each, flops, x, out, w: flops / each / (x + out + w), full=True)),
    ("忘了乘以每个数的字节数", _intensity(lambda B, each, flops, x, out, w: flops / (x + out + w))),
    ("权重也要读一遍", _intensity(lambda B, each, flops, x, out, w: flops / each / (x + out))),
    ("权重一批只读一次", _intensity(lambda B, each, flops, x, out, w: flops / each / (x + out + B * w))),
    ("输出也要写一遍", _intensity(lambda B, each, flops, x, out, w: flops / each / (x + w))),
    ("输入也要读一遍", _intensity(lambda B, each, flops, x, out, w: flops / each / (out + w))),
    ("运算只算了一张", _intensity(lambda B, each, flops, x, out, w: flops / B / each / (x + out + w))),
    ("不必再换成比特", _intensity(lambda B, each, flops, x, out, w: flops / each / 8 / (x + out + w))),
    ("倒过来了", _intensity(lambda B, each, flops, x, out, w: each * (x + out + w) / flops)),
    ("应得", _intensity(lambda B, each, flops, x, out, w: flops / (each * (x + out) + 4 * w))),  # 以为权重总是 float32
)


@checks("11.3")
def speed_of_a_part(answer: object) -> None:
    """只许动占 share 的一类，整体要快到 target 倍，它要加快几倍。"""
    for share, target in ((0.5, 1.5), (0.9, 5.0), (0.28, 1.2), (0.3, 1.0), (0.5, 2.0), (0.25, 3.0), (1.0, 4.0)):
        got = number(ask(answer, share, target), "一个数，办不到时返回 math.inf", infinite=True)
        case = f"占 {share:g}、要快到 {target:g} 倍"
        if share < 1 and target * (1 - share) >= 1:  # 其余的部分自己就用完了时间
            if got != math.inf:
                raise Wrong(f"{case}：这一类完全不花时间也只快 {1 / (1 - share):.3g} 倍，到不了，应返回 math.inf。")
            continue
        if got == math.inf:
            limit = f"上限是 1/(1 − p) = {1 / (1 - share):.3g} 倍" if share < 1 else "全部都可以加快，没有上限"
            raise Wrong(f"{case}：办得到，{limit}。")
        if got <= 0:
            raise Wrong(f"{case}：加快的倍数应是正数，收到 {got:g}。")
        left = 1 / target - (1 - share)  # 留给这一类的时间
        if abs(got * share - left) < 1e-6 * left and target != 1:
            raise Wrong(f"{case}：{got:.3g} 是这一类的时间要缩到原来的几成，倒过来才是加快的倍数。")
        reached = 1 / (1 - share + share / got)
        if abs(got - target) < 1e-6 and target != 1 and share != 1:
            raise Wrong(f"{case}：只把这一类加快 {target:g} 倍，整体只快 {reached:.3g} 倍；其余的部分没有变快。")
        if abs(reached - target) > 1e-5:
            raise Wrong(f"{case}：你说加快 {got:.4g} 倍；代回式(11.18)，整体快 {reached:.4g} 倍。")


def _left(share, target):
    """留给这一类的时间。"""
    return 1 / target - (1 - share)


known_wrong(
    "11.3",
    ("应交一个数", lambda share, target: "办不到" if _left(share, target) <= 0 else share / _left(share, target)),
    ("应返回 math.inf", lambda share, target: 0.0 if _left(share, target) <= 0 else share / _left(share, target)),
    ("应返回 math.inf", lambda share, target: share / max(_left(share, target), 1e-9)),  # 加一个小数，躲过除以零
    ("办得到，上限是", lambda share, target: math.inf if target >= 1 / share else share / _left(share, target)),  # 上限写成了 1/p
    ("没有上限", lambda share, target: math.inf if share == 1 or _left(share, target) <= 0 else share / _left(share, target)),
    ("倒过来才是加快的倍数", lambda share, target: math.inf if _left(share, target) <= 0 else _left(share, target) / share),
    ("加快的倍数应是正数", lambda share, target: share / (1 - share - 1 / target)),  # 移项，符号错了
    ("其余的部分没有变快", lambda share, target: target),
    ("代回式(11.18)", lambda share, target: target / share),
    ("代回式(11.18)", lambda share, target: 1 + (target - 1) / share),  # 多快的那些都算在它头上
)


def _as_tensor(value: object) -> object:
    """一列数也当作张量；别的照原样，由后面的检查去说。"""
    try:
        return torch.tensor(value, dtype=torch.float64) if isinstance(value, (list, tuple)) else value
    except (TypeError, ValueError, RuntimeError):
        return value


@checks("11.4")
def statistics_of_all_shards(answer: object) -> None:
    """由大小不等的各份的统计，合成整批的均值与方差。"""
    generator = torch.Generator().manual_seed(114)
    for sizes in ([6, 6, 6], [2, 5, 13]):
        shards = [torch.randn(n, 4, generator=generator, dtype=torch.float64) * (k + 1) + 2 * k for k, n in enumerate(sizes)]
        counts = torch.tensor(sizes)
        means = torch.stack([shard.mean(0) for shard in shards])
        variances = torch.stack([shard.var(0, correction=0) for shard in shards])
        got = ask(answer, counts.clone(), means.clone(), variances.clone())
        stacked = isinstance(got, (Tensor, np.ndarray)) and got.ndim == 2  # 叠成一个 [2, C] 也收
        if not (stacked or isinstance(got, (tuple, list))) or len(got) != 2:
            raise Wrong(f"应返回两个张量 (均值, 方差)，形状各是 [C]，收到 {shown(got)}。")
        mean, variance = (tensor(_as_tensor(value), (4,), "两个张量 (均值, 方差)，形状各是 [C] = [4]") for value in got)
        whole = torch.cat(shards)
        true_mean, true_variance = whole.mean(0), whole.var(0, correction=0)
        share = (counts / counts.sum())[:, None].double()

        def near(value: Tensor, truth: Tensor) -> bool:
            return torch.allclose(value, truth, rtol=1e-5, atol=1e-6)

        if near(mean, true_variance) and near(variance, true_mean):
            raise Wrong("次序反了：先均值，后方差。")
        if near(mean, means.mean(0)) and not near(mean, true_mean):
            raise Wrong(f"各份 {sizes}：均值没有按份的大小加权，小的一份说话太重了。")
        if not near(mean, true_mean):
            raise Wrong(f"各份 {sizes}：均值不对；总和除以总数。")
        if near(variance, (share * variances).sum(0)):
            raise Wrong(f"各份 {sizes}：只平均了份内的方差，漏了份与份之间的散布 (μ_k − μ)²。")
        if near(variance, variances.mean(0) + (means - true_mean).square().mean(0)) and len(set(sizes)) > 1:
            raise Wrong(f"各份 {sizes}：均值加了权，方差的两项也要同样地加权。")
        if near(variance, true_variance.sqrt()):
            raise Wrong(f"各份 {sizes}：这是标准差，再平方一次才是方差。")
        if near(variance, whole.var(0)):
            raise Wrong(f"各份 {sizes}：这是除以 n − 1 的方差；批归一化用的是除以 n 的。")
        if not near(variance, true_variance):
            raise Wrong(f"各份 {sizes}：方差不对；先写出 E[(x − μ)²] 在第 k 份里等于什么。")


def _merged(mean=lambda share, means: (share * means).sum(0), variance=lambda share, v, gaps: (share * (v + gaps**2)).sum(0)):
    """合成：均值、方差的写法都可以换成写错的；``gaps`` 是 μ_k − μ。"""

    def merge(counts, means, variances):
        share = (counts / counts.sum())[:, None]
        centre = mean(share, means)
        return centre, variance(share, variances, means - centre)

    return merge


known_wrong(
    "11.4",
    ("应返回两个张量", lambda *given: _merged()(*given)[0]),  # 只有均值
    ("应返回两个张量", _merged(variance=lambda share, v, gaps: share * (v + gaps**2))),  # 没有求和
    ("均值没有按份的大小加权", _merged(mean=lambda share, means: means.mean(0))),
    ("总和除以总数", _merged(mean=lambda share, means: (share * means).mean(0))),
    ("漏了份与份之间的散布", _merged(variance=lambda share, v, gaps: (share * v).sum(0))),
    ("方差的两项也要同样地加权", _merged(variance=lambda share, v, gaps: (v + gaps**2).mean(0))),
    ("次序反了", lambda *given: _merged()(*given)[::-1]),
    ("再平方一次才是方差", lambda *given: (lambda mean, v: (mean, v.sqrt()))(*_merged()(*given))),
    ("形状各是 [C] = [4]", lambda counts, means, variances: (means.mean(1), variances.mean(1))),  # 维不对
    ("除以 n − 1 的方差", lambda counts, *rest: (lambda mean, v: (mean, v * counts.sum() / (counts.sum() - 1)))(*_merged()(counts, *rest))),
    ("先写出 E[(x − μ)²]", _merged(variance=lambda share, v, gaps: (share * (v.sqrt() + gaps.abs())).sum(0) ** 2)),  # 平均了标准差
    ("先写出 E[(x − μ)²]", _merged(variance=lambda share, v, gaps: (share**2 * (v + gaps**2)).sum(0))),  # 权重平方了
)
