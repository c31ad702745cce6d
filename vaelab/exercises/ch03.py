"""第 03 章“解码器”的练习：检查，以及它认得的错答。"""

import math
import sys
from types import FrameType

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vaelab.exercises.judging import Wrong, ask, checks, finite, known_wrong, listed, number, whole


@checks("3.1")
def padding_of_a_four_wide_kernel(answer: object) -> None:
    """核为 4、步长为 2 时，使边长恰好加倍的 (padding, output_padding)。"""
    what = "两个整数 (padding, output_padding)"
    padding, output_padding = (whole(value, what) for value in listed(answer, what, 2))
    try:
        layer = torch.nn.ConvTranspose2d(1, 1, 4, stride=2, padding=padding, output_padding=output_padding)
        got = [layer(torch.zeros(1, 1, h, h, dtype=layer.weight.dtype)).shape[-1] for h in (3, 8)]
    except Exception as error:
        raise Wrong(
            f"真实的层不接受 padding={padding}、output_padding={output_padding}；"
            "两者都不能为负，output_padding 要小于步长 2，padding 也不能把画布裁光。"
        ) from error
    if got != [6, 16]:
        raise Wrong(f"边长 3、8 变成了 {got[0]}、{got[1]}，应为 6、16；核大了 1，画布就大了 1，这一格要在 padding 与 output_padding 里找回来。")


known_wrong(
    "3.1",
    ("应交两个整数", 1),  # 只交了 padding
    ("收到 0.5", (0.5, -1)),
    ("真实的层不接受 padding=0、output_padding=-2", (0, -2)),  # 这三组都满足 o = 2p − 2
    ("真实的层不接受 padding=2、output_padding=2", (2, 2)),
    ("真实的层不接受 padding=5、output_padding=8", (5, 8)),
    ("真实的层不接受 padding=5、output_padding=0", (5, 0)),  # 裁光
    ("变成了 7、17", (1, 1)),  # 照抄核为 3 的
    ("变成了 8、18", (0, 0)),
    ("变成了 5、15", (2, 1)),  # 两样都加 1
)


class _Functions(TorchFunctionMode):
    """记下调用过的卷积函数：torch.conv2d、F.conv_transpose2d、由它们造的层。"""

    def __init__(self, called: list[str]) -> None:
        super().__init__()
        self.called = called

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        self.called += [name] * ("conv" in name)
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """记下调用过的卷积算子：torch.ops.aten.convolution，与卷积的反向。"""

    def __init__(self, called: list[str]) -> None:
        super().__init__()
        self.called = called

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.called += [name] * ("conv" in name)
        return function(*args, **(kwargs or {}))


class Convolutions:
    """在 with 之内，记下调用过的卷积函数，不论是 torch 的，还是 numpy 与 scipy 的。"""

    def __init__(self) -> None:
        self.called: list[str] = []

    def _python(self, frame: FrameType, event: str, argument: object) -> None:
        library, name = frame.f_globals.get("__name__", "").partition(".")[0], frame.f_code.co_name
        if event == "call" and library in ("numpy", "scipy") and "conv" in name and not name.startswith("_"):
            self.called.append(name)

    def __enter__(self) -> "Convolutions":
        self.modes, self.before = (_Functions(self.called), _Operators(self.called)), sys.getprofile()
        for mode in self.modes:
            mode.__enter__()
        sys.setprofile(self._python)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(self.before)
        for mode in reversed(self.modes):
            mode.__exit__(*error)


