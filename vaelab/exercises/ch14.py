"""第 14 章“离散的隐变量”的练习：检查，以及它认得的错答。"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vaelab.exercises.judging import Wrong, ask, checks, known_wrong, numbers, shown, whole

Loss = Callable[[Tensor, Tensor, float], Tensor]


class _Scaled(torch.autograd.Function):
    """对的一种写法：值与梯度都照公式手写，不经过 detach。"""

    @staticmethod
    def forward(ctx, z: Tensor, e: Tensor, beta: float) -> Tensor:
        ctx.save_for_backward(z, e)
        ctx.beta = beta
        return (1 + beta) * (z - e).square().sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        z, e = ctx.saved_tensors
        return grad * 2 * ctx.beta * (z - e), grad * 2 * (e - z), None


_RIGHT: tuple[Loss, ...] = (
    lambda z, e, beta: (z.detach() - e).square().sum() + beta * (z - e.detach()).square().sum(),
    lambda z, e, beta: F.mse_loss(z.detach(), e, reduction="sum") + beta * F.mse_loss(z, e.detach(), reduction="sum"),
    lambda z, e, beta: _Scaled.apply(z, e, beta),
)
_WRONG: tuple[tuple[str, Loss], ...] = (
    ("β 乘在了码本那一项", lambda z, e, beta: beta * (z.detach() - e).square().sum() + (z - e.detach()).square().sum()),
    ("两项都没有 detach", lambda z, e, beta: (1 + beta) * (z - e).square().sum()),
    ("码本那一项两边都 detach 了，码本没有梯度", lambda z, e, beta: (z - e).detach().square().sum() + beta * (z - e.detach()).square().sum()),
    ("漏了 β", lambda z, e, beta: (z.detach() - e).square().sum() + (z - e.detach()).square().sum()),
    ("取了平均", lambda z, e, beta: (z.detach() - e).square().mean() + beta * (z - e.detach()).square().mean()),
)


@checks("14.1")
def test_of_the_commitment(answer: object) -> None:
    """测试抓得住几个错的，冤不冤枉对的。"""

    def says(loss: Loss) -> bool:
        got = ask(answer, loss)
        if not isinstance(got, (bool, np.bool_)) and not (isinstance(got, Tensor) and got.dtype == torch.bool and got.numel() == 1):
            raise Wrong(f"catches 应返回 True 或 False，收到 {shown(got)}。")
        return bool(got)

    blamed = [says(loss) for loss in _RIGHT]
    caught = [says(loss) for _, loss in _WRONG]
    if all(blamed) and all(caught):
        raise Wrong("你的测试对谁都说错，对的也冤枉了。")
    if any(blamed):
        raise Wrong(f"三个对的里，你冤枉了第 {blamed.index(True) + 1} 个：写法可以不同，比梯度时留出舍入的误差。")
    if not any(caught):
        raise Wrong("一个错的也没有抓住：只看损失的值是不够的，试试对 z 与 e 各求一次梯度。")
    if not caught[0]:
        raise Wrong("没有抓住 β 乘错了项的：它的损失值与对的一样，只有梯度不同，beta 也别取 1。")
    if not all(caught):
        raise Wrong(f"还漏了一个错的：{_WRONG[caught.index(False)][0]}。")


def _tested(*, values: bool = False, of_z: bool = True, of_e: bool = True, beta: float = 0.25, times: float = 1.0):
    """一个测试：看不看值、看哪几个梯度、beta 取几，都可以换。"""

    def answer(loss: Loss) -> bool:
        z = torch.arange(6.0, dtype=torch.float64).view(2, 3).requires_grad_()
        e = (0.3 * torch.arange(6.0, dtype=torch.float64).view(2, 3) + 1).requires_grad_()
        value = loss(z, e, beta)
        gap = (z - e).detach()
        bad = values and not torch.allclose(value.detach(), (1 + beta) * gap.square().sum())
        got = torch.autograd.grad(value, [z, e], allow_unused=True)
        for grad, truth, wanted in zip(got, (2 * beta * gap * times, -2 * gap * times), (of_z, of_e)):
            bad = bad or (wanted and (grad is None or not torch.allclose(grad, truth)))
        return bool(bad)

    return answer


def _blames_the_unusual(loss: Loss) -> bool:
    return loss is _RIGHT[2] or _tested()(loss)


known_wrong(
    "14.1",
    ("应返回 True 或 False", lambda loss: loss(torch.ones(2, 2), torch.zeros(2, 2), 0.25)),
    ("对谁都说错", lambda loss: True),
    ("对谁都说错", _tested(times=2.0)),
    ("冤枉了第 3 个", _blames_the_unusual),
    ("一个错的也没有抓住", lambda loss: False),
    ("没有抓住 β 乘错了项的", _tested(values=True, of_z=False, of_e=False)),
    ("没有抓住 β 乘错了项的", _tested(beta=1.0)),
    ("漏了一个错的：码本那一项", _tested(of_e=False)),
)


def _entropy(k: Tensor, K: int) -> float:
    p = torch.bincount(k.flatten(), minlength=K).double() / k.numel()
    return float(-torch.xlogy(p, p).sum())


def _dead(k: Tensor, K: int) -> int:
    return K - len(set(k.flatten().tolist()))


@checks("14.2")
def usage_from_entropy(answer: object) -> None:
    """困惑度与死码的个数。"""
    what = "两个数：困惑度，与没有用到的码的个数"
    generator = torch.Generator().manual_seed(142)
    for shape, K, live in (((7, 16), 64, 20), ((400,), 8, 8), ((3, 4, 5), 100, 3), ((30,), 12, 1)):
        k = torch.randint(live, shape, generator=generator) * torch.randint(1, 3, shape, generator=generator) % K
        k = (k + K // 3) % K
        given = k.clone()
        result = ask(answer, given, K)
        if not torch.equal(given, k):
            raise Wrong("你改动了输入：k 后面还要用。")
        got, dead = numbers(result, 2, what)
        truth, where = math.exp(_entropy(k, K)), f"形状 {list(shape)}、K = {K} 时"

        def near(value: float, got: float = got) -> bool:
            return abs(got - value) < 1e-5 * (1 + abs(value))

        if not near(truth):
            if near(_entropy(k, K)):
                raise Wrong(f"{where}第一个数是熵，不是困惑度：还要取指数。")
            if near(2 ** _entropy(k, K)):
                raise Wrong(f"{where}熵用了自然对数，底数却用了 2：两处要一致。")
            if near(math.exp(_entropy(k, K) / math.log(2))):
                raise Wrong(f"{where}熵用了以 2 为底的对数，却取了 e 的指数：两处要一致。")
            if near(1 / truth):
                raise Wrong(f"{where}符号反了：熵是 −Σ p log p。")
            if near(K - _dead(k, K)):
                raise Wrong(f"{where}第一个数是用到的个数：困惑度还管用得匀不匀。")
            if near(truth / K):
                raise Wrong(f"{where}困惑度不必除以 K。")
            raise Wrong(f"{where}困惑度应为 {truth:.4g}，你给出 {got:.4g}；先看看各个码的频率加起来是不是 1。")
        if dead == K - _dead(k, K) != _dead(k, K):
            raise Wrong(f"{where}第二个数是用到的个数，题目要没有用到的。")
        if dead != _dead(k, K):
            raise Wrong(f"{where}没有用到的码应有 {_dead(k, K)} 个，你给出 {dead:g}：号码比用到的最大的还大的，也算。")


def _in_place(k: Tensor, K: int) -> tuple[float, int]:
    found = math.exp(_entropy(k, K)), _dead(k, K)
    k.zero_()
    return found


known_wrong(
    "14.2",
    ("你改动了输入", _in_place),
    ("第一个数是熵", lambda k, K: (_entropy(k, K), _dead(k, K))),
    ("底数却用了 2", lambda k, K: (2 ** _entropy(k, K), _dead(k, K))),
    ("却取了 e 的指数", lambda k, K: (math.exp(_entropy(k, K) / math.log(2)), _dead(k, K))),
    ("符号反了", lambda k, K: (math.exp(-_entropy(k, K)), _dead(k, K))),
    ("第一个数是用到的个数", lambda k, K: (K - _dead(k, K), _dead(k, K))),
    ("不必除以 K", lambda k, K: (math.exp(_entropy(k, K)) / K, _dead(k, K))),
    ("加起来是不是 1", lambda k, K: (2 * math.exp(_entropy(k, K)), _dead(k, K))),
    ("题目要没有用到的", lambda k, K: (math.exp(_entropy(k, K)), K - _dead(k, K))),
    ("也算", lambda k, K: (math.exp(_entropy(k, K)), int((torch.bincount(k.flatten()) == 0).sum()))),
    ("应交两个数", lambda k, K: math.exp(_entropy(k, K))),
)


def _size(levels: Sequence[int], shifted: bool) -> int:
    return math.prod(L if shifted or L % 2 else L - 1 for L in levels)


@checks("14.3")
def codebook_of_fsq(answer: object) -> None:
    """实际用得到的码的个数。"""
    cases = [((8, 5, 4), True), ((7, 5, 5, 5, 5), True), ((7, 5), False), ((8, 8, 8), False), ((8, 5, 4), False), ((3,), False)]
    for levels, shifted in cases:
        got = whole(ask(answer, list(levels), shifted), "一个整数：码的个数")
        where = f"levels = {list(levels)}、{'挪了' if shifted else '没有挪'}半格时"
        if got == _size(levels, shifted):
            continue
        if got == sum(levels) and len(levels) > 1:
            raise Wrong(f"{where}各维的级数要相乘，不是相加：每一维自由地取。")
        if got == math.prod(levels):
            raise Wrong(f"{where}偶数级少了一级：h·tanh 在 (−h, h) 里，取整之后关于 0 对称，只有奇数个。")
        if got == math.prod(L - 1 for L in levels):
            raise Wrong(f"{where}每一维都减了 1：{'挪了半格的一级也不少' if shifted else '奇数级不受影响'}。")
        if got == _size(levels, False):
            raise Wrong(f"{where}一级也不少：挪半格正是为了偶数级。")
        raise Wrong(f"{where}应有 {_size(levels, shifted)} 个，你给出 {got}；先数一维。")


known_wrong(
    "14.3",
    ("不是相加", lambda levels, shifted: sum(levels)),
    ("偶数级少了一级", lambda levels, shifted: math.prod(levels)),
    ("奇数级不受影响", lambda levels, shifted: math.prod(L - (not shifted) for L in levels)),
    ("挪了半格的一级也不少", lambda levels, shifted: math.prod(L - 1 for L in levels)),
    ("挪半格正是为了偶数级", lambda levels, shifted: _size(levels, False)),
    ("先数一维", lambda levels, shifted: 7),
    ("应交一个整数", lambda levels, shifted: float("nan")),
)


@checks("14.4")
def bits_of_a_config(answer: object) -> None:
    """每张图、每个像素多少比特。"""
    what = "两个数：每张图的比特，每个像素的比特"
    for size, factor, levels in ((256, 16, (8, 8, 8, 5, 5, 5)), (32, 8, (4, 4, 4)), (16, 4, (7, 5)), (512, 8, (8, 6, 5))):
        each, pixel = numbers(ask(answer, size, factor, list(levels)), 2, what)
        n, log2_K = (size // factor) ** 2, sum(math.log2(L) for L in levels)
        where = f"size = {size}、factor = {factor}、levels = {list(levels)} 时"

        def near(value: float, got: float = each) -> bool:
            return abs(got - value) < 1e-6 * value

        if not near(n * log2_K):
            if near(n * log2_K * math.log(2)):
                raise Wrong(f"{where}单位是 nat：题目要比特，用以 2 为底的对数。")
            if near(n * math.log2(sum(levels))):
                raise Wrong(f"{where}码本的大小是级数的积，不是和。")
            if near(size // factor * log2_K):
                raise Wrong(f"{where}格数是边长的平方：横竖都缩小了 factor 倍。")
            if near(n * len(levels) * log2_K):
                raise Wrong(f"{where}每格多乘了维数：log₂K 已经把各维加起来了。")
            if near(log2_K):
                raise Wrong(f"{where}这是一格的比特，一张图有 {n} 格。")
            if near(n * math.ceil(log2_K)):
                raise Wrong(f"{where}每格取整到了整数个比特：题目要 log₂K，合起来编码不必取整。")
            raise Wrong(f"{where}每张图应为 {n * log2_K:.6g} 比特，你给出 {each:.6g}；先数格数，再算 log₂K。")
        if not near(n * log2_K / size**2, pixel):
            if near(n * log2_K / (3 * size**2), pixel):
                raise Wrong(f"{where}每个像素的多除了 3：题目一个像素只算一个。")
            raise Wrong(f"{where}每个像素的，是每张图的除以 size²，应为 {n * log2_K / size**2:.4g}，你给出 {pixel:.4g}。")


def _bits(count=lambda n: n**2, per=lambda levels: sum(math.log2(L) for L in levels), pixels=lambda size: size**2):
    """格数、每格的比特、像素数都可以换成写错的。"""

    def answer(size: int, factor: int, levels: list[int]) -> tuple[float, float]:
        whole_image = count(size // factor) * per(levels)
        return whole_image, whole_image / pixels(size)

    return answer


known_wrong(
    "14.4",
    ("单位是 nat", _bits(per=lambda levels: math.log(math.prod(levels)))),
    ("不是和", _bits(per=lambda levels: math.log2(sum(levels)))),
    ("边长的平方", _bits(count=lambda n: n)),
    ("多乘了维数", _bits(per=lambda levels: len(levels) * math.log2(math.prod(levels)))),
    ("这是一格的比特", _bits(count=lambda n: 1)),
    ("不必取整", _bits(per=lambda levels: math.ceil(math.log2(math.prod(levels))))),
    ("先数格数", _bits(count=lambda n: 2 * n**2)),
    ("多除了 3", _bits(pixels=lambda size: 3 * size**2)),
    ("除以 size²", _bits(pixels=lambda size: size)),
    ("应交两个数", lambda size, factor, levels: _bits()(size, factor, levels)[0]),
)
