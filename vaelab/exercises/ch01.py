"""第 01 章“逐行读懂”的练习：检查，以及它认得的错答。"""

import contextlib
import copy
import dis
import inspect
import itertools

import torch
from torch import Tensor

from vaelab.exercises.judging import Unanswered, Wrong, ask, checks, close, finite, known_wrong, listed, number, shown, whole
from vanilla_vae import VanillaVAE, eval_mode


@checks("1.1")
def shapes_of_a_small_model(answer: object) -> None:
    what = " (边长, 维数, [B, C, H, W])，如 (2, 2048, [4, 3, 64, 64])"
    side, features, shape = listed(answer, what, 3)
    side, features, shape = whole(side, what), whole(features, what), [whole(size, what) for size in listed(shape, what)]
    model = VanillaVAE(1, 10, [8, 16], image_size=28).eval()
    with torch.no_grad():
        deepest = model.encoder(torch.zeros(5, 1, 28, 28))
        truth = list(model(torch.zeros(5, 1, 28, 28))[0].shape)
    if side == 14:
        raise Wrong("边长 14 只减半了一次；hidden_dims 有两级，每级减半一次。")
    if side != deepest.shape[-1]:
        raise Wrong(f"最深一级的边长不是 {side}：从 28 出发，每一级减半一次。")
    if features in (16, 16 * side):
        raise Wrong(f"fc_mu 的输入不是 {features} 维：展平要把高和宽都乘进去。")
    if features == 16 * 4:
        raise Wrong("64 = 16·4 是旧写法：把特征图写死成了 2×2。")
    if features != deepest[0].numel():
        raise Wrong(f"fc_mu 的输入不是 {features} 维：它等于末级的通道数乘特征图的高和宽。")
    if len(shape) == 4 and shape[1] == 3:
        raise Wrong("重建的通道数应与输入相同；写死成 3 是错误 3。")
    if shape != truth:
        raise Wrong(f"重建的形状不是 {shown(shape)}：它与喂进去的那批图同形。")


known_wrong(
    "1.1",
    ("应交 (边长", (7, 784, 5, 1, 28, 28)),  # 形状没有括起来
    ("应交 (边长", (3.5, 196, [5, 1, 28, 28])),  # 多减半了一次
    ("14 只减半了一次", (14, 16 * 14 * 14, [5, 1, 28, 28])),
    ("边长不是 2", (2, 64, [5, 1, 28, 28])),  # 旧写法的 2×2
    ("不是 16 维：展平", (7, 16, [5, 1, 28, 28])),
    ("不是 112 维：展平", (7, 16 * 7, [5, 1, 28, 28])),
    ("把特征图写死成了 2×2", (7, 16 * 4, [5, 1, 28, 28])),
    ("不是 392 维：它等于末级", (7, 8 * 7 * 7, [5, 1, 28, 28])),  # 用了第一级的通道数
    ("不是 10 维：它等于末级", (7, 10, [5, 1, 28, 28])),  # 那是输出
    ("写死成 3", (7, 784, [5, 3, 28, 28])),
    ("形状不是 [5, 1, 64, 64]", (7, 784, [5, 1, 64, 64])),
    ("形状不是 [1, 28, 28]", (7, 784, [1, 28, 28])),  # 少了批
)


@checks("1.2")
def linear_layer_as_a_kernel(answer: object) -> None:
    if not callable(answer):
        ask(answer)
    if _loops(answer):
        raise Wrong("题目说不许用循环（推导式也算）：用 view 拆开第一维，再用 permute 换轴，一句就够。")
    generator = torch.Generator().manual_seed(12)
    for channels, side, latent in ((3, 2, 5), (4, 3, 2)):
        weight = torch.randn(channels * side**2, latent, generator=generator, dtype=torch.float64)
        want = [latent, channels, side, side]
        got = finite(ask(answer, weight.clone(), channels, side), f"权重 [L, C, b, b] = {want}")
        if list(got.shape) != want:
            raise Wrong(f"权重应为 [L, C, b, b] = {want}，收到 {list(got.shape)}。")
        z = torch.randn(6, latent, generator=generator, dtype=torch.float64)
        truth = torch.nn.functional.linear(z, weight).reshape(6, channels, side, side)

        def agrees(kernel: Tensor) -> bool:
            return torch.allclose(torch.nn.functional.conv_transpose2d(z[:, :, None, None], kernel), truth, atol=1e-5)

        if agrees(got):
            continue
        if torch.allclose(got.flatten(), weight.flatten(), atol=1e-5):
            raise Wrong("形状对了，数没有跟着走：直接 reshape 不会交换坐标轴，L 在 weight 里是最后一维，要先把它换到最前。")
        if agrees(got.mT):
            raise Wrong("高和宽颠倒了：式(1.2) 里 u 是行，v 是列，v 变得最快。")
        if agrees(got.flip(2, 3)):
            raise Wrong("你把核翻转了：输入是 1×1，盖下的就是核本身，照原样放。")
        raise Wrong("形状对了，输出与全连接层不同；先把第一维拆成 (c, u, v)，顺序是 c 最慢、v 最快，再把 L 换到最前。")