@checks("3.2")
def transposed_convolution_by_stamps(answer: object) -> None:
    transposed = F.conv_transpose2d
    generator = torch.Generator().manual_seed(32)
    for height, width, size, stride, padding, extra in (
        (3, 3, 3, 2, 0, 0), (3, 4, 3, 2, 1, 0), (4, 3, 3, 2, 1, 1), (2, 3, 4, 3, 1, 2), (2, 2, 2, 2, 0, 1), (1, 1, 3, 1, 0, 0),
    ):  # fmt: skip
        x = torch.randn(height, width, generator=generator, dtype=torch.float64)
        k = torch.randn(size, size, generator=generator, dtype=torch.float64)
        try:
            with Convolutions() as convolutions:
                reply = ask(answer, x.clone(), k.clone(), stride, padding, extra)
        finally:
            if convolutions.called:  # 调用之后出了错，要紧的也是调用了它
                raise Wrong(f"你调用了卷积函数 {convolutions.called[0]}；题目要自己盖章。")
        options = {"stride": stride, "padding": padding, "output_padding": extra}
        setting = f"输入 {height}×{width}、核 {size}×{size}、" + "、".join(f"{a}={b}" for a, b in options.items())
        got = finite(reply, "二维张量 [H', W']")

        def stamped(x: Tensor, k: Tensor, **changed: int) -> Tensor:
            return transposed(x[None, None], k[None, None], **options | changed)[0, 0]

        truth = stamped(x, k)
        if got.dim() != 2:
            raise Wrong(f"这里应返回二维张量 [H', W']，收到 {list(got.shape)}。")
        if got.shape != truth.shape:
            reason = "output_padding 让下边和右边少裁几格" if extra else "画布边长是 (H−1)·stride+K，两边各裁 padding 格"
            reason = "output_padding 大于 padding，画布本身不够大，要先加宽" if extra > padding else reason
            raise Wrong(f"{setting}：输出应为 {list(truth.shape)}，收到 {list(got.shape)}；{reason}。")

        def is_like(other: Tensor) -> bool:
            return torch.allclose(got, other, atol=1e-5)

        if is_like(truth):
            continue
        if is_like(stamped(x, k.flip(0, 1))):
            raise Wrong(f"{setting}：你把核翻转了；翻转属于插零的写法，盖章时核照原样盖。")
        if is_like(stamped(x, k.T)):
            raise Wrong(f"{setting}：你把核的行与列弄反了。")
        if height == width and is_like(stamped(x.T, k)):
            raise Wrong(f"{setting}：每枚章都对，盖的地方行列颠倒了：x[i, j] 的章，上边在第 i·stride 行，左边在第 j·stride 列。")
        if is_like(stamped(torch.ones_like(x), k)):
            raise Wrong(f"{setting}：每枚章都一样重；章要乘上那个像素的值 x[i, j]。")
        stamps = stamped(torch.ones_like(x), torch.ones_like(k))  # 每格盖了几次
        if is_like(truth / stamps.clamp(min=1)):
            raise Wrong(f"{setting}：重叠的地方你取了平均；应当直接相加，不除以盖的次数。")
        if torch.allclose(got[stamps < 2], truth[stamps < 2], atol=1e-5):
            raise Wrong(f"{setting}：形状对了，左上角也对，重叠的地方不对；重叠处应相加（+=），而不是覆盖（=）。")
        if is_like(F.pad(stamped(x, k, output_padding=0), (0, extra, 0, extra))):
            raise Wrong(f"{setting}：你在下边和右边补了 0；output_padding 是少裁，露出的是画布上真实的内容。")
        if is_like(stamped(x.flip(0, 1), k.flip(0, 1)).flip(0, 1)):
            raise Wrong(f"{setting}：少裁的 {extra} 格应在下边和右边，你留在了上边和左边。")
        raise Wrong(f"{setting}：形状对了，数不对；逐个像素核对章的左上角在画布的第 i·stride 行、第 j·stride 列。")


def _stamps(x, k, stride, padding, output_padding, *, spread=0, pitch=None, add=True, early=0):
    """盖章，可以错在几处：画布加宽 ``spread`` 格，章距 ``pitch``，不相加而覆盖，裁的时候挪早 ``early`` 格。"""
    height, width = ((n - 1) * stride + len(k) for n in x.shape)
    pitch = pitch or stride
    canvas = torch.zeros(height + spread, width + spread)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            place = canvas[i * pitch : i * pitch + len(k), j * pitch : j * pitch + len(k)]
            place.copy_(x[i, j] * k + place * add)
    cut, rest = padding - early, output_padding - padding - early
    return canvas[cut : height + rest, cut : width + rest]


def _zeros_for_output_padding(x, k, stride, padding, output_padding):
    return F.pad(_stamps(x, k, stride, padding, 0), (0, output_padding, 0, output_padding))


def _layer(x, k, stride, padding, output_padding):
    layer = torch.nn.ConvTranspose2d(1, 1, len(k), stride, padding, output_padding, bias=False)
    layer.weight.data = k[None, None]
    return layer(x[None, None])[0, 0].detach()


