"""第 02 章“编码器”的练习：检查，以及它认得的错答。"""

import math
from collections.abc import Iterator

import torch

from vaelab.exercises.judging import Wrong, ask, checks, finite, known_wrong, listed, whole


@checks("2.1")
def sizes_of_five_levels(answer: object) -> None:
    """100×100 的图经过五级卷积，各级输出的边长。"""
    what = "一个整数列表，如 [64, 32, …]"
    if isinstance(answer, (Iterator, range)):
        answer = list(answer)
    given = [whole(size, what) for size in listed(answer, what)]
    halve = torch.nn.Conv2d(1, 1, 3, stride=2, padding=1, device="meta")  # 只要形状，不必真算
    image, truth = torch.zeros(1, 1, 100, 100, device="meta"), []
    for _ in range(5):
        image = halve(image)
        truth.append(image.shape[-1])
    if given == [100, *truth] or given == [100, *truth[:-1]]:
        raise Wrong("列表从第 1 级的输出写起，不含输入的 100，共五个数。")
    if len(given) != 5:
        raise Wrong(f"五级应有五个数，收到 {len(given)} 个。")
    if given == [100 // 2**level for level in range(1, 6)]:
        raise Wrong("你每级都向下取整了；边长为奇数时，填充的一圈让窗口多停一次，看看 25 的下一级。")
    if given == truth[::-1]:
        raise Wrong("次序反了：列表从第 1 级（最大的）写到第 5 级（最小的）。")
    if given == [size**2 for size in truth]:
        raise Wrong("你写的是每级有多少格；题目问的是边长，也就是它们的平方根。")
    if given == [32, 16, 8, 4, 2]:
        raise Wrong("这是 64×64 的图的各级边长；题目里的图是 100×100。")
    if given != truth:
        first = next(level for level in range(5) if given[level] != truth[level])
        raise Wrong(f"第 {first + 1} 级的 {given[first]} 不对；把上一级的边长代入尺寸公式再算一次。")


known_wrong(
    "2.1",
    ("收到 12.5", [50, 25, 12.5, 6.25, 3.125]),  # 没有取整
    ("应交一个整数列表", 4),  # 只交最后一级
    ("不含输入的 100", [100, 50, 25, 13, 7, 4]),
    ("不含输入的 100", [100, 50, 25, 13, 7]),
    ("收到 4 个", [50, 25, 13, 7]),
    ("向下取整", [50, 25, 12, 6, 3]),
    ("次序反了", [4, 7, 13, 25, 50]),
    ("每级有多少格", torch.tensor([2500, 625, 169, 49, 16])),
    ("64×64 的图", (32, 16, 8, 4, 2)),
    ("第 1 级的 51 不对", [51, 26, 13, 7, 4]),  # 填充当成两圈
    ("第 1 级的 49 不对", [49, 24, 11, 5, 2]),  # 忘了填充
    ("第 4 级的 6 不对", [50, 25, 13, 6, 3]),  # 有时向上，有时向下
)


@checks("2.2")
def padding_that_keeps_the_size(answer: object) -> None:
    settings = [(3, 1), (1, 1), (5, 1), (3, 2), (5, 3), (7, 2), (9, 4)]
    given, sizes = [], []
    for k, d in settings:
        given.append(whole(ask(answer, k, d), f"一个不小于 0 的整数（k={k}、d={d} 时的填充）", least=0))
        row, window = torch.zeros(1, 1, 25 + d * k, device="meta"), torch.zeros(1, 1, k, device="meta")
        sizes.append(torch.nn.functional.conv1d(row, window, padding=given[-1], dilation=d).shape[-1] - d * k)
    if all(size == 25 for size in sizes):
        return

    def is_like(formula) -> bool:
        return given == [formula(k, d) for k, d in settings]

    if len(set(given)) == 1:
        raise Wrong(f"你总是填充 {given[0]}；窗口盖住 d(k−1)+1 格，填充应随 k 与 d 变。")
    if is_like(lambda k, d: k // 2):
        raise Wrong("你忘了膨胀，d > 1 时不对：窗口盖住的不是 k 格，而是 d(k−1)+1 格。")
    if is_like(lambda k, d: d * (k - 1)):
        raise Wrong("填充是左右各一份：你给的是两边的总量，要平分到两边。")
    if is_like(lambda k, d: k - 1):
        raise Wrong("填充是左右各一份，总量要平分到两边；另外也忘了膨胀，窗口盖住 d(k−1)+1 格。")
    if is_like(lambda k, d: k * (d - 1) // 2):
        raise Wrong("k 与 d 写反了：k 格之间有 k−1 个间隔，每个间隔长 d，不是 k(d−1)。")
    k, d, padding, size = next((*setting, *found) for setting, *found in zip(settings, given, sizes) if found[1] != 25)
    raise Wrong(f"k={k}、d={d} 时你填充 {padding}，真的卷积把 25 变成了 {size}，应仍是 25。")


known_wrong(
    "2.2",
    ("不小于 0 的整数（k=3、d=1 时的填充），收到 1.5", lambda k, d: d * k / 2),
    ("不小于 0 的整数（k=3、d=1 时的填充），收到 -1", lambda k, d: -d * (k - 1) // 2),  # 移项时丢了负号
    ("忘了膨胀", lambda k, d: k // 2),
    ("平分到两边", lambda k, d: d * (k - 1)),
    ("也忘了膨胀", lambda k, d: k - 1),
    ("总是填充 1", lambda k, d: 1),
    ("k 与 d 写反了", lambda k, d: k * (d - 1) // 2),
    ("k=3、d=2 时你填充 3", lambda k, d: d * k // 2),
    ("k=3、d=2 时你填充 4", lambda k, d: (k - 1) // 2 * d**2),
    ("k=5、d=3 时你填充 4", lambda k, d: (k - 1) // 2 + d - 1),
)


@checks("2.3")
def receptive_field(answer: object) -> None:
    """最后一级第 unit 个单元在原图上的视野 (first, last)。"""

    def touched(unit: int, layers: list) -> tuple[int, int]:  # 逐级列出用到的每一个单元，不用递推式
        units = {unit}
        for k, s, p, d in reversed(layers):
            units = {s * i + d * u - p for i in units for u in range(k)}
        return min(units), max(units)

    down = (3, 2, 1, 1)
    mixed = [(5, 1, 2, 1), (3, 2, 0, 2), (4, 3, 1, 1)]
    asked = [(0, [down]), (3, [down]), (0, [down] * 5), (1, [down] * 5), (2, mixed), (5, mixed[::-1])]
    answers = []
    for unit, layers in asked:
        what = "两个整数 (first, last)"
        first, last = (whole(end, what) for end in listed(ask(answer, unit, list(layers)), what, 2))
        answers.append((first, last))

    def is_like(view) -> bool:
        return answers == [view(unit, layers) for unit, layers in asked]

    if is_like(touched):
        return
    if is_like(lambda unit, layers: touched(unit, layers)[::-1]):
        raise Wrong("头尾颠倒了：应返回 (first, last)，first 是编号小的一头。")
    if is_like(lambda unit, layers: (touched(unit, layers)[0], touched(unit, layers)[1] + 1)):
        raise Wrong("last 多了 1：它是视野里最后一个像素自己的编号，不是它的下一个。")
    if is_like(lambda unit, layers: tuple(end + 1 for end in touched(unit, layers))):
        raise Wrong("头尾都多了 1：像素从 0 数起，图外左边的第一个是 -1。")
    if is_like(lambda unit, layers: touched(unit, [(k, s, -p, d) for k, s, p, d in layers])):
        raise Wrong("填充的正负号反了：补了 p 格，窗口的起点往左移，是 s·i − p，你加上了 p。")
    if is_like(lambda unit, layers: touched(0, layers)):
        raise Wrong("你的结果与 unit 无关；第 unit 个单元的视野应从 unit 出发往回推。")
    if is_like(lambda unit, layers: touched(unit, [(k, p, s, d) for k, s, p, d in layers])):
        raise Wrong("步长与填充当反了：layers 里每级是 (k, s, p, d)。")
    if is_like(lambda unit, layers: touched(unit, [(k, s, s * p, d) for k, s, p, d in layers])):
        raise Wrong("填充不随步长放大：应先乘步长再减填充，s·i − p，你算的是 s·(i − p)。")
    if is_like(lambda unit, layers: touched(unit, layers[:1])) or is_like(lambda unit, layers: touched(unit, layers[-1:])):
        raise Wrong("你只走了一级；应从最后一级起，逐级推回图像。")
    for (unit, layers), (first, last) in zip(asked, answers):
        truth, where = touched(unit, layers), f"unit={unit}、layers={layers} 时"
        if (first, last) == truth:
            continue
        if first >= 0 > truth[0]:
            raise Wrong(f"{where}视野从图外开始，first 应为负数，你给出 {first}；是不是忘了减填充 p，或按边界裁剪了？")
        if (first, last) == touched(unit, layers[::-1]):
            raise Wrong(f"{where}结果像是把各级倒着走了：应从最后一级往图像的方向，一级一级推回去。")
        if last - first != truth[1] - truth[0]:
            raise Wrong(f"{where}视野长 {last - first + 1}，应为 {truth[1] - truth[0] + 1}；窗口的最后一格是 s·i − p + d·(k−1)。")
        raise Wrong(f"{where}长度对，起点 {first} 不对；检查步长与填充。")


def _walks_back(unit, layers, step):
    """从最后一级推回图像，每级走一步 ``step``。"""
    first = last = unit
    for layer in reversed(layers):
        first, last = step(first, last, *layer)
    return first, last


def _right_region(unit, layers):
    return _walks_back(unit, layers, lambda first, last, k, s, p, d: (s * first - p, s * last - p + d * (k - 1)))


def _clips_to_the_image(unit, layers):
    first, last = _right_region(unit, layers)
    return max(first, 0), last


def _paddings_not_scaled_by_strides(unit, layers):
    jump = math.prod(s for _, s, _, _ in layers)
    first, length = unit * jump - sum(p for _, _, p, _ in layers), 1
    for k, s, _, d in reversed(layers):
        length = s * (length - 1) + d * (k - 1) + 1
    return first, first + length - 1


known_wrong(
    "2.3",
    ("应交两个整数", lambda unit, layers: 2 ** (len(layers) + 1) - 1),  # 只交了感受野的边长
    ("忘了减填充 p", lambda unit, layers: _walks_back(unit, layers, lambda first, last, k, s, p, d: (s * first, s * last + d * (k - 1)))),
    ("按边界裁剪了", _clips_to_the_image),
    ("头尾颠倒了", lambda unit, layers: _right_region(unit, layers)[::-1]),
    ("last 多了 1", lambda unit, layers: (_right_region(unit, layers)[0], _right_region(unit, layers)[1] + 1)),
    ("头尾都多了 1", lambda unit, layers: [end + 1 for end in _right_region(unit, layers)]),
    ("你加上了 p", lambda unit, layers: _walks_back(unit, layers, lambda first, last, k, s, p, d: (s * first + p, s * last + p + d * (k - 1)))),
    ("步长与填充当反了", lambda unit, layers: _right_region(unit, [(k, p, s, d) for k, s, p, d in layers])),
    ("填充不随步长放大", lambda unit, layers: _right_region(unit, [(k, s, s * p, d) for k, s, p, d in layers])),
    ("只走了一级", lambda unit, layers: _right_region(unit, layers[:1])),
    ("只走了一级", lambda unit, layers: _right_region(unit, layers[-1:])),
    ("与 unit 无关", lambda unit, layers: _right_region(0, layers)),
    ("倒着走了", lambda unit, layers: _walks_back(
        unit, layers[::-1], lambda first, last, k, s, p, d: (s * first - p, s * last - p + d * (k - 1)))),
    ("视野长 4，应为 3", lambda unit, layers: _walks_back(unit, layers, lambda first, last, k, s, p, d: (s * first - p, s * last - p + d * k))),
    ("视野长 1，应为 3", lambda unit, layers: _walks_back(unit, layers, lambda first, last, k, s, p, d: (s * first - p, s * last - p))),
    ("窗口的最后一格", lambda unit, layers: _walks_back(
        unit, layers, lambda first, last, k, s, p, d: (s * first - p, s * last - p + k - 1))),  # 忘了膨胀
    ("起点 2 不对", lambda unit, layers: _walks_back(
        unit, layers, lambda first, last, k, s, p, d: (first - p, last - p + d * (k - 1)))),  # 忘了步长
    ("起点 -5 不对", _paddings_not_scaled_by_strides),
)  # fmt: skip


@checks("2.4")
def slope_of_the_kl_in_log_std(answer: object) -> None:
    log_std = torch.tensor([-3.0, -0.5, 0.0, 0.4, 1.0], dtype=torch.float64, requires_grad=True)
    q = torch.distributions.Normal(torch.full_like(log_std, 0.7), log_std.exp())
    p = torch.distributions.Normal(torch.zeros_like(log_std), torch.ones_like(log_std))
    (truth,) = torch.autograd.grad(torch.distributions.kl_divergence(q, p).sum(), log_std)
    given = log_std.detach()
    got = finite(ask(answer, given.clone()), "与 log_std 同形的张量")
    if got.shape != truth.shape:
        raise Wrong(f"应返回与 log_std 同形的张量 {list(truth.shape)}，收到 {list(got.shape)}。")

    if torch.allclose(got, truth, atol=1e-6):
        return
    kld = 0.5 * ((2 * given).exp() - 1 - 2 * given)
    for other, message in (
        (truth / 2, "差了一倍：这是对 log σ² 的导数。log σ² = 2t，链式法则还要乘 2。"),
        (truth * 2, "多乘了一个 2：½ 与 2t 的导数 2 相消，剩下 σ² − 1。"),
        (truth / given.exp(), "这是对 σ 的导数；还要乘 ∂σ/∂t = σ。"),
        (truth / (2 * given).exp() / 2, "这是对 σ² 的导数；还要乘 ∂σ²/∂t = 2σ²。"),
        (-truth, "符号反了：σ 比 1 大时 KL 随 t 增大，导数应为正。"),
        (truth / len(given), f"各处都小了 {len(given)} 倍：你先对 {len(given)} 个元素取了平均再求导；每个元素各有自己的 KL。"),
        (given.exp() - 1, "你把 t 当成了 log σ²：t = log σ，σ² 是 e 的 2t 次方。"),
        (0.5 * (given.exp() - 1), "你把 t 当成了 log σ²，返回的还是对它的导数：t = log σ，σ² 是 e 的 2t 次方。"),
        (given.square() - 1, "你把 log_std 当成了 σ：它是 log σ，要先取指数。"),
        (0.5 * (given.square() - 1), "你把 log_std 当成了 σ：它是 log σ，要先取指数。"),
        (torch.zeros_like(given), "你总是返回 0；导数只在 σ = 1 处为 0。"),
    ):
        if torch.allclose(got, other, atol=1e-6):
            raise Wrong(message)
    if torch.allclose(got - kld, (got - kld)[:1], atol=1e-6):
        raise Wrong("这是 KL 本身（或差一个常数），还没有对 t 求导。")
    if torch.allclose(got - truth, (got - truth)[:1], atol=1e-6):
        raise Wrong(f"处处差了 {(got - truth)[0]:+.3g}：−½ log σ² = −t 的导数是 −1；μ² 与 t 无关，导数里没有它。")
    worst = int((got - truth).abs().argmax())
    raise Wrong(f"t = {given[worst]:.1f} 时你给出 {got[worst]:.4g}，autograd 给出 {truth[worst]:.4g}。")


known_wrong(
    "2.4",
    ("应交与 log_std 同形的张量", lambda t: "σ² − 1"),
    ("有 NaN", lambda t: t.log()),
    ("同形的张量 [5]，收到 []", lambda t: ((2 * t).exp() - 1).sum()),
    ("对 log σ² 的导数", lambda t: 0.5 * ((2 * t).exp() - 1)),
    ("对 σ 的导数", lambda t: t.exp() - (-t).exp()),
    ("符号反了", lambda t: 1 - (2 * t).exp()),
    ("处处差了 +1", lambda t: (2 * t).exp()),  # 丢了 −1
    ("处处差了 +2", lambda t: (2 * t).exp() + 1),
    ("处处差了 +0.49", lambda t: 0.7**2 + (2 * t).exp() - 1),  # 留着 μ²
    ("多乘了一个 2", lambda t: 2 * ((2 * t).exp() - 1)),
    ("对 σ² 的导数", lambda t: 0.5 * (1 - (-2 * t).exp())),
    ("取了平均", lambda t: ((2 * t).exp() - 1) / t.numel()),
    ("把 t 当成了 log σ²：", lambda t: t.exp() - 1),
    ("把 t 当成了 log σ²，", lambda t: 0.5 * (t.exp() - 1)),
    ("当成了 σ", lambda t: t**2 - 1),
    ("当成了 σ", lambda t: 0.5 * (t**2 - 1)),
    ("总是返回 0", torch.zeros_like),
    ("KL 本身", lambda t: 0.5 * (0.7**2 + (2 * t).exp() - 1 - 2 * t)),
    ("t = 1.0 时你给出 3，", lambda t: 2 ** (2 * t) - 1),  # 底数写成 2
)