def _loops(function: object, depth: int = 3) -> bool:
    """函数体里，或它调用的同一处定义的函数里，有没有循环或推导式：字节码里有没有往回跳的指令。"""
    codes = [getattr(inspect.unwrap(function), "__code__", None)]  # type: ignore[arg-type]
    names = getattr(function, "__globals__", {})
    for code in codes:
        if code is None:
            continue
        codes += [inner for inner in code.co_consts if inspect.iscode(inner)]
        for step in dis.get_instructions(code):
            if step.opname == "FOR_ITER" or (step.opcode in (*dis.hasjrel, *dis.hasjabs) and step.argval < step.offset):
                return True
        helpers = [names.get(name) for name in code.co_names]
        if depth and any(
            inspect.isfunction(each) and each.__module__ == getattr(function, "__module__", "") and _loops(each, depth - 1) for each in helpers
        ):
            return True
    return False


def _one_column_at_a_time(weight, channels, side):
    return torch.stack([column.reshape(channels, side, side) for column in weight.T])


def _one_weight_at_a_time(weight, channels, side):
    kernel = torch.empty(weight.shape[1], channels, side, side, dtype=weight.dtype)
    row = 0
    while row < len(weight):
        kernel[:, row // side**2, row // side % side, row % side] = weight[row]
        row += 1
    return kernel


def _calls_a_loop(weight, channels, side):
    return _one_column_at_a_time(weight, channels, side)


known_wrong(
    "1.2",
    ("应交权重 [L, C, b, b] = [5, 3, 2, 2]", lambda weight, channels, side: torch.nn.ConvTranspose2d(weight.shape[1], channels, side)),  # 交了层
    ("应为 [L, C, b, b] = [5, 3, 2, 2]，收到 [3, 2, 2, 5]", lambda weight, channels, side: weight.view(channels, side, side, -1)),
    ("直接 reshape 不会交换坐标轴", lambda weight, channels, side: weight.reshape(-1, channels, side, side)),
    ("高和宽颠倒了", lambda weight, channels, side: weight.view(channels, side, side, -1).permute(3, 0, 2, 1)),
    ("核翻转了", lambda weight, channels, side: weight.view(channels, side, side, -1).permute(3, 0, 1, 2).flip(2, 3)),
    ("不许用循环", _one_column_at_a_time),
    ("不许用循环", _one_weight_at_a_time),
    ("不许用循环", _calls_a_loop),
    ("NaN 或无穷", lambda weight, channels, side: weight.view(channels, side, side, -1).permute(3, 0, 1, 2) / 0),
    ("顺序是 c 最慢", lambda weight, channels, side: weight.view(side, side, channels, -1).permute(3, 2, 0, 1)),  # 当成 c 最快
)


@checks("1.3")
def weight_for_another_loss(answer: object) -> None:
    """使我们的损失与对方的（平方误差求和、KL 取平均）同解的 M_N。"""
    generator = torch.Generator().manual_seed(13)
    # D、L、2 两两互质，β 与它们不相干：错成几倍，就认得出错了哪几样
    for beta, channels, side, latent in ((0.3, 3, 5, 7), (1.7, 1, 3, 11)):
        D = channels * side**2
        shape = (2, 5, channels, side, side)
        x, recons = torch.rand(shape, generator=generator, dtype=torch.float64)
        mu = torch.randn(5, latent, generator=generator, dtype=torch.float64)
        recons, mu = recons.requires_grad_(), mu.requires_grad_()
        one = torch.ones((), dtype=torch.float64)
        kld = torch.distributions.kl_divergence(torch.distributions.Normal(mu, one), torch.distributions.Normal(0 * one, one))
        other = 0.5 * (recons - x).square().flatten(1).sum(1).mean() + beta * kld.mean()
        pull, push = torch.autograd.grad(other, (recons, mu), retain_graph=True)
        # 两个损失只差一个倍数：重建那边的倍数已定，KL 那边照样缩放，就得到权重
        ours_pull, ours_push = (torch.autograd.grad(part, at)[0] for part, at in (
            ((recons - x).square().mean(), recons), (kld.sum(1).mean(), mu)))  # fmt: skip
        truth = float((push / ours_push).mean() * (ours_pull / pull).mean())
        got = number(ask(answer, beta, D, latent))

        if got <= 0:
            raise Wrong(f"β={beta}、D={D}、L={latent} 时得到 {got:.4g}：两个损失的两项都取正号，权重不会是 0 或负数。")
        # 差的是 2、D、L、β 的哪个幂次，错的就是哪几样；从错得最少的说起
        guesses = itertools.product((0, -1, 1, -2, -3), (0, 1, 2, -1), (0, 1, 2, -1), (0, -1, 1))
        for twos, by_D, by_L, by_beta in sorted(guesses, key=lambda powers: sum(map(abs, powers))):
            guess = truth * 2.0**twos * D**by_D * latent**by_L * beta**by_beta
            if abs(got - guess) < 1e-5 * guess:
                slips = [HALF.get(twos, ""), FACTOR_D.get(by_D, ""), FACTOR_L.get(by_L, ""), BETA.get(by_beta, "")]
                break
        else:
            raise Wrong(f"β={beta}、D={D}、L={latent} 时 {got:.4g} 不对：让两项各自的倍数相同，即 损失_对方 = 常数 × 损失_我们。")
        if any(slips):
            raise Wrong("；".join(slip for slip in slips if slip) + "。")


HALF = dict.fromkeys((-1, 1, -2, -3), "差 2 的倍数：对方的平方误差前有 ½，先把整个损失乘 2，再除以 D")
FACTOR_D = {
    1: "忘了 D：对方对像素求和，我们的 MSE 对像素取平均，差 D 倍",
    2: "D 用反了：平方误差之和 = D·MSE，要把整个损失除以 D，KL 那一项也跟着除",
    -1: "D 多除了一次：平方误差之和 = D·MSE，只差一个 D",
}
FACTOR_L = {
    1: "忘了 L：对方的 KL 对隐变量取平均，我们的是求和，差 L 倍",
    2: "L 用反了：平均 = 总和 ÷ L，权重要除以 L，不是乘",
    -1: "L 多除了一次：平均 = 总和 ÷ L，只差一个 L",
}
BETA = {-1: "忘了 β：对方的 KL 前有它", 1: "β 多乘了一次"}


known_wrong(
    "1.3",
    ("应交一个数", lambda beta, D, L: "2·β/(D·L)"),
    ("差 2 的倍数", lambda beta, D, L: beta / (D * L)),
    ("忘了 L", lambda beta, D, L: 2 * beta / D),
    ("忘了 L", lambda beta, D, L: beta / D),
    ("L 用反了", lambda beta, D, L: 2 * beta * L / D),
    ("L 用反了", lambda beta, D, L: beta * L / D),
    ("忘了 D", lambda beta, D, L: 2 * beta / L),
    ("忘了 D", lambda beta, D, L: beta / L),
    ("D 用反了", lambda beta, D, L: 2 * beta * D / L),
    ("D 用反了", lambda beta, D, L: beta * D / L),
    ("忘了 D：对方对像素求和，我们的 MSE 对像素取平均，差 D 倍；忘了 L", lambda beta, D, L: beta),  # 照搬对方的 β
    ("差 2 的倍数", lambda beta, D, L: 4 * beta / (D * L)),
    ("忘了 β", lambda beta, D, L: 2 / (D * L)),
    ("D 多除了一次", lambda beta, D, L: 2 * beta / (D * D * L)),
    ("不会是 0 或负数", lambda beta, D, L: -2 * beta / (D * L)),
    ("时 2.3 不对", lambda beta, D, L: 2 + beta),
    ("不是有限的数", lambda beta, D, L: float("nan")),
)


@checks("1.4")
def sampling_leaves_no_trace(answer: object) -> None:
    nn, seen = torch.nn, []  # seen 在模型之外：作答若先复制模型，也看得见

    class Toy(nn.Module):
        latent_dim = 3

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.BatchNorm1d(2))
            self.layers[3].eval()  # 单独冻结的一层
            self.fails = False

        def decode(self, z: Tensor) -> Tensor:
            if self.fails:
                raise RuntimeError("解码中途出错")
            images = self.layers(z)
            seen.append((z.detach(), images.detach().clone(), self.layers[1].training))
            return images

    def state(model: Toy) -> tuple:
        return [module.training for module in model.modules()], [value.clone() for value in model.state_dict().values()]

    def draw(count: int, generator: torch.Generator) -> Tensor:
        seen.clear()
        samples = ask(answer, model, count, generator)
        finite(samples, " decode 的结果")
        if not isinstance(samples, Tensor) or samples.shape != (count, 2):
            raise Wrong(f"应返回 decode 的结果，第一维是 num_samples = {count}，收到 {shown(samples)}。")
        return samples

    model = Toy()
    (modes, values), others = state(model), torch.get_rng_state()
    generator = torch.Generator().manual_seed(14)
    samples = draw(5, generator)
    modes_after, values_after = state(model)
    if samples.requires_grad:
        raise Wrong("样本还带着计算图：用 torch.no_grad()。")
    if any(not torch.equal(a, b) for a, b in zip(values, values_after)):
        raise Wrong("批归一化的运行统计量被改动了：解码时要处于 eval。")
    if not seen:
        raise Wrong("没有调用 decode：样本应由 model.decode 解码得到。")
    if any(training for _, _, training in seen):
        raise Wrong("解码时批归一化还在训练状态：样本会取决于同批的其他样本。")
    if not close(samples, torch.cat([images for _, images, _ in seen]).double()):
        raise Wrong("你返回的与 decode 的结果不同：它给出什么就返回什么，不要再加工。")
    if modes != modes_after:
        stopped = "有的子模块停在了 eval，要逐个恢复" if any(modes_after) else "停在了 eval"
        reason = "单独冻结的层也被打开了，要逐个子模块恢复" if model.layers[3].training else stopped
        raise Wrong(f"训练状态没有恢复原样：{reason}。")
    again = draw(5, torch.Generator().manual_seed(14))
    if not torch.equal(samples, again):
        raise Wrong("同一颗种子，两次样本不同：随机数没有全部来自 generator。")
    if torch.equal(samples, draw(5, generator)):
        raise Wrong("同一个 generator 接着再抽，样本一点没变：随机数没有从 generator 里取。")
    if not torch.equal(torch.get_rng_state(), others):
        raise Wrong("你动了全局的随机源：随机数只该来自 generator，也不要用 torch.manual_seed。")
    draw(20_000, torch.Generator().manual_seed(15))
    z = torch.cat([z for z, _, _ in seen]).double()
    if len(z.unique(dim=0)) < 0.9 * len(z):  # float32 的正态数偶尔也会碰上
        raise Wrong("有的 z 重复了：每个样本的每一维都要各抽各的。")
    if not torch.allclose(z.mean(dim=0), 0 * z[0], atol=0.05):
        raise Wrong("z 的平均不是 0：先验是标准正态 N(0, I)，用 randn。")
    if not torch.allclose(z.T.cov(), torch.eye(3).double(), atol=0.05):
        independent = torch.allclose(z.T.corrcoef(), torch.eye(3).double(), atol=0.05)
        reason = f"z 的标准差约是 {float(z.std()):.2f}，不是 1" if independent else "z 的各维不独立"
        raise Wrong(f"{reason}：先验是标准正态 N(0, I)，每一维各抽一个 randn，不要缩放。")
    if not torch.allclose(z.pow(4).mean(dim=0), torch.tensor(3.0).double(), atol=0.4):  # 正态的四阶矩是 3，均匀是 1.8
        raise Wrong("z 的均值与方差对了，分布却不是正态：先验是标准正态 N(0, I)，用 randn。")
    model.fails = True
    with contextlib.suppress(Wrong, Unanswered):
        ask(answer, model, 5, torch.Generator().manual_seed(14))
    if state(model)[0] != modes:
        raise Wrong("decode 报错时，训练状态没有恢复：恢复要写在 finally 里，或者用 with eval_mode(...)。")


