"""第 01 章“逐行读懂”的练习：检查，以及它认得的错答。"""

import torch
from torch import Tensor

from vaelab.exercises.judging import ask, checks, known_wrong, Wrong
from vanilla_vae import VanillaVAE


@checks("1.1")
def shapes_of_a_small_model(answer: object) -> None:
    try:
        side, features, shape = answer  # type: ignore[misc]
        side, features, shape = int(side), int(features), [int(n) for n in shape]
    except (TypeError, ValueError) as error:
        raise Wrong(f"这里应交 (边长, 维数, [B, C, H, W])，如 (2, 2048, [4, 3, 64, 64])，收到 {answer!r}。") from error
    model = VanillaVAE(1, 10, [8, 16], image_size=28).eval()
    with torch.no_grad():
        deepest = model.encoder(torch.zeros(5, 1, 28, 28))
        truth = list(model(torch.zeros(5, 1, 28, 28))[0].shape)
    if side == 14:
        raise Wrong("边长 14 只减半了一次；hidden_dims 有两级，每级减半一次。")
    if side != deepest.shape[-1]:
        raise Wrong(f"最深一级的边长不是 {side}：从 28 出发，每一级减半一次。")
    if features in (16, 16 * side):
        raise Wrong(f"fc_mu 的输入不是 {features} 维：拉平要把高和宽都乘进去。")
    if features == 16 * 4:
        raise Wrong("64 = 16·4 是旧写法：把特征图写死成了 2×2。")
    if features != deepest[0].numel():
        raise Wrong(f"fc_mu 的输入不是 {features} 维：它等于末级的通道数乘特征图的高和宽。")
    if len(shape) == 4 and shape[1] == 3:
        raise Wrong("重建的通道数应与输入相同；写死成 3 是错误 3。")
    if shape != truth:
        raise Wrong(f"重建的形状不是 {shape}：它与喂进去的那批图同形。")


@checks("1.2")
def linear_layer_as_a_kernel(answer: object) -> None:
    generator = torch.Generator().manual_seed(12)
    for channels, side, latent in ((3, 2, 5), (4, 3, 2)):
        weight = torch.randn(channels * side**2, latent, generator=generator, dtype=torch.float64)
        got = ask(answer, weight.clone(), channels, side)
        want = [latent, channels, side, side]
        if not isinstance(got, Tensor) or list(got.shape) != want:
            came = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
            raise Wrong(f"权重应为 [L, C, b, b] = {want}，收到 {came}。")
        z = torch.randn(6, latent, generator=generator, dtype=torch.float64)
        truth = torch.nn.functional.linear(z, weight).reshape(6, channels, side, side)

        def apply(kernel: Tensor) -> Tensor:
            return torch.nn.functional.conv_transpose2d(z[:, :, None, None], kernel.to(torch.float64))

        if torch.allclose(apply(got), truth, atol=1e-9):
            continue
        if torch.equal(got.flatten(), weight.flatten()):
            raise Wrong("形状对了，数没有跟着走：直接 reshape 不会交换坐标轴，L 在 weight 里是最后一维，要先把它换到最前。")
        if torch.allclose(apply(got.mT), truth, atol=1e-9):
            raise Wrong("高和宽颠倒了：式(1.2) 里 u 是行，v 是列，v 变得最快。")
        raise Wrong("形状对了，输出与线性层不同；先把第一维拆成 (c, u, v)，顺序是 c 最慢、v 最快，再把 L 换到最前。")


@checks("1.3")
def weight_for_another_loss(answer: object) -> None:
    generator = torch.Generator().manual_seed(13)
    for beta, channels, side, latent in ((0.5, 3, 4, 6), (4.0, 1, 2, 3)):
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
        reply = ask(answer, beta, D, latent)
        try:
            got = float(reply)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise Wrong(f"应返回一个数，收到 {reply!r}。") from error

        def off_by(factor: float) -> bool:
            return abs(got - truth * factor) < 1e-6 * abs(truth * factor)

        if off_by(1):
            continue
        if off_by(0.5):
            raise Wrong("差一个 2 倍：对方的平方误差前有 ½，先把整个损失乘 2，再除以 D。")
        if off_by(latent):
            raise Wrong("忘了 L：对方的 KL 对隐变量取平均，我们的是求和，差 L 倍。")
        if off_by(latent**2):
            raise Wrong("L 用反了：平均 = 总和 ÷ L，权重要除以 L，不是乘。")
        if off_by(D) or off_by(D / 2):
            raise Wrong("忘了 D：对方对像素求和，我们的 MSE 对像素取平均，差 D 倍。")
        if off_by(D**2):
            raise Wrong("D 用反了：平方误差之和 = D·MSE，要把整个损失除以 D，KL 那一项也跟着除。")
        raise Wrong(f"β={beta}、D={D}、L={latent} 时 {got:.4g} 不对：让两项各自的倍数相同，即 损失_对方 = 常数 × 损失_我们。")


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
            seen.append((z.detach().clone(), self.layers[1].training))
            if self.fails:
                raise RuntimeError("解码中途出错")
            return self.layers(z)

    def state(model: Toy) -> tuple:
        return [module.training for module in model.modules()], [value.clone() for value in model.state_dict().values()]

    model = Toy()
    modes, values = state(model)
    samples = ask(answer, model, 5, torch.Generator().manual_seed(14))
    if not isinstance(samples, Tensor) or samples.shape != (5, 2):
        raise Wrong(f"应返回 decode 的结果，第一维是 num_samples = 5，收到 {list(getattr(samples, 'shape', []))}。")
    modes_after, values_after = state(model)
    if samples.requires_grad:
        raise Wrong("样本还带着计算图：用 torch.no_grad()。")
    if any(not torch.equal(a, b) for a, b in zip(values, values_after)):
        raise Wrong("批归一化的运行统计量被改动了：解码时要处于 eval。")
    if not seen:
        raise Wrong("没有调用 decode：样本应由 model.decode 解码得到。")
    if seen[-1][1]:
        raise Wrong("解码时批归一化还在训练状态：样本会取决于同批的其他样本。")
    if modes != modes_after:
        reason = "停在了 eval" if not any(modes_after) else "单独冻结的层也被打开了，要逐个子模块恢复"
        raise Wrong(f"训练状态没有恢复原样：{reason}。")
    again = ask(answer, model, 5, torch.Generator().manual_seed(14))
    if not torch.equal(samples, again):
        raise Wrong("同一颗种子，两次样本不同：随机数没有全部来自 generator。")
    ask(answer, model, 2000, torch.Generator().manual_seed(15))
    z = seen[-1][0]
    if abs(float(z.mean())) > 0.1 or abs(float(z.std()) - 1) > 0.1:
        raise Wrong("z 应来自先验，即标准正态 N(0, I)：用 randn。")
    model.fails = True
    try:
        answer(model, 5, torch.Generator().manual_seed(14))  # type: ignore[operator]
    except RuntimeError:
        pass
    if state(model)[0] != modes:
        raise Wrong("decode 报错时，训练状态没有恢复：恢复要写在 finally 里，或者用 with eval_mode(...)。")
