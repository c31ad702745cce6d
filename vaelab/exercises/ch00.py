"""第 00 章“从这里开始”的练习：检查，以及它认得的错答。"""

import torch
from torch import Tensor

from vaelab.exercises.judging import Wrong, ask, checks, finite, known_wrong, number
from vanilla_vae import VanillaVAE


@checks("0.1")
def error_in_other_units(answer: object) -> None:
    """[0, 255] 坐标里的 MSE 是 [-1, 1] 坐标里的多少倍。"""
    given = number(answer)
    pictures = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(1)).double()
    inside = pictures / 127.5 - 1
    truth = float((pictures[0] - pictures[1]).square().mean() / (inside[0] - inside[1]).square().mean())
    # 会算错的三样：长度变几倍、忘了平方、方向反了；各种错法凑在一起，逐样说出来
    for length, what in ((truth**0.5, ""), (127, "255 ÷ 2 是 127.5"), (128, "255 ÷ 2 是 127.5"), (255, LONG), (256, LONG)):
        for power in (2, 1):
            for upside_down in (False, True):
                slips = [what] * bool(what) + [SQUARE] * (power == 1) + [REVERSED] * upside_down
                guess = length ** (-power if upside_down else power)
                if abs(given - guess) < 2e-3 * guess * (3e-5 / 2e-3 if not slips else 1):
                    if slips:
                        raise Wrong("；".join(slips) + "。")
                    return
    raise Wrong(f"同样两张图，换成 [0, 255] 之后误差不是原来的 {given:g} 倍；先算长度变几倍，再想平方变几倍。")


LONG = "你把 [-1, 1] 当成了 [0, 1]：它的长度是 2，不是 1"
SQUARE = "这是长度的倍数；误差是平方，长度的倍数也要平方"
REVERSED = "方向反了：题目问的是 [0, 255] 里的误差除以 [-1, 1] 里的误差"

known_wrong(
    "0.1",
    ("应交一个数", "127.5 的平方"),
    ("长度的倍数", 127.5),
    ("长度的倍数", 128),
    ("当成了 [0, 1]", 255),
    ("当成了 [0, 1]", 255**2),
    ("方向反了", 1 / 127.5**2),
    ("方向反了", 6.15e-5),
    ("长度的倍数也要平方；方向反了", 1 / 127.5),
    ("255 ÷ 2 是 127.5", 128**2),
    ("255 ÷ 2 是 127.5", 127**2),
    ("当成了 [0, 1]", 256**2),
    ("长度的倍数", torch.tensor([127.5])),
    ("不是原来的 1 倍", 1),  # 以为换坐标不改变误差
)


class Bend(torch.nn.Module):
    """逐像素的一道弯，式子简单，弯得回去；训练模式下像批归一化那样，还要看同批的别人。"""

    def forward(self, x: Tensor) -> Tensor:
        bent = torch.sinh(2 * x)
        return bent - bent.mean(dim=0) if self.training else bent


@checks("0.2")
def moving_along_a_direction(answer: object) -> None:
    """把 x 的 mu 沿两批 mu 的平均之差挪 strength 倍，再解码。"""
    model = VanillaVAE(1, 3, [1], image_size=4).double().eval()
    generator = torch.Generator().manual_seed(2)
    # 编码是一道弯加一次线性，所以隐空间里的平移就是弯过的像素里的平移，答案可以从像素那边得到。
    # 弯不能省：全是线性的话，在像素里做加法也会得到同样的图。解码末尾的 Tanh 同理。
    model.encoder, model.decoder, model.final_layer = Bend(), torch.nn.Identity(), torch.nn.Tanh()
    model.fc_mu, model.fc_var = torch.nn.Linear(16, 3, bias=False).double(), torch.nn.Linear(16, 3).double()
    model.decoder_input, model.bottom = torch.nn.Linear(3, 16).double(), 4
    model.eval()  # 换上的层生来在训练模式
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    x, with_it, without_it = (torch.rand(n, 1, 4, 4, generator=generator).double() * 2 - 1 for n in (2, 5, 3))

    def call(strength: float) -> Tensor:
        shape = f"与 x 同形的张量 {list(x.shape)}"
        got = finite(ask(answer, model, x.clone(), with_it.clone(), without_it.clone(), strength), shape)
        if got.shape != x.shape:
            raise Wrong(f"应返回{shape}，收到 {list(got.shape)}；mu 挪过之后还要 decode，x 的每张图各得一张。")
        return got

    def moved(step: Tensor) -> Tensor:
        return model.generate(torch.asinh(torch.sinh(2 * x) + step) / 2)

    def middle(images: Tensor) -> Tensor:
        return images.mean(dim=0)

    bend, generate = model.encoder, model.generate
    direction = middle(bend(with_it)) - middle(bend(without_it))
    in_pixels = middle(with_it) - middle(without_it)
    for strength in (0.7, -1.0):
        got, again = call(strength), call(strength)

        def is_like(other: Tensor) -> bool:
            return torch.allclose(got, other, atol=1e-6)

        if not is_like(again):
            raise Wrong("同样的输入调用两次，结果不同：读数应取 mu，不要抽样。")
        if model.training:
            raise Wrong(EVAL)
        if is_like(moved(strength * direction)):
            continue
        if is_like(generate(x)) or is_like(x):
            raise Wrong("图没有变：方向加上去了吗？")
        if is_like(moved(-strength * direction)):
            raise Wrong("方向反了：应是有这个特征的平均，减去没有的平均。")
        if is_like(moved(direction)):
            raise Wrong("方向对，长短不对：别忘了乘以 strength。")
        step, rebuilt = strength * in_pixels, strength * (middle(generate(with_it)) - middle(generate(without_it)))
        if any(map(is_like, (x + step, generate(x) + step, generate(x + step), generate(x) + rebuilt))):
            raise Wrong("你在像素里做了加法，那会得到重影；应在 mu 上加，再解码。")
        if is_like(moved(strength * (bend(middle(with_it)) - bend(middle(without_it))))):
            raise Wrong("你先平均了图，再编码：平均出来的重影不是一张脸；应先编码每张图，再平均它们的 mu。")
        if is_like(moved(strength * middle(bend(with_it)))):
            raise Wrong("只加了 with_it 的平均；方向是两个平均之差。")
        if is_like(moved(strength * (bend(with_it).sum(dim=0) - bend(without_it).sum(dim=0)))):
            raise Wrong("你把各批的 mu 加了起来；两批张数不同，要取平均。")
        raise Wrong("形状对，数不对；依次核对：三次 encode 都取第一个返回值 mu，各批取平均，作差，乘 strength，加到 x 的 mu 上，decode。")
    # 交来一个还在训练模式的模型，答案不该变
    model.train()
    got = call(0.7)
    model.eval()
    if not torch.allclose(got, moved(0.7 * direction), atol=1e-6):
        raise Wrong(EVAL)