def _prior(model, num_samples, generator):
    return torch.randn(num_samples, model.latent_dim, generator=generator)


@torch.no_grad()
def _forgets_eval(model, num_samples, generator):
    return model.decode(_prior(model, num_samples, generator))


@torch.no_grad()
def _calls_the_layers_itself(model, num_samples, generator):
    with eval_mode(model):
        return model.layers(_prior(model, num_samples, generator))


def _forgets_no_grad(model, num_samples, generator):
    with eval_mode(model):
        return model.decode(_prior(model, num_samples, generator))


@torch.no_grad()
def _copies_but_forgets_eval(model, num_samples, generator):
    return copy.deepcopy(model).decode(_prior(model, num_samples, generator))


@torch.no_grad()
def _clamps(model, num_samples, generator):
    with eval_mode(model):
        return model.decode(_prior(model, num_samples, generator)).clamp(0, 1)


@torch.no_grad()
def _stays_in_eval(model, num_samples, generator):
    return model.eval().decode(_prior(model, num_samples, generator))


@torch.no_grad()
def _restores_only_the_top(model, num_samples, generator):
    training = model.training
    samples = model.eval().decode(_prior(model, num_samples, generator))
    model.training = training
    return samples


@torch.no_grad()
def _trains_everything_after(model, num_samples, generator):
    samples = model.eval().decode(_prior(model, num_samples, generator))
    model.train()
    return samples


