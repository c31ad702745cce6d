"""第 07 章“训练”的练习：检查，以及它认得的错答。"""

import torch
from torch import Tensor

from vaelab.exercises.judging import Wrong, ask, checks, known_wrong, number, numbers, tensor
from vaelab.images import to_float


@checks("7.1")
def steps_and_warmup(answer: object) -> None:
    """总步数、预热步数、第 0 步的学习率。"""
    total, warmup, first = numbers(answer, 3, "三个数 (总步数, 预热步数, 第 0 步的学习率)")
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


known_wrong(
    "7.1",
    ("应交三个数 (总步数, 预热步数, 第 0 步的学习率)", (100, 10)),
    ("末尾不满的一批也算了", (105, 10, 0.0004)),
    ("这是一轮的步数", (20, 2, 0.002)),
    ("总步数不是 104", (5 * 1000 // 48, 10, 0.0004)),  # 先乘了轮数再除
    ("T 是总步数，不是一轮的步数", (100, 2, 0.002)),
    ("第 0 步的学习率不是 0", (100, 10, 0.0)),
    ("第 0 步还在预热", (100, 10, 0.004)),
    ("代入式(7.4) 的上一行", (100, 10, 0.004 / 100)),  # 除以了总步数
)


@checks("7.2")
def baseline_of_the_mean_image(answer: object) -> None:
    """用训练集的平均图去猜测试集的 MSE。"""
    generator = torch.Generator().manual_seed(72)
    train = torch.randint(0, 200, (12, 3, 4, 4), generator=generator, dtype=torch.uint8)
    test = torch.randint(30, 256, (5, 3, 4, 4), generator=generator, dtype=torch.uint8)
    got = number(ask(answer, train.clone(), test.clone()))

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
    if abs(got - truth) > 1e-4 * truth:
        raise Wrong(f"在一组小图上应得 {truth:.4g}，你的是 {got:.4g}。")


known_wrong(
    "7.2",
    ("应交一个数", lambda train, test: (to_float(test) - to_float(train).mean(0)).square().flatten(1).mean(1)),  # 每张图一个
    ("[0, 255] 的坐标", lambda train, test: (test.float() - train.float().mean(0)).square().mean()),
    ("[0, 1] 的坐标", lambda train, test: (test / 255 - (train / 255).mean(0)).square().mean()),
    ("测试集自己的平均图", lambda train, test: (to_float(test) - to_float(test).mean(0)).square().mean()),
    ("只猜了一个颜色", lambda train, test: (to_float(test) - to_float(train).mean()).square().mean()),
    ("每个通道只猜了一个数", lambda train, test: (to_float(test) - to_float(train).mean((0, 2, 3), keepdim=True)).square().mean()),
    ("你对像素求了和", lambda train, test: (to_float(test) - to_float(train).mean(0)).square().flatten(1).sum(1).mean()),
    ("在一组小图上应得", lambda train, test: (to_float(test) - to_float(train).mean(0)).square().mean().sqrt()),  # 多开了方
    ("在一组小图上应得", lambda train, test: (to_float(test) - to_float(train).mean(0)).abs().mean()),  # L1
)


@checks("7.3")
def accumulated_gradient(answer: object) -> None:
    """逐批 backward，累加出整批的梯度。"""
    generator = torch.Generator().manual_seed(73)
    x = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    target = torch.randn(10, generator=generator, dtype=torch.float64)
    data = torch.cat([x, target[:, None]], dim=1)
    exact = 2 * x.T @ (x @ torch.full((3,), 0.5, dtype=torch.float64) - target) / 10
    for sizes in ([5, 5], [4, 3, 3], [7, 2, 1]):
        w = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
        chunks = list(data.split(sizes))
        asked: list[int] = []  # 每次求损失的那批有多大
        backwards: list[Tensor] = []  # 每次 backward 记一笔
        w.register_post_accumulate_grad_hook(backwards.append)

        def loss_of(chunk: Tensor, w: Tensor = w, asked: list[int] = asked) -> Tensor:
            asked.append(len(chunk))
            return (chunk[:, :3] @ w - chunk[:, 3]).square().mean()

        got = tensor(ask(answer, loss_of, list(chunks), w), (3,), " w.grad，形状 [3]")
        where = f"小批 {sizes}："
        each = [2 * c[:, :3].T @ (c[:, :3] @ w.detach() - c[:, 3]) / len(c) for c in chunks]
        plain, last = sum(each), each[-1]
        if max(asked, default=0) > max(sizes):
            raise Wrong(f"{where}你把小批又拼到了一起；正因为内存装不下整批才要拆开，loss_of 每次只收一个小批。")
        if torch.allclose(got, exact):
            if w.grad is None or not torch.allclose(w.grad, exact):
                raise Wrong(f"{where}返回的梯度对了，w.grad 却不是它；step() 用的是 w.grad，要用 backward() 累加进去。")
            if len(backwards) == 1:
                raise Wrong(f"{where}你把损失加起来，只 backward() 了一次；各小批的计算图一直留到最后，没有省下内存。")
            continue
        if torch.allclose(got, plain):
            raise Wrong(f"{where}你把各小批平均损失的梯度直接相加了，偏大；每份要乘一个权重。")
        if torch.allclose(got, plain / len(sizes)):
            raise Wrong(f"{where}除以小批的个数，只在小批一样大时才对；想想每张图的权重应当相同。")
        if any(torch.allclose(got, last * share) for share in (1.0, 1 / len(sizes), sizes[-1] / 10)):
            raise Wrong(f"{where}结果里只有最后一个小批的梯度；中间不要清零。")
        raise Wrong(f"{where}累加出的梯度与整批的不同。")


def _accumulate(weight, clear=False):
    """逐批 backward，每批的损失乘以 ``weight(n, N, 批数)``；``clear`` 每批之前都清零。"""

    def accumulate(loss_of, chunks, w):
        total = sum(len(chunk) for chunk in chunks)
        for chunk in chunks:
            if clear:
                w.grad = None
            (weight(len(chunk), total, len(chunks)) * loss_of(chunk)).backward()
        return w.grad

    return accumulate


def _whole_batch(loss_of, chunks, w):
    loss_of(torch.cat(chunks)).backward()
    return w.grad


def _one_backward(loss_of, chunks, w):
    total = sum(len(chunk) for chunk in chunks)
    sum(len(chunk) / total * loss_of(chunk) for chunk in chunks).backward()
    return w.grad


def _only_returned(loss_of, chunks, w):
    total = sum(len(chunk) for chunk in chunks)
    return sum(len(chunk) / total * torch.autograd.grad(loss_of(chunk), w)[0] for chunk in chunks)


def _taken_away(loss_of, chunks, w):
    gradient = _accumulate(lambda n, N, count: n / N)(loss_of, chunks, w).clone()
    w.grad.zero_()  # 还没有 step() 就清了
    return gradient


known_wrong(
    "7.3",
    ("应返回 w.grad", lambda loss_of, chunks, w: sum(loss_of(chunk) for chunk in chunks)),  # 返回了损失
    ("又拼到了一起", _whole_batch),
    ("w.grad 却不是它", _only_returned),
    ("w.grad 却不是它", _taken_away),
    ("只 backward() 了一次", _one_backward),
    ("直接相加了", _accumulate(lambda n, N, count: 1)),
    ("除以小批的个数", _accumulate(lambda n, N, count: 1 / count)),
    ("只有最后一个小批的梯度", _accumulate(lambda n, N, count: 1, clear=True)),
    ("只有最后一个小批的梯度", _accumulate(lambda n, N, count: 1 / count, clear=True)),
    ("只有最后一个小批的梯度", _accumulate(lambda n, N, count: n / N, clear=True)),
    ("累加出的梯度与整批的不同", _accumulate(lambda n, N, count: n)),  # 忘了除以 N
    ("累加出的梯度与整批的不同", _accumulate(lambda n, N, count: 1 / n)),  # 乘成了除：loss_of 已经除过 n
)


@checks("7.4")
def largest_stable_rate(answer: object) -> None:
    """多维的碗里，学习率的界。"""
    generator = torch.Generator().manual_seed(74)
    # 两个大小不同的碗：函数对任何 H 都要对
    for curvatures in ([0.5, 2.0, 8.0], [0.3, 0.7, 1.0, 2.5]):
        d = len(curvatures)
        basis, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
        H = basis @ torch.diag(torch.tensor(curvatures, dtype=torch.float64)) @ basis.T
        got = number(ask(answer, H.clone()))

        def growth(lr: float, H: Tensor = H) -> float:  # 每步最坏的放大倍数
            return float((1 - lr * torch.linalg.eigvalsh(H)).abs().max())

        if got <= 0:
            raise Wrong(f"界应是正数，收到 {got:.4g}。")
        if abs(got * float(torch.linalg.eigvalsh(H)[0]) - 2) < 1e-5:
            raise Wrong("你用了最小的特征值；先发散的是最陡的方向。")
        if abs(got * float(H.diagonal().max()) - 2) < 1e-5:
            raise Wrong("你用了 H 的对角线；最陡的方向一般不沿坐标轴，要看特征值。")
        if growth(got * (1 + 1e-5)) <= 1:  # 极小的 η 舍入之后放大倍数恰是 1，也没有到界
            raise Wrong(f"η = {got:.4g} 收敛，但再大一点也收敛，还没有到界；|1 − ηλ| 到几才发散？")
        if growth(got * (1 - 1e-5)) > 1:
            raise Wrong(f"η = {got:.4g} 已经发散：每步在最陡的方向上放大 {growth(got):.3g} 倍。")


known_wrong(
    "7.4",
    ("应交一个数", lambda H: 2 / torch.linalg.eigvalsh(H)),  # 每个方向一个
    ("界应是正数", lambda H: -2 / torch.linalg.eigvalsh(H)[-1]),  # 由 1 − ηλ > −1 移项，符号错了
    ("你用了最小的特征值", lambda H: 2 / torch.linalg.eigvalsh(H)[0]),
    ("你用了 H 的对角线", lambda H: 2 / H.diagonal().max()),
    ("再大一点也收敛", lambda H: 1 / torch.linalg.eigvalsh(H)[-1]),
    ("再大一点也收敛", lambda H: 2 / torch.linalg.matrix_norm(H)),  # 弗罗贝尼乌斯范数比最大的特征值大
    ("再大一点也收敛", lambda H: 0.25),  # 第一个碗的界，写死了
    ("已经发散", lambda H: 2 / torch.linalg.eigvalsh(H).mean()),
)
