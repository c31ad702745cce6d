"""第 02 章“编码器”的练习：检查，以及它认得的错答。"""

from numbers import Integral

import torch
from torch import Tensor

from vaelab.exercises.judging import ask, checks, known_wrong, Wrong


@checks("2.1")
def sizes_of_five_levels(answer: object) -> None:
    if isinstance(answer, Tensor):
        answer = answer.tolist()
    if not isinstance(answer, (list, tuple)) or not all(isinstance(size, Integral) for size in answer):
        raise Wrong(f"应交一个整数列表，如 [64, 32, …]，收到 {answer!r}。")
    halve = torch.nn.Conv2d(1, 1, 3, stride=2, padding=1)
    image, truth = torch.zeros(1, 1, 100, 100), []
    for _ in range(5):
        image = halve(image)
        truth.append(image.shape[-1])
    given = list(answer)
    if given == [100, *truth] or given == [100, *truth[:-1]]:
        raise Wrong("列表从第 1 级的输出写起，不含输入的 100，共五个数。")
    if len(given) != 5:
        raise Wrong(f"五级应有五个数，收到 {len(given)} 个。")
    if given == [100 // 2**level for level in range(1, 6)]:
        raise Wrong("你每级都向下取整了；边长为奇数时，填充的一圈让窗口多停一次，看看 25 的下一级。")
    if given != truth:
        first = next(level for level in range(5) if given[level] != truth[level])
        raise Wrong(f"第 {first + 1} 级的 {given[first]} 不对；把上一级的边长代入尺寸公式再算一次。")


@checks("2.2")
def padding_that_keeps_the_size(answer: object) -> None:
    for k, d in [(3, 1), (1, 1), (5, 1), (3, 2), (5, 3), (7, 2)]:
        reply = ask(answer, k, d)
        try:
            padding = float(reply)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError) as error:
            raise Wrong(f"k={k}、d={d} 时填充应为不小于 0 的整数，收到 {reply!r}。") from error
        if not padding.is_integer() or padding < 0:
            raise Wrong(f"k={k}、d={d} 时填充应为不小于 0 的整数，收到 {reply!r}。")
        size = torch.nn.functional.conv2d(
            torch.zeros(1, 1, 25, 25), torch.zeros(1, 1, k, k), padding=int(padding), dilation=d
        ).shape[-1]
        if size == 25:
            continue
        if d > 1 and padding == k // 2:
            raise Wrong(f"k={k}、d={d} 时 25 变成了 {size}：你忘了膨胀，窗口盖住的不是 k 格，而是 d(k−1)+1 格。")
        if size > 25 and padding == d * (k - 1):
            raise Wrong(f"k={k}、d={d} 时 25 变成了 {size}：填充是左右各一份，总量要平分到两边。")
        raise Wrong(f"k={k}、d={d} 时你填充 {padding:g}，真的卷积把 25 变成了 {size}，应仍是 25。")


@checks("2.3")
def receptive_field(answer: object) -> None:
    def touched(unit: int, layers: list) -> tuple[int, int]:  # 逐级列出用到的每一个单元，不用递推式
        units = {unit}
        for k, s, p, d in reversed(layers):
            units = {s * i + d * u - p for i in units for u in range(k)}
        return min(units), max(units)

    down = (3, 2, 1, 1)
    mixed = [(5, 1, 2, 1), (3, 2, 0, 2), (4, 3, 1, 1)]
    for unit, layers in [(0, [down]), (3, [down]), (0, [down] * 5), (1, [down] * 5), (2, mixed), (5, mixed[::-1])]:
        got, truth = ask(answer, unit, list(layers)), touched(unit, layers)
        where = f"unit={unit}、layers={list(layers)} 时"
        try:
            first, last = (int(end) for end in got)
        except (TypeError, ValueError) as error:
            raise Wrong(f"应返回两个整数 (first, last)，收到 {got!r}。") from error
        if (first, last) == truth:
            continue
        if first >= 0 > truth[0]:
            raise Wrong(f"{where}视野从图外开始，first 应为负数，你给出 {first}；是不是忘了减填充 p，或按边界裁剪了？")
        if (first, last) == touched(unit, [(k, s, 0, d) for k, s, p, d in layers]):
            raise Wrong(f"{where}长度对，位置偏了 {first - truth[0]} 像素：每级的填充把起点往左移 p 个上一级的单元。")
        if (first, last) == touched(unit, layers[::-1]):
            raise Wrong(f"{where}结果像是把各级倒着走了：应从最后一级往图像的方向，一级一级推回去。")
        if last - first != truth[1] - truth[0]:
            raise Wrong(f"{where}视野长 {last - first + 1}，应为 {truth[1] - truth[0] + 1}；窗口的最后一格是 s·i − p + d·(k−1)。")
        raise Wrong(f"{where}长度对，起点 {first} 不对；检查步长与填充。")


@checks("2.4")
def slope_of_the_kl_in_log_std(answer: object) -> None:
    log_std = torch.tensor([-3.0, -0.5, 0.0, 0.4, 1.0], dtype=torch.float64, requires_grad=True)
    q = torch.distributions.Normal(torch.full_like(log_std, 0.7), log_std.exp())
    p = torch.distributions.Normal(torch.zeros_like(log_std), torch.ones_like(log_std))
    (truth,) = torch.autograd.grad(torch.distributions.kl_divergence(q, p).sum(), log_std)
    given = log_std.detach()
    try:
        got = torch.as_tensor(ask(answer, given.clone()), dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Wrong("应返回与 log_std 同形的张量。") from error

    def is_like(other: Tensor) -> bool:
        return torch.allclose(got, other, atol=1e-8)

    if got.shape != truth.shape:
        raise Wrong(f"应返回与 log_std 同形的张量 {list(truth.shape)}，收到 {list(got.shape)}。")
    if is_like(truth):
        return
    if is_like(truth / 2):
        raise Wrong("差了一倍：这是对 log σ² 的导数。log σ² = 2t，链式法则还要乘 2。")
    if is_like(truth / given.exp()):
        raise Wrong("这是对 σ 的导数；还要乘 ∂σ/∂t = σ。")
    if is_like(-truth):
        raise Wrong("符号反了：σ 比 1 大时 KL 随 t 增大，导数应为正。")
    if not torch.isclose(got[2], truth[2], atol=1e-8):
        raise Wrong(f"t = 0 时 q 与先验等宽，导数应为 0，你给出 {got[2]:.3g}。")
    worst = int((got - truth).abs().argmax())
    raise Wrong(f"t = {given[worst]:.1f} 时你给出 {got[worst]:.4g}，autograd 给出 {truth[worst]:.4g}。")