@torch.no_grad()
def _forgets_the_generator(model, num_samples, generator):
    with eval_mode(model):
        return model.decode(torch.randn(num_samples, model.latent_dim))


@torch.no_grad()
def _makes_its_own_generator(model, num_samples, generator):
    own = torch.Generator().manual_seed(0)
    with eval_mode(model):
        return model.decode(_prior(model, num_samples, own))


@torch.no_grad()
def _seeds_the_global_source(model, num_samples, generator):
    torch.manual_seed(int(torch.randint(1000, (), generator=generator)))
    with eval_mode(model):
        return model.decode(torch.randn(num_samples, model.latent_dim))


@torch.no_grad()
def _uniform(model, num_samples, generator):
    with eval_mode(model):
        return model.decode(torch.rand(num_samples, model.latent_dim, generator=generator))


@torch.no_grad()
def _one_number_for_every_dimension(model, num_samples, generator):
    with eval_mode(model):
        return model.decode(torch.randn(num_samples, 1, generator=generator).expand(-1, model.latent_dim))


def _prior_made_by(noise):
    @torch.no_grad()
    def sample(model, num_samples, generator):
        with eval_mode(model):
            return model.decode(noise(num_samples, model.latent_dim, generator))

    return sample


@torch.no_grad()
def _restores_without_finally(model, num_samples, generator):
    modes = [(module, module.training) for module in model.modules()]
    samples = model.eval().decode(_prior(model, num_samples, generator))
    for module, training in modes:
        module.training = training
    return samples


