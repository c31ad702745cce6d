"""第 03 章“解码器”的练习：检查，以及它认得的错答。"""

import torch
from torch import Tensor

from vaelab.exercises.judging import ask, checks, known_wrong, Wrong


@checks("3.1")
def padding_of_a_four_wide_kernel(answer: object) -> None:
    if not isinstance(answer, (tuple, list)) or len(answer) != 2 or not all(type(v) is int for v in answer):
        raise Wrong(f"这里应交两个整数 (padding, output_padding)，收到 {answer!r}。")
    padding, output_padding = answer
    try:
        layer = torch.nn.ConvTranspose2d(1, 1, 4, stride=2, padding=padding, output_padding=output_padding)
        got = [layer(torch.zeros(1, 1, h, h, dtype=layer.weight.dtype)).shape[-1] for h in (3, 8)]
    except Exception as error:
        raise Wrong(
            f"真实的层不接受 padding={padding}、output_padding={output_padding}；"
            "两者都不能为负，output_padding 要小于步长 2，padding 也不能把画布裁光。"
        ) from error
    if got != [6, 16]:
        raise Wrong(
            f"边长 3、8 变成了 {got[0]}、{got[1]}，应为 6、16；核大了 1，画布就大了 1，这一格要在 padding 与 "
            "output_padding 里找回来。"
        )


@checks("3.2")
def transposed_convolution_by_stamps(answer: object) -> None:
    transposed = torch.nn.functional.conv_transpose2d
    generator = torch.Generator().manual_seed(32)
    for height, width, size, stride, padding, extra in (
        (3, 3, 3, 2, 0, 0), (3, 4, 3, 2, 1, 0), (4, 3, 3, 2, 1, 1), (2, 3, 4, 3, 1, 2), (2, 2, 2, 2, 0, 1), (1, 1, 3, 1, 0, 0),
    ):  # fmt: skip
        x = torch.randn(height, width, generator=generator, dtype=torch.float64)
        k = torch.randn(size, size, generator=generator, dtype=torch.float64)
        got = ask(answer, x, k, stride, padding, extra)
        options = {"stride": stride, "padding": padding, "output_padding": extra}
        setting = f"输入 {height}×{width}、核 {size}×{size}、" + "、".join(f"{a}={b}" for a, b in options.items())
        truth = transposed(x[None, None], k[None, None], **options)[0, 0]
        if not isinstance(got, Tensor) or got.dim() != 2:
            raise Wrong("这里应返回二维张量 [H', W']。")
        if got.shape != truth.shape:
            reason = "output_padding 让下边和右边少裁几格" if extra else "画布边长是 (H−1)·stride+K，两边各裁 padding 格"
            raise Wrong(f"{setting}：输出应为 {list(truth.shape)}，收到 {list(got.shape)}；{reason}。")
        got = got.to(torch.float64)
        if torch.allclose(got, truth, atol=1e-6):
            continue
        if torch.allclose(got, transposed(x[None, None], k.flip(0, 1)[None, None], **options)[0, 0], atol=1e-6):
            raise Wrong(f"{setting}：你把核翻转了；翻转属于插零的写法，盖章时核照原样盖。")
        if torch.allclose(got, transposed(x[None, None], k.T[None, None], **options)[0, 0], atol=1e-6):
            raise Wrong(f"{setting}：你把核的行与列弄反了。")
        if stride < size and torch.allclose(got[0, 0], truth[0, 0], atol=1e-6):
            raise Wrong(f"{setting}：形状对了，左上角也对，重叠的地方不对；重叠处应相加（+=），而不是覆盖（=）。")
        raise Wrong(f"{setting}：形状对了，数不对；逐个像素核对章的左上角在画布的第 i·stride 行、第 j·stride 列。")


@checks("3.3")
def bilinear_kernel(answer: object) -> None:
    try:
        k = torch.as_tensor(answer, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise Wrong(f"这里应交一个 4×4 的张量，收到 {type(answer).__name__}。") from error
    if k.shape != (4, 4):
        raise Wrong(f"核应为 4×4，收到 {list(k.shape)}；由一维的核可以用 torch.outer 得到二维的。")
    functional = torch.nn.functional

    def enlarge(x: Tensor) -> Tensor:
        return functional.conv_transpose2d(x, k[None, None], stride=2, padding=1)[..., 4:-4, 4:-4]

    flat = enlarge(torch.ones(1, 1, 8, 8, dtype=torch.float64))
    if flat.max() - flat.min() > 1e-6:
        raise Wrong("常数图放大后出现了棋盘格：核的四个相位之和不相等，见式(3.9)。")
    if abs(float(flat[0, 0, 0, 0]) - 1) > 1e-6:
        raise Wrong(
            f"常数图 1 放大后变成了 {float(flat[0, 0, 0, 0]):.4g}；步长 2 时每格只收到核的四个相位之一，"
            "所以要归一的是每一相的和，不是整个核的和。"
        )
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(33), dtype=torch.float64)
    truth = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)[..., 4:-4, 4:-4]
    nearest = functional.interpolate(x, scale_factor=2, mode="nearest")[..., 4:-4, 4:-4]
    if torch.allclose(enlarge(x), nearest, atol=1e-6):
        raise Wrong("这是最近邻放大：没有棋盘格，但每个输出只看了一个输入；双线性要看两个邻居，权重由距离定。")
    if not torch.allclose(enlarge(x), truth, atol=1e-6):
        raise Wrong(
            "没有棋盘格，但插值的权重不对：输出像素 2i 的中心在 i−¼，它离 i 和 i−1 各多远，权重就反着分；"
            "再想想这两个权重各在核的第几个位置。"
        )


@checks("3.4")
def best_noise_variance(answer: object) -> None:
    generator = torch.Generator().manual_seed(34)
    x = torch.rand(3, 2, 4, 5, generator=generator, dtype=torch.float64) * 2 - 1
    x_hat = x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    got = ask(answer, x, x_hat)
    try:
        value = float(got)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Wrong("这里应返回一个数：一批图像共用一个 σ²。") from error
    if not 0 < value < float("inf"):
        raise Wrong(f"方差应是正数，收到 {value:.4g}。")

    def is_stationary(variance: float) -> bool:
        log_variance = torch.tensor(variance, dtype=torch.float64).log().requires_grad_()
        density = torch.distributions.Normal(x_hat, (0.5 * log_variance).exp())
        density.log_prob(x).mean().backward()
        return abs(float(log_variance.grad)) < 1e-6

    if is_stationary(value):
        return
    if is_stationary(value**2):
        raise Wrong("你给出的是标准差 σ，题目要的是方差 σ²。")
    if is_stationary(value / x.numel()) or is_stationary(value / x[0].numel()):
        raise Wrong("你只求了平方误差的和；D/2·log σ² 对 σ² 的导数带着 D，别忘了除以它。")
    if is_stationary(2 * value) or is_stationary(value / 2):
        raise Wrong("差一个 2 倍：第一项的分母 2σ² 与第二项的 D/2 里各有一个 2，求导后应当约掉。")
    raise Wrong(f"σ² = {value:.4g} 处，−log p 对 σ² 的导数不为零；从式(3.12) 对 σ² 求导，令它为零。")