EVAL = "编码或解码的时候模型在训练模式：批归一化会看同批的别人，同一张图画出来就不同；直接用 encode、decode 之前先 model.eval()。"


def _mean_mu(model: VanillaVAE, images: Tensor) -> Tensor:
    return model.encode(images)[0].mean(dim=0)


def _samples_instead_of_mu(model, x, long, short, strength):
    z, z_long, z_short = (model.reparameterize(*model.encode(images)) for images in (x, long, short))
    return model.decode(z + strength * (z_long.mean(dim=0) - z_short.mean(dim=0)))


def _log_var_instead_of_mu(model, x, long, short, strength):
    return model.decode(model.encode(x)[0] + strength * (model.encode(long)[1].mean(dim=0) - model.encode(short)[1].mean(dim=0)))


def _pictures_averaged_before_encoding(model, x, long, short, strength):
    mu_long, mu_short = (model.encode(images.mean(dim=0, keepdim=True))[0] for images in (long, short))
    return model.decode(model.encode(x)[0] + strength * (mu_long - mu_short))


def _reconstructions_added(model, x, long, short, strength):
    return model.generate(x) + strength * (model.generate(long).mean(dim=0) - model.generate(short).mean(dim=0))


def _forgets_eval(model, x, long, short, strength):
    return model.decode(model.encode(x)[0] + strength * (_mean_mu(model, long) - _mean_mu(model, short)))


def _leaves_train_on(model, x, long, short, strength):
    model.train()
    return _forgets_eval(model, x, long, short, strength)


def _sums_instead_of_means(model, x, long, short, strength):
    return model.decode(model.encode(x)[0] + strength * (model.encode(long)[0].sum(dim=0) - model.encode(short)[0].sum(dim=0)))


def _moves_forward_only(model, x, long, short, strength):
    return model.decode(model.encode(x)[0] + max(strength, 0) * (_mean_mu(model, long) - _mean_mu(model, short)))


known_wrong(
    "0.2",
    ("运行时出错", lambda model, x, long, short, strength: model.decode(model.encode(x) + strength)),  # encode 返回的是两样东西
    ("收到 [tensor", lambda model, x, long, short, strength: model(x)),  # 前向返回四样东西
    ("收到 [2, 3]；mu 挪过之后还要 decode", lambda model, x, long, short, strength: model.encode(x)[0] + strength * _mean_mu(model, long)),
    ("收到 [1, 1, 4, 4]", lambda model, x, long, short, strength: model.decode(_mean_mu(model, x)[None] + strength * _mean_mu(model, long))),
    ("不要抽样", _samples_instead_of_mu),
    ("图没有变", lambda model, x, long, short, strength: model.generate(x)),
    ("图没有变", lambda model, x, long, short, strength: x),
    ("图没有变", _moves_forward_only),
    ("应是有这个特征的平均", lambda model, x, long, short, strength:
        model.decode(model.encode(x)[0] + strength * (_mean_mu(model, short) - _mean_mu(model, long)))),
    ("乘以 strength", lambda model, x, long, short, strength: model.decode(model.encode(x)[0] + _mean_mu(model, long) - _mean_mu(model, short))),
    ("重影；应在 mu 上加", lambda model, x, long, short, strength: x + strength * (long.mean(dim=0) - short.mean(dim=0))),
    ("重影；应在 mu 上加", lambda model, x, long, short, strength: model.generate(x) + strength * (long.mean(dim=0) - short.mean(dim=0))),
    ("重影；应在 mu 上加", lambda model, x, long, short, strength: model.generate(x + strength * (long.mean(dim=0) - short.mean(dim=0)))),
    ("重影；应在 mu 上加", _reconstructions_added),
    ("先平均了图，再编码", _pictures_averaged_before_encoding),
    ("只加了 with_it", lambda model, x, long, short, strength: model.decode(model.encode(x)[0] + strength * _mean_mu(model, long))),
    ("依次核对", _log_var_instead_of_mu),
    ("要取平均", _sums_instead_of_means),
    ("先 model.eval()", _forgets_eval),
    ("先 model.eval()", _leaves_train_on),
)  # fmt: skip