known_wrong(
    "1.4",
    ("收到 形状 [5, 3] 的张量", _prior),  # 没有解码
    ("应交 decode 的结果", lambda model, num_samples, generator: model),
    ("还带着计算图", _forgets_no_grad),
    ("运行统计量被改动了", _forgets_eval),
    ("没有调用 decode", _calls_the_layers_itself),
    ("还在训练状态", _copies_but_forgets_eval),
    ("不要再加工", _clamps),
    ("没有恢复原样：停在了 eval", _stays_in_eval),
    ("有的子模块停在了 eval", _restores_only_the_top),
    ("单独冻结的层也被打开了", _trains_everything_after),
    ("随机数没有全部来自 generator", _forgets_the_generator),
    ("没有从 generator 里取", _makes_its_own_generator),
    ("动了全局的随机源", _seeds_the_global_source),
    ("平均不是 0", _uniform),
    ("各维不独立", _one_number_for_every_dimension),
    ("不是正态", _prior_made_by(lambda n, L, g: (torch.rand(n, L, generator=g) * 2 - 1) * 3**0.5)),  # 方差也是 1
    ("重复了", _prior_made_by(lambda n, L, g: torch.randint(0, 2, (n, L), generator=g) * 2.0 - 1)),
    ("重复了", _prior_made_by(lambda n, L, g: torch.randn(1, L, generator=g).expand(n, L))),
    ("标准差约是 0.95", _prior_made_by(lambda n, L, g: 0.95 * torch.randn(n, L, generator=g))),
    ("写在 finally 里", _restores_without_finally),
)
