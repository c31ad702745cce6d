"""第 11 章“速度”的练习：检查，以及它认得的错答。"""

import torch

from vaelab.exercises.judging import ask, checks, known_wrong, Wrong
from vanilla_vae import VanillaVAE


@checks("11.1")
def growth_with_the_side(answer: object) -> None:
    try:
        flops, image, kept, gradient = (float(value) for value in answer)  # type: ignore[union-attr]
    except (TypeError, ValueError) as error:
        raise Wrong(f"应交四个数 (运算, 图像, 留下的, 梯度)，收到 {answer!r}。") from error
    with torch.device("meta"):
        before, after = (sum(p.numel() for p in VanillaVAE(3, 128, image_size=size).parameters()) for size in (64, 128))
    if abs(flops - 2) < 1e-6:
        raise Wrong("运算：边长加倍，面积是 4 倍；卷积在每个位置都要算一遍。")
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
    if abs(gradient - after / before) > 0.06:
        raise Wrong(f"梯度：参数从 {before:,} 个变成几个？可以建两个模型数一数。")


@checks("11.2")
def arithmetic_intensity(answer: object) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for B, c_in, c_out, K, H, each in ((1, 64, 128, 3, 8, 8), (16, 3, 8, 3, 16, 2), (4, 8, 8, 5, 12, 2)):
        layer = torch.nn.Conv2d(c_in, c_out, K, stride=2, padding=K // 2, bias=False)
        x = torch.zeros(B, c_in, H, H)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out = layer(x)
        flops, data, weights = counter.get_total_flops(), x.numel() + out.numel(), layer.weight.numel()
        try:
            got = float(ask(answer, B, c_in, c_out, K, H, each))  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise Wrong("应返回一个数。") from error
        truth = flops / each / (data + weights)
        mistakes = {
            truth / 2: "一次乘加算两次浮点运算，你只算了一次。",
            truth * 4: "步长 2，输出的边长只有 H/2，运算数按输出的面积算。",
            truth * each: "忘了乘以每个数的字节数 each。",
            flops / each / data: "权重也要读一遍；批小、通道多的时候它不能忽略。",
            flops / each / (data + B * weights): "权重一批只读一次，要摊到 B 张图上，不是每张读一次。",
            flops / each / (x.numel() + weights): "输出也要写一遍。",
        }
        if abs(got - truth) < 1e-6 * truth:
            continue
        for value, message in mistakes.items():
            if abs(got - value) < 1e-6 * value:
                raise Wrong(message)
        raise Wrong(f"B={B}、{c_in}→{c_out} 通道、K={K}、H={H}、每个数 {each} 字节：应得 {truth:.4g}，你的是 {got:.4g}。")


@checks("11.3")
def speed_of_a_part(answer: object) -> None:
    for share, target in ((0.5, 1.5), (0.9, 5.0), (0.28, 1.2), (0.3, 1.0), (0.5, 2.0), (0.25, 3.0)):
        try:
            got = float(ask(answer, share, target))  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise Wrong("应返回一个数，办不到时返回 math.inf。") from error
        case = f"占 {share:g}、要快到 {target:g} 倍"
        if target * (1 - share) >= 1:  # 其余的部分自己就用完了时间
            if got != float("inf"):
                raise Wrong(f"{case}：这一类完全不花时间也只快 {1 / (1 - share):.3g} 倍，到不了，应返回 math.inf。")
            continue
        if got == float("inf"):
            raise Wrong(f"{case}：办得到，上限是 1/(1 − p) = {1 / (1 - share):.3g} 倍。")
        if got <= 0:
            raise Wrong(f"{case}：加快的倍数应是正数，收到 {got:g}。")
        reached = 1 / (1 - share + share / got)
        if abs(got - target) < 1e-9 and target != 1:
            raise Wrong(f"{case}：只把这一类加快 {target:g} 倍，整体只快 {reached:.3g} 倍；其余的部分没有变快。")
        if abs(reached - target) > 1e-6:
            raise Wrong(f"{case}：你说加快 {got:.4g} 倍；代回式(11.14)，整体快 {reached:.4g} 倍。")


@checks("11.4")
def statistics_of_all_shards(answer: object) -> None:
    generator = torch.Generator().manual_seed(114)
    for sizes in ([6, 6, 6], [2, 5, 13]):
        shards = [torch.randn(n, 3, generator=generator, dtype=torch.float64) * (k + 1) + 2 * k for k, n in enumerate(sizes)]
        counts = torch.tensor(sizes)
        means = torch.stack([shard.mean(0) for shard in shards])
        variances = torch.stack([shard.var(0, correction=0) for shard in shards])
        got = ask(answer, counts, means, variances)
        if not isinstance(got, (tuple, list)) or len(got) != 2 or any(getattr(value, "shape", None) != (3,) for value in got):
            raise Wrong("应返回两个张量 (均值, 方差)，形状各是 [C]。")
        mean, variance = (value.double() for value in got)
        whole = torch.cat(shards)
        true_mean, true_variance = whole.mean(0), whole.var(0, correction=0)
        share = (counts / counts.sum())[:, None].double()
        if torch.allclose(mean, means.mean(0)) and not torch.allclose(mean, true_mean):
            raise Wrong(f"各份 {sizes}：均值没有按份的大小加权，小的一份说话太重了。")
        if not torch.allclose(mean, true_mean):
            raise Wrong(f"各份 {sizes}：均值不对；总和除以总数。")
        if torch.allclose(variance, (share * variances).sum(0)):
            raise Wrong(f"各份 {sizes}：只平均了份内的方差，漏了份与份之间的散布 (μ_k − μ)²。")
        if torch.allclose(variance, variances.mean(0) + (means - true_mean).square().mean(0)) and len(set(sizes)) > 1:
            raise Wrong(f"各份 {sizes}：均值加了权，方差的两项也要同样地加权。")
        if torch.allclose(variance, whole.var(0)):
            raise Wrong(f"各份 {sizes}：这是除以 n − 1 的方差；批归一化用的是除以 n 的。")
        if not torch.allclose(variance, true_variance):
            raise Wrong(f"各份 {sizes}：方差不对；先写出 E[(x − μ)²] 在第 k 份里等于什么。")
