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
    if (total, warmup) == (steps // 10, steps):
        raise Wrong("你把总步数与预热步数写反了；次序是 (总步数, 预热步数, 第 0 步的学习率)。")
    if total != steps:
        raise Wrong(f"总步数不是 {total:g}；先算一轮有几批，再乘轮数。")
    if warmup != max(1, steps // 10):
        raise Wrong("预热步数：W = max(1, ⌊T/10⌋)，T 是总步数，不是一轮的步数。")
    if first == 0:
        raise Wrong("第 0 步的学习率不是 0：式(7.4) 的分子是 t + 1，否则第一步白走。")
    if abs(first - 0.004) < 1e-12:
        raise Wrong("第 0 步还在预热，学习率没有升到最高。")
    if abs(first - 0.004 * 2 / warmup) < 1e-9:
        raise Wrong("这是第 1 步的学习率；步从 0 数，第 0 步代入 t = 0。")
    if abs(first * warmup - 0.004) > 1e-6:
        raise Wrong("第 0 步的学习率：把 t = 0 代入式(7.4) 的上一行。")


known_wrong(
    "7.1",
    ("应交三个数 (总步数, 预热步数, 第 0 步的学习率)", (100, 10)),
    ("末尾不满的一批也算了", (105, 10, 0.0004)),
    ("这是一轮的步数", (20, 2, 0.002)),
    ("总步数与预热步数写反了", (10, 100, 0.0004)),
    ("总步数不是 104", (5 * 1000 // 48, 10, 0.0004)),  # 先乘了轮数再除
    ("T 是总步数，不是一轮的步数", (100, 2, 0.002)),
    ("第 0 步的学习率不是 0", (100, 10, 0.0)),
    ("这是第 1 步的学习率", (100, 10, 0.0008)),  # 从 1 数
    ("第 0 步还在预热", (100, 10, 0.004)),
    ("代入式(7.4) 的上一行", (100, 10, 0.004 / 100)),  # 除以了总步数
)


@checks("7.2")
def baseline_of_the_mean_image(answer: object) -> None:
    """用训练集的平均图去猜测试集的 MSE。"""
    generator = torch.Generator().manual_seed(72)
    for shape, counts in (((3, 4, 4), (12, 5)), ((1, 6, 6), (7, 4))):  # 彩色与灰度，张数不同
        train = torch.randint(0, 200, (counts[0], *shape), generator=generator, dtype=torch.uint8)
        test = torch.randint(30, 256, (counts[1], *shape), generator=generator, dtype=torch.uint8)
        _judge_baseline(number(ask(answer, train.clone(), test.clone())), train.double(), test.double())


def _judge_baseline(got: float, train: Tensor, test: Tensor) -> None:
    def guess(mean: Tensor, scale: float = 127.5) -> float:  # 平移不影响误差，只须除以 127.5
        return float((((test - mean) / scale) ** 2).mean())

    mean = train.mean(0)
    truth = guess(mean)
    mistakes = [
        (guess(mean, 1.0), "你在 [0, 255] 的坐标里算了；先用 to_float 换到 [-1, 1]。"),
        (guess(mean, 255.0), "你在 [0, 1] 的坐标里算了，小了 4 倍；本课程的图像在 [-1, 1]。"),
        (guess(test.mean(0)), "你用了测试集自己的平均图；训练时见不到它，这样的尺子偏严。"),
        (guess(torch.cat([train, test]).mean(0)), "你把测试图也算进了平均图；训练时见不到它们，平均图只用训练集来算。"),
        (float(((train - mean) / 127.5).square().mean()), "你算的是训练集上的成绩；平均图来自训练集，误差要在测试集上算。"),
        (guess(train.median(0).values), "你用了逐像素的中位数；使平方误差最小的是平均值，式(7.1)。"),
        (guess(train[0]), "你拿一张训练图来猜；应对全部训练图求平均。"),
        (guess(mean.floor()), "你把平均图舍成了整数；平均图是小数，先转成浮点再求平均。"),
        (guess(train.mean()), "你只猜了一个颜色；平均图是逐像素的，应对 dim=0 求平均。"),
        (guess(torch.tensor(127.5)), "你猜的是全灰（0）；应猜训练集的平均图。"),
        (truth * train[0].numel(), "你对像素求了和；MSE 对像素也取平均。"),
        (truth * test.numel(), "你对图和像素都求了和；MSE 是平均。"),
        (truth * len(test), "你对图求了和；MSE 对图也取平均。"),
        (truth**0.5, "你多开了一次方：MSE 是平方误差的平均，不是它的根。"),
        (float((test - mean).abs().mean() / 127.5), "你取了绝对值，没有平方；那是平均绝对误差。"),
        (truth / 2, "你多乘了 ½；MSE 就是平方误差的平均。"),
    ]
    if len(train[0]) > 1:  # 灰度图里，每个通道一个数就是只猜一个颜色
        mistakes.append((guess(train.mean((0, 2, 3), keepdim=True)[0]), "你每个通道只猜了一个数；平均图是逐像素的，应只对 dim=0 求平均。"))
    for value, message in mistakes:
        if abs(got - value) < 1e-5 * value:
            raise Wrong(message)
    if abs(got - truth) > 1e-5 * truth:
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
    ("你对图和像素都求了和", lambda train, test: (to_float(test) - to_float(train).mean(0)).square().sum()),
    ("你对图求了和", lambda train, test: (to_float(test) - to_float(train).mean(0)).square().flatten(1).mean(1).sum()),
    ("你多开了一次方", lambda train, test: (to_float(test) - to_float(train).mean(0)).square().mean().sqrt()),
    ("平均绝对误差", lambda train, test: (to_float(test) - to_float(train).mean(0)).abs().mean()),
    ("你多乘了 ½", lambda train, test: 0.5 * (to_float(test) - to_float(train).mean(0)).square().mean()),
    ("测试图也算进了平均图", lambda train, test: (to_float(test) - to_float(torch.cat([train, test])).mean(0)).square().mean()),
    ("训练集上的成绩", lambda train, test: (to_float(train) - to_float(train).mean(0)).square().mean()),
    ("逐像素的中位数", lambda train, test: (to_float(test) - to_float(train).median(0).values).square().mean()),
    ("拿一张训练图来猜", lambda train, test: (to_float(test) - to_float(train)[0]).square().mean()),
    ("平均图舍成了整数", lambda train, test: (to_float(test) - to_float(train.double().mean(0).to(torch.uint8))).square().mean()),
    ("你猜的是全灰", lambda train, test: to_float(test).square().mean()),
    ("在一组小图上应得", lambda train, test: (to_float(test) - to_float(train).amax(0)).square().mean()),
    ("在一组小图上应得", lambda train, test: (to_float(test) - to_float(train[:12, :3]).sum(0) / 12).square().mean()),  # 张数写死了
)


@checks("7.3")
def accumulated_gradient(answer: object) -> None:
    """逐批 backward，累加出整批的梯度。"""
    generator = torch.Generator().manual_seed(73)
    x = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    target = torch.randn(10, generator=generator, dtype=torch.float64)
    data = torch.cat([x, target[:, None]], dim=1)
    exact = 2 * x.T @ (x @ torch.full((3,), 0.5, dtype=torch.float64) - target) / 10
    for sizes in ([4, 3, 3], [5, 5], [7, 2, 1]):
        w = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
        chunks = list(data.split(sizes))
        asked: list[int] = []  # 每次求损失的那批有多大
        backwards: list[Tensor] = []  # 每次 backward 记一笔
        w.register_post_accumulate_grad_hook(backwards.append)

        def loss_of(chunk: Tensor, w: Tensor = w, asked: list[int] = asked) -> Tensor:
            asked.append(len(chunk))
            return (chunk[:, :3] @ w - chunk[:, 3]).square().mean()

        result = ask(answer, loss_of, list(chunks), w)
        if isinstance(result, (list, tuple)) and all(isinstance(each, (int, float)) for each in result):
            result = torch.tensor(result, dtype=torch.float64)  # 列成数也算
        got = tensor(result, (3,), " w.grad，形状 [3]")
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
            if len(backwards) != len(sizes):
                raise Wrong(f"{where}小批有 {len(sizes)} 个，你 backward() 了 {len(backwards)} 次；每个小批恰好一次。")
            continue
        if torch.allclose(got, plain):
            raise Wrong(f"{where}你把各小批平均损失的梯度直接相加了，偏大；每份要乘一个权重。")
        if torch.allclose(got, plain / len(sizes)):
            raise Wrong(f"{where}除以小批的个数，只在小批一样大时才对；想想每张图的权重应当相同。")
        if any(torch.allclose(got, last * share) for share in (1.0, 1 / len(sizes), sizes[-1] / 10)):
            raise Wrong(f"{where}结果里只有最后一个小批的梯度；中间不要清零。")
        ratio = float(got @ exact / exact.square().sum())
        if torch.allclose(got, ratio * exact):
            raise Wrong(f"{where}方向对了，长度是整批梯度的 {ratio:.4g} 倍；权重 n/N 里，N 是各小批大小之和。")
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


def _one_by_one(loss_of, chunks, w):
    total = sum(len(chunk) for chunk in chunks)
    for chunk in chunks:
        for row in chunk.split(1):
            (loss_of(row) / total).backward()
    return w.grad


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
    ("backward() 了 10 次", _one_by_one),
    ("方向对了，长度是整批梯度的 10 倍", _accumulate(lambda n, N, count: n)),  # 忘了除以 N
    ("方向对了，长度是整批梯度的 0.3333 倍", _accumulate(lambda n, N, count: n / N / count)),  # 除了两遍
    ("方向对了，长度是整批梯度的 -1 倍", _accumulate(lambda n, N, count: -n / N)),
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
        low, top = (float(value) for value in torch.linalg.eigvalsh(H)[[0, -1]])
        mistakes = {
            1 / top: "1/λ 是最陡的方向一步到底的学习率，还没有到界；|1 − ηλ| 到几才发散？",
            2 / (low + top): "2/(λ最大 + λ最小) 是收敛最快的学习率，不是发散的界。",
            2 / top**2: "你用了最大特征值的平方；H 自己的特征值就是曲率，不必先算 HᵀH。",
            2 / top**0.5: "你对最大的特征值开了方；曲率就是特征值本身。",
            2 / float(H.trace()): "你用了迹，即特征值之和；要的只是最大的那一个。",
            2 / float(H.square().sum().sqrt()): "你用了弗罗贝尼乌斯范数，它把全部特征值平方相加再开方；要的只是最大的那一个。",
            2 / float(H.abs().sum(1).max()): "你用了各行绝对值之和的最大值，那只是最大特征值的上限。",
        }
        for value, message in mistakes.items():
            if abs(got / value - 1) < 1e-5 and abs(got * top / 2 - 1) > 1e-4:
                raise Wrong(message)
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
    ("一步到底的学习率", lambda H: 1 / torch.linalg.eigvalsh(H)[-1]),
    ("收敛最快的学习率", lambda H: 2 / (torch.linalg.eigvalsh(H)[0] + torch.linalg.eigvalsh(H)[-1])),
    ("最大特征值的平方", lambda H: 2 / torch.linalg.eigvalsh(H.T @ H)[-1]),
    ("开了方", lambda H: 2 / torch.linalg.eigvalsh(H)[-1].sqrt()),
    ("你用了迹", lambda H: 2 / H.trace()),
    ("弗罗贝尼乌斯范数", lambda H: 2 / torch.linalg.matrix_norm(H)),
    ("各行绝对值之和", lambda H: 2 / torch.linalg.matrix_norm(H, float("inf"))),
    ("再大一点也收敛", lambda H: 0.25),  # 第一个碗的界，写死了
    ("已经发散", lambda H: 2 / torch.linalg.eigvalsh(H).mean()),
)
