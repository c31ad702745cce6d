"""训练的几种做法：通常的循环，与本项目的一步。"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count, islice

import torch
from torch import nn

from vaelab.config import TrainConfig
from vaelab.data import load
from vaelab.evaluate import evaluate
from vaelab.images import ImageSet, to_float
from vaelab.memory import keep_freed_memory
from vaelab.plan import make_plan
from vaelab.processes import pick_device
from vaelab.step import learning_rate, optimal_weight
from vaelab.stepper import Stepper
from vaelab.transfer import fetch_later
from vanilla_vae import VanillaVAE

BATCH = 64
FULL = {"latent_dim": 128, "hidden_dims": [32, 64, 128, 256, 512]}  # 公开 VanillaVAE 的大小
REPEAT = 20  # 走一遍太短就量不准：读缓存、在 GPU 上训练，都重复这么多遍


@dataclass(frozen=True)
class Recipe:
    """一种训练的做法。

    Attributes:
        name: 给人看的名字。
        usual: 真则是通常的循环（eager、float32、NCHW、每步取回损失），假则是 ``vaelab.train`` 的一步。
        keep_memory: 是否留住释放的内存（``keep_freed_memory``；本项目的一步总是留住）。
        precision, compile, data_on: 见 ``vaelab.plan.make_plan``；通常的循环不用。
        schedule: 学习率先升后降（``vaelab.step.learning_rate``），否则固定为 ``lr``。
        lr, kld_weight, batch_size, epochs: 同 ``vaelab.config.TrainConfig``。
        predicted: 动手之前在纸上写的：这一级比上一级快几倍。
    """

    name: str
    usual: bool = False
    keep_memory: bool = True
    precision: str = "auto"
    compile: str = "off"
    data_on: str = "auto"
    schedule: bool = True
    lr: float = 3e-3
    kld_weight: float | str = 2.5e-4
    batch_size: int = BATCH
    epochs: int = 1
    predicted: float = 1.0


def steps_of(recipe: Recipe, data: ImageSet, model_args: dict, total: int) -> Iterator[float | None]:
    """照 ``recipe`` 训练 ``total`` 步：每走一步交出一次控制，之后每次交出测试 ELBO。"""
    device = pick_device()
    if recipe.keep_memory and device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    model = VanillaVAE(data.train.shape[1], image_size=data.train.shape[2], **model_args).to(device)
    yield from (_usual_steps if recipe.usual else _our_steps)(model, recipe, data, device, total)
    elbo = evaluate(model, data.test).elbo
    while True:
        yield elbo


def train_to_the_end(recipe: Recipe, data: ImageSet, model_args: dict, total: int) -> float:
    """照 ``recipe`` 训练 ``total`` 步之后的测试 ELBO。"""
    return float(next(islice(steps_of(recipe, data, model_args, total), total, None)))


def _usual_steps(model: VanillaVAE, recipe: Recipe, data: ImageSet, device: torch.device, total: int) -> Iterator[None]:
    """通常的循环，就像多数教程里写的那样。"""
    for module in model.modules():
        if isinstance(module, nn.LeakyReLU):
            module.inplace = False
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr)
    images = torch.utils.data.TensorDataset(to_float(data.train))
    feed = chain.from_iterable(torch.utils.data.DataLoader(images, recipe.batch_size, shuffle=True, drop_last=True) for _ in count())
    for index, (x,) in zip(range(total), feed):
        outputs = model(x.to(device))
        if recipe.schedule:
            optimizer.param_groups[0]["lr"] = learning_rate(index, total, recipe.lr)
        weight = optimal_weight(outputs[0], outputs[1]) if recipe.kld_weight == "optimal" else recipe.kld_weight
        losses = model.loss_function(*outputs, M_N=weight)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        losses["loss"].item()
        yield


def _our_steps(model: VanillaVAE, recipe: Recipe, data: ImageSet, device: torch.device, total: int) -> Iterator[None]:
    """``vaelab.train`` 的循环走的就是这些步，只少了进度、检查点与评价。"""
    config = TrainConfig(batch_size=recipe.batch_size, lr=recipe.lr, kld_weight=recipe.kld_weight, precision=recipe.precision)
    plan = make_plan(data, config, device=device, compile=recipe.compile, data_on=recipe.data_on, total_steps=total)
    with Stepper(model, data, config, plan) as stepper:
        feed, pending = chain.from_iterable(map(stepper.feed, count())), None
        for index, images in zip(range(total), feed):
            record = stepper(images, index, learning_rate(index, total, recipe.lr) if recipe.schedule else recipe.lr)
            if pending:
                pending()  # 看的是上一步，与 vaelab.train 相同
            pending = fetch_later(record)
            yield
        if pending:
            pending()


def train_on_faces(recipe: Recipe, model_args: dict, images: int, total: int) -> Iterator[float | None]:
    data = load("faces", image_size=64, count=images)
    return steps_of(recipe, data, model_args, total)


def repeats() -> int:
    """GPU 上一步太短，每轮多走几倍的步数才量得准。"""
    return REPEAT if torch.cuda.is_available() else 1