def _input_shape(x, k, stride, padding, output_padding):
    return (1, 1, *((n - 1) * stride + len(k) - 2 * padding + output_padding for n in x.shape))


def _operator(x, k, stride, padding, output_padding):
    sizes = ([n, n] for n in (stride, padding, 1))
    return torch.ops.aten.convolution(x[None, None], k[None, None], None, *sizes, True, [output_padding] * 2, 1)[0, 0]


def _averaged(x, k, stride, padding, output_padding, least=1):
    options = {"spread": output_padding}
    times = _stamps(torch.ones_like(x), torch.ones_like(k), stride, padding, output_padding, **options)
    return _stamps(x, k, stride, padding, output_padding, **options) / times.clamp(min=least)


known_wrong(
    "3.2",
    ("卷积函数 conv_transpose2d", lambda x, k, s, p, o: F.conv_transpose2d(x[None, None], k[None, None], None, s, p, o)[0, 0]),
    ("卷积函数 conv_transpose2d", lambda x, k, s, p, o: _layer(x, k, s, p, o)),
    ("卷积函数 conv_transpose2d", lambda x, k, s, p, o: F.conv_transpose2d(x, k)),  # 还出了错
    ("卷积函数 conv", lambda x, k, s, p, o: torch.nn.grad.conv2d_input(_input_shape(x, k, s, p, o), k[None, None], x[None, None], s, p)[0, 0]),
    ("卷积函数 convolution", lambda x, k, s, p, o: _operator(x, k, s, p, o)),
    ("卷积函数 convolve", lambda x, k, s, p, o: np.convolve(x.flatten().numpy(), k.flatten().numpy())),
    ("应交二维张量", lambda x, k, s, p, o: "画布"),
    ("收到 [1, 1, 7, 7]", lambda x, k, s, p, o: _stamps(x, k, s, p, o, spread=o)[None, None]),
    ("画布边长是", lambda x, k, s, p, o: _stamps(x, k, s, 0, o, spread=o)),  # 没有裁
    ("少裁几格", lambda x, k, s, p, o: _stamps(x, k, s, p, 0)),  # 没有理会 output_padding
    ("要先加宽", _stamps),
    ("把核翻转了", lambda x, k, s, p, o: _stamps(x, k.flip(0, 1), s, p, o, spread=o)),
    ("行列颠倒", lambda x, k, s, p, o: _stamps(x.T, k, s, p, o, spread=o)),
    ("每枚章都一样重", lambda x, k, s, p, o: _stamps(torch.ones_like(x), k, s, p, o, spread=o)),
    ("取了平均", lambda x, k, s, p, o: _averaged(x, k, s, p, o)),
    ("NaN", lambda x, k, s, p, o: _averaged(x, k, s, p, o, least=0) * torch.nan),
    ("数不对", lambda x, k, s, p, o: 2 * _stamps(x, k, s, p, o, spread=o)),
    ("行与列弄反了", lambda x, k, s, p, o: _stamps(x, k.T, s, p, o, spread=o)),
    ("而不是覆盖", lambda x, k, s, p, o: _stamps(x, k, s, p, o, spread=o, add=False)),
    ("露出的是画布上真实的内容", _zeros_for_output_padding),
    ("你留在了上边和左边", lambda x, k, s, p, o: _stamps(x, k, s, p, o, spread=o, early=o)),
    ("逐个像素核对", lambda x, k, s, p, o: _stamps(x, k, s, p, o, spread=o, pitch=1)),  # 章距忘了乘步长
)


