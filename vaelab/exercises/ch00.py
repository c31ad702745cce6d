"""第 00 章“从这里开始”的练习：检查，以及它认得的错答。"""

import torch
from torch import Tensor

from vaelab.exercises.judging import ask, checks, known_wrong, Wrong
from vanilla_vae import VanillaVAE


@checks("0.1")
def error_in_other_units(answer: object) -> None:
    try:
        given = float(answer)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise Wrong(f"应交一个数，收到 {answer!r}。") from error
    pictures = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(1)).double()
    inside = pictures / 127.5 - 1
    truth = float((pictures[0] - pictures[1]).square().mean() / (inside[0] - inside[1]).square().mean())
    if abs(given - truth) < 0.5:
        return
    if abs(given - truth**0.5) < 0.5:
        raise Wrong("这是长度的倍数；误差是平方，长度的倍数也要平方。")
    if abs(given - 255) < 0.5 or abs(given - 255**2) < 0.5:
        raise Wrong("你把 [-1, 1] 当成了 [0, 1]：它的长度是 2，不是 1。")
    if given > 0 and abs(1 / given - truth) < 0.5:
        raise Wrong("方向反了：题目问的是 [0, 255] 里的误差除以 [-1, 1] 里的误差。")
    raise Wrong(f"同样两张图，换成 [0, 255] 之后误差不是原来的 {given:g} 倍；先算长度变几倍，再想平方变几倍。")


@checks("0.2")
def moving_along_a_direction(answer: object) -> None:
    model = VanillaVAE(1, 3, [1], image_size=4).double().eval()
    generator = torch.Generator().manual_seed(2)
    # 编码、解码都换成线性的：像素里的平移与隐空间里的平移于是一一对应，答案可以从像素那边得到。
    model.encoder, model.decoder, model.final_layer = torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity()
    model.fc_mu, model.fc_var = torch.nn.Linear(16, 3, bias=False).double(), torch.nn.Linear(16, 3).double()
    model.decoder_input, model.bottom = torch.nn.Linear(3, 16).double(), 4
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    sizes = (2, 5, 3)
    x, with_it, without_it = (torch.rand(n, 1, 4, 4, generator=generator).double() * 2 - 1 for n in sizes)

    def call(strength: float) -> Tensor:
        got = ask(answer, model, x.clone(), with_it.clone(), without_it.clone(), strength)
        if not isinstance(got, Tensor) or got.shape != x.shape:
            came = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
            raise Wrong(f"应返回与 x 同形的张量 {list(x.shape)}，收到 {came}；每批的 mu 要对批那一维取平均，得到 [L]。")
        return got.detach().double()

    def is_like(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, atol=1e-8)

    got, again = call(0.7), call(0.7)
    if not is_like(got, again):
        raise Wrong("同样的输入调用两次，结果不同：读数应取 mu，不要抽样。")
    direction = with_it.mean(dim=0) - without_it.mean(dim=0)  # [C, H, W]
    truth = model.generate(x + 0.7 * direction)
    if is_like(got, truth):
        return
    if is_like(got, model.generate(x)):
        raise Wrong("图没有变：方向加上去了吗？")
    if is_like(got, model.generate(x - 0.7 * direction)):
        raise Wrong("方向反了：应是有这个特征的平均，减去没有的平均。")
    if is_like(got, model.generate(x + direction)):
        raise Wrong("方向对，长短不对：别忘了乘以 strength。")
    if is_like(got, model.generate(x) + 0.7 * direction) or is_like(got, x + 0.7 * direction):
        raise Wrong("你在像素里做了加法，那会得到重影；应在 mu 上加，再解码。")
    if is_like(got, model.generate(with_it.mean(dim=0) * 0.7 + x)):
        raise Wrong("只加了 with_it 的平均；方向是两个平均之差。")
    raise Wrong("形状对，数不对；依次核对：三次 encode 都取第一个返回值 mu，各批取平均，作差，乘 strength，加到 x 的 mu 上，decode。")
