"""第 07 章“训练”的练习：检查，以及它认得的错答。"""

import torch
from torch import Tensor

from vaelab.exercises.judging import ask, checks, known_wrong, Wrong


@checks("7.1")
def steps_and_warmup(answer: object) -> None:
    if not isinstance(answer, (tuple, list)) or len(answer) != 3:
        raise Wrong(f"应交三个数 (总步数, 预热步数, 第 0 步的学习率)，收到 {answer!r}。")
    try:
        total, warmup, first = (float(value) for value in answer)
    except (TypeError, ValueError) as error:
        raise Wrong(f"应交三个数，收到 {answer!r}。") from error
    steps = 5 * len(range(0, 1000 - 47, 48))
    if total == 5 * len(range(0, 1000, 48)):
        raise Wrong("总步数：你把末尾不满的一批也算了；每轮的步数是 1000 // 48。")
    if total * 5 == steps:
        raise Wrong("总步数：这是一轮的步数，还要乘以轮数。")
    if total != steps:
        raise Wrong(f"总步数不是 {total:g}；先算一轮有几批，再乘轮数。")
    if warmup != max(1, steps // 10):
        raise Wrong("预热步数：W = max(1, ⌊T/10⌋)，T 是总步数，不是一轮的步数。")
    if first == 0:
        raise Wrong("第 0 步的学习率不是 0：式(7.4) 的分子是 t + 1，否则第一步白走。")
    if abs(first - 0.004) < 1e-12:
        raise Wrong("第 0 步还在预热，学习率没有升到最高。")
    if abs(first * warmup - 0.004) > 1e-6:
        raise Wrong("第 0 步的学习率：把 t = 0 代入式(7.4) 的上一行。")


@checks("7.2")
def baseline_of_the_mean_image(answer: object) -> None:
    generator = torch.Generator().manual_seed(72)
    train = torch.randint(0, 200, (12, 3, 4, 4), generator=generator, dtype=torch.uint8)
    test = torch.randint(30, 256, (5, 3, 4, 4), generator=generator, dtype=torch.uint8)
    got = ask(answer, train, test)
    try:
        got = float(got)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise Wrong(f"应返回一个数，收到 {type(got).__name__}。") from error

    def guess(mean: Tensor, scale: float = 127.5) -> float:  # 平移不影响误差，只须除以 127.5
        return float((((test.double() - mean) / scale) ** 2).mean())

    truth = guess(train.double().mean(0))
    mistakes = {
        guess(train.double().mean(0), 1.0): "你在 [0, 255] 的坐标里算了；先用 to_float 换到 [-1, 1]。",
        guess(train.double().mean(0), 255.0): "你在 [0, 1] 的坐标里算了，小了 4 倍；本课程的图像在 [-1, 1]。",
        guess(test.double().mean(0)): "你用了测试集自己的平均图；训练时见不到它，这样的尺子偏严。",
        guess(train.double().mean()): "你只猜了一个颜色；平均图是逐像素的，应对 dim=0 求平均。",
        guess(train.double().mean((0, 2, 3), keepdim=True)[0]): "你每个通道只猜了一个数；平均图是逐像素的，应只对 dim=0 求平均。",
        truth * train[0].numel(): "你对像素求了和；MSE 对像素也取平均。",
    }
    for value, message in mistakes.items():
        if abs(got - value) < 1e-4 * value:
            raise Wrong(message)
    if not abs(got - truth) < 1e-4 * truth:
        raise Wrong(f"在一组小图上应得 {truth:.4f}，你的是 {got:.4f}。")


@checks("7.3")
def accumulated_gradient(answer: object) -> None:
    generator = torch.Generator().manual_seed(73)
    x = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    target = torch.randn(10, generator=generator, dtype=torch.float64)
    data = torch.cat([x, target[:, None]], dim=1)
    exact = 2 * x.T @ (x @ torch.full((3,), 0.5, dtype=torch.float64) - target) / 10
    for sizes in ([5, 5], [4, 3, 3], [7, 2, 1]):
        w = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
        chunks = list(data.split(sizes))
        got = ask(answer, lambda chunk, w=w: (chunk[:, :3] @ w - chunk[:, 3]).square().mean(), chunks, w)
        if not isinstance(got, Tensor) or got.shape != (3,):
            raise Wrong("应返回 w.grad。")
        plain = sum(2 * c[:, :3].T @ (c[:, :3] @ w.detach() - c[:, 3]) / len(c) for c in chunks)
        last = 2 * chunks[-1][:, :3].T @ (chunks[-1][:, :3] @ w.detach() - chunks[-1][:, 3]) / sizes[-1]
        if torch.allclose(got, exact):
            continue
        if torch.allclose(got, plain):
            raise Wrong(f"小批 {sizes}：你把各小批平均损失的梯度直接相加了，偏大；每份要乘一个权重。")
        if torch.allclose(got, plain / len(sizes)):
            raise Wrong(f"小批 {sizes}：除以小批的个数，只在小批一样大时才对；想想每张图的权重应当相同。")
        if any(torch.allclose(got, last * share) for share in (1.0, 1 / len(sizes), sizes[-1] / 10)):
            raise Wrong(f"小批 {sizes}：结果里只有最后一个小批的梯度；中间不要清零。")
        raise Wrong(f"小批 {sizes}：累加出的梯度与整批的不同。")


@checks("7.4")
def largest_stable_rate(answer: object) -> None:
    basis, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(74), dtype=torch.float64))
    curvatures = torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64)
    H = basis @ torch.diag(curvatures) @ basis.T
    try:
        got = float(ask(answer, H))  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise Wrong("应返回一个数。") from error

    def growth(lr: float) -> float:  # 每步最坏的放大倍数，由矩阵本身求得
        return float(torch.linalg.matrix_norm(torch.eye(3, dtype=torch.float64) - lr * H, ord=2))

    if not 0 < got < float("inf"):
        raise Wrong(f"界应是正数，收到 {got:.4g}。")
    if abs(got * float(torch.linalg.eigvalsh(H)[0]) - 2) < 1e-6:
        raise Wrong("你用了最小的特征值；先发散的是最陡的方向。")
    if abs(got * float(H.diagonal().max()) - 2) < 1e-6:
        raise Wrong("你用了 H 的对角线；最陡的方向一般不沿坐标轴，要看特征值。")
    if growth(got * 1.001) < 1:
        raise Wrong(f"η = {got:.4g} 收敛，但再大一点也收敛，还没有到界；|1 − ηλ| 到几才发散？")
    if growth(got * 0.999) > 1:
        raise Wrong(f"η = {got:.4g} 已经发散：每步在最陡的方向上放大 {growth(got):.3g} 倍。")