@checks("3.3")
def bilinear_kernel(answer: object) -> None:
    """使步长 2、填充 1 的转置卷积等于双线性放大的 4×4 核。"""
    k = finite(answer, "一个 4×4 的张量")
    if k.shape != (4, 4):
        raise Wrong(f"核应为 4×4，收到 {list(k.shape)}；由一维的核可以用 torch.outer 得到二维的。")

    def enlarge(x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, k[None, None], stride=2, padding=1)[..., 4:-4, 4:-4]

    flat = enlarge(torch.ones(1, 1, 8, 8, dtype=torch.float64))
    if flat.max() - flat.min() > 1e-5:
        raise Wrong("常数图放大后出现了棋盘格：核的四个相位之和不相等，见式(3.9)。")
    if abs(float(flat[0, 0, 0, 0]) - 1) > 1e-5:
        raise Wrong(
            f"常数图 1 放大后变成了 {float(flat[0, 0, 0, 0]):.4g}；步长 2 时每格只收到核的四个相位之一，所以要归一的是每一相的和，不是整个核的和。"
        )
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(33), dtype=torch.float64)
    truth = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)[..., 4:-4, 4:-4]
    nearest = F.interpolate(x, scale_factor=2, mode="nearest")[..., 4:-4, 4:-4]
    corners = F.pad(torch.outer(*[torch.tensor([0.5, 1, 0.5], dtype=torch.float64)] * 2), (0, 1, 0, 1))
    if any(torch.allclose(k, each, atol=1e-5) for each in (corners, corners.flip(0, 1))):
        raise Wrong("这是引子里那个 3×3 的核，补了一圈 0：它放大时像素的中心对着中心（align_corners=True）；这里的中心错开四分之一格，要用满 4×4。")
    if torch.allclose(enlarge(x), nearest, atol=1e-5):
        raise Wrong("这是最近邻放大：没有棋盘格，但每个输出只看了一个输入；双线性要看两个邻居，权重由距离定。")
    if not torch.allclose(enlarge(x), truth, atol=1e-5):
        raise Wrong(
            "没有棋盘格，但插值的权重不对：输出像素 2i 的中心在 i−¼，它离 i 和 i−1 各多远，权重就反着分；再想想这两个权重各在核的第几个位置。"
        )


def _square(*line: float) -> Tensor:
    return torch.outer(torch.tensor(line), torch.tensor(line))


known_wrong(
    "3.3",
    ("应交一个 4×4 的张量", "双线性"),
    ("核应为 4×4，收到 [4]", torch.tensor([0.25, 0.75, 0.75, 0.25])),
    ("出现了棋盘格", _square(0.75, 0.25, 0.75, 0.25)),  # 两个输出的权重依次排下来
    ("放大后变成了 0.25", _square(1, 3, 3, 1) / 64),  # 总和归一
    ("放大后变成了 16", _square(1, 3, 3, 1)),  # 没有归一
    ("最近邻放大", _square(0, 1, 1, 0)),
    ("引子里那个 3×3 的核", _square(0.5, 1, 0.5, 0)),
    ("引子里那个 3×3 的核", _square(0, 0.5, 1, 0.5)),
    ("NaN", torch.full((4, 4), torch.nan)),
    ("出现了棋盘格", torch.arange(16.0).reshape(4, 4)),
    ("放大后变成了 0", torch.zeros(4, 4)),
    ("插值的权重不对", _square(0.75, 0.25, 0.25, 0.75)),  # 权重没有反着分
    ("插值的权重不对", _square(0.5, 0.5, 0.5, 0.5)),  # 两个邻居平分
)


@checks("3.4")
def best_noise_variance(answer: object) -> None:
    """固定重建，使负对数似然最小的 σ²。"""
    generator = torch.Generator().manual_seed(34)
    for shape in ((3, 5, 7, 11), (4, 1, 13, 6)):  # 每个长度的比都不是 2，漏掉哪一个都认得出
        x = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
        x_hat = x + 0.1 + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)  # 平均也偏了，方差不是答案
        _best_noise_variance(answer, x, x_hat)


def _best_noise_variance(answer: object, x: Tensor, x_hat: Tensor) -> None:
    value = number(ask(answer, x.clone(), x_hat.clone()), "一个数：一批图像共用一个 σ²")

    def is_stationary(*variances: float) -> bool:
        # 大得或小得离谱的数，梯度是 NaN，不等于零；Normal 不必为它报错
        log_variance = torch.tensor(variances, dtype=torch.float64).log().requires_grad_()
        scale = (0.5 * log_variance).exp()[:, None, None, None, None]
        density = torch.distributions.Normal(x_hat, scale, validate_args=False).log_prob(x)
        (slope,) = torch.autograd.grad(density.mean(dim=(1, 2, 3, 4)).sum(), log_variance)
        return bool((slope.abs() < 1e-5).any())

    if is_stationary(math.exp(min(value, 700.0))):
        raise Wrong("你给出的是 log σ²；题目要的是 σ² 本身。")
    if value <= 0:
        raise Wrong(f"方差应是正数，收到 {value:.4g}。")
    images, channels, height, width = x.shape
    pixels = x[0].numel()
    if is_stationary(value):
        return
    if is_stationary(value * value):
        raise Wrong("你给出的是标准差 σ，题目要的是方差 σ²。")
    if is_stationary(1 / value):
        raise Wrong("你给出的是 1/σ²（精度）；令导数为零，σ² 在分母上，解出来要倒过来。")
    if is_stationary(value / x.numel()):
        raise Wrong("你只求了平方误差的和；D/2·log σ² 对 σ² 的导数带着 D，一批 B 张就是 BD，别忘了除以它。")
    if is_stationary(value / pixels):
        raise Wrong("每张图的平方误差求了和，再对 B 张取平均，只除以了 B；D/2·log σ² 对 σ² 的导数带着 D，还要除以 D。")
    if is_stationary(value / images):
        raise Wrong("大了 B 倍：分子是整批的平方误差之和，第二项也要加 B 次，该除以 BD。")
    if is_stationary(value * images):
        raise Wrong("小了 B 倍：多除了一次 B；分子、分母里的 B 应当正好各出现一次。")
    if is_stationary(value / channels, value / (height * width)):
        raise Wrong("D = C·H·W 没有数全：除的时候，通道、高、宽三样都要算进去。")
    if is_stationary(2 * value, value / 2):
        raise Wrong("差一个 2 倍：第一项的分母 2σ² 与第二项的 D/2 里各有一个 2，求导后应当约掉。")
    error = x - x_hat
    if math.isclose(value, float(error[0].square().mean()), rel_tol=1e-4):
        raise Wrong("你只用了第一张图；一批图共用一个 σ²，B 张的平方误差都要算进来。")
    if any(math.isclose(value, float(error.var(correction=c)), rel_tol=1e-4) for c in (0, 1)):
        raise Wrong("你减去了误差的平均；式(3.12) 里的平方误差是对 x̂ 的，误差的平均若不为零，也要算进去。")
    raise Wrong(f"σ² = {value:.4g} 处，−log p 对 σ² 的导数不为零；从式(3.12) 对 σ² 求导，令它为零。")


known_wrong(
    "3.4",
    ("一批图像共用一个 σ²，收到 形状 [3] 的张量", lambda x, x_hat: (x - x_hat).square().mean(dim=(1, 2, 3))),  # 每张图一个
    ("不是有限的数", lambda x, x_hat: (x - x_hat).sqrt().mean()),  # 平方写成了开方
    ("方差应是正数", lambda x, x_hat: -(x - x_hat).square().mean()),
    ("log σ²", lambda x, x_hat: (x - x_hat).square().mean().log()),
    ("精度", lambda x, x_hat: 1 / (x - x_hat).square().mean()),
    ("小了 B 倍", lambda x, x_hat: (x - x_hat).square().mean() / len(x)),
    ("没有数全", lambda x, x_hat: (x - x_hat).square().sum() / (len(x) * x.shape[2] * x.shape[3])),
    ("没有数全", lambda x, x_hat: (x - x_hat).square().sum(dim=(2, 3)).mean()),
    ("只用了第一张图", lambda x, x_hat: (x - x_hat)[0].square().mean()),
    ("标准差 σ", lambda x, x_hat: (x - x_hat).square().mean().sqrt()),
    ("只求了平方误差的和", lambda x, x_hat: (x - x_hat).square().sum()),
    ("只除以了 B", lambda x, x_hat: (x - x_hat).square().sum(dim=(1, 2, 3)).mean()),
    ("大了 B 倍", lambda x, x_hat: (x - x_hat).square().sum() / x[0].numel()),
    ("差一个 2 倍", lambda x, x_hat: (x - x_hat).square().mean() / 2),
    ("差一个 2 倍", lambda x, x_hat: 2 * (x - x_hat).square().mean()),
    ("减去了误差的平均", lambda x, x_hat: (x - x_hat).var()),
    ("导数不为零", lambda x, x_hat: (x - x_hat).abs().mean()),
)
