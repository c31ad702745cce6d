"""训练的接线：模型、数据、设备、精度、编译、噪声、损失缩放，接好一次，循环与测速都用它。"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from vaelab.config import TrainConfig
from vaelab.graph import CapturedStep, CudaGraph
from vaelab.images import ImageSet, batch_rows
from vaelab.memory import available_memory, keep_freed_memory, too_large
from vaelab.plan import Plan
from vaelab.processes import SyncBatchNorm2d, World, current_world, swap_batch_norm
from vaelab.step import Objective, make_optimizer, memory_layout, step_seed, train_step
from vaelab.transfer import ahead
from vanilla_vae import VanillaVAE


class Stepper:
    """照 ``plan`` 接好的训练：每调用一次走一步。用在 ``with`` 里。

    离开时不论是走完、出错还是被中断，模型都还给调用者：每个参数的 ``requires_grad``、所在的设备（以 ``fc_mu`` 为准）、
    批归一化的模块恢复原样，梯度清空，置于 eval 模式。权重与批归一化的运行统计量当然是训练过的，
    卷积的权重在内存里排成 channels_last。

    Args:
        model: 要训练的模型；``requires_grad`` 为 False 的参数不训练。
        data: 训练图像。
        config: 训练的设置。
        plan: 怎样跑，见 :func:`vaelab.plan.make_plan`。
        world: 一起训练的进程；None 就是已经由 :func:`vaelab.processes.join` 加入的那些。
        sync_batch_norm: 几个进程时，批归一化是否在整批上统计。

    Raises:
        ValueError: 进入 ``with`` 时，内存装不下一步，或没有可训练的参数；这时一步也没有走，也没有写文件。
        RuntimeError: 不在 ``with`` 里用。
    """

    def __init__(
        self,
        model: VanillaVAE,
        data: ImageSet,
        config: TrainConfig,
        plan: Plan,
        world: World | None = None,
        *,
        sync_batch_norm: bool = True,
    ) -> None:
        self.model, self.data, self.config, self.plan = model, data, config, plan
        self.world, self.sync_batch_norm, self.wired = world or current_world(), sync_batch_norm, False

    def __enter__(self) -> Stepper:
        self.given = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        self.home = self.model.fc_mu.weight.device
        self.swapped: list[tuple[nn.Module, str, nn.Module]] = []
        try:
            self._wire()
        except BaseException:
            with suppress(RuntimeError):  # 设备已经出错，搬不回来；原来的错误更要紧
                self._give_back()
            raise
        self.wired = True
        return self

    def _wire(self) -> None:
        model, config, plan, device = self.model, self.config, self.plan, self.plan.device
        if device.type == "cpu":
            keep_freed_memory()
        model.to(device).to(memory_format=memory_layout(device)).train()
        self.optimizer, self.memory = make_optimizer(model, config.lr, plan.cuda_graphs), available_memory(device)
        if device.type == "cpu" and (refusal := self.too_large()):
            raise ValueError(refusal)  # 真的用尽时，系统会不声不响地结束进程，所以先算
        self.scaler = torch.amp.GradScaler(device.type, enabled=plan.precision == "fp16")
        if self.world.size > 1 and self.sync_batch_norm:
            self.swapped = swap_batch_norm(model, nn.SyncBatchNorm if device.type == "cuda" else SyncBatchNorm2d)
        self.objective: Any = Objective(model, config.kld_weight, plan.precision)
        if plan.compile:
            self.objective = torch.compile(self.objective, dynamic=False)
        if self.world.size > 1:
            own = [device] if device.type == "cuda" else None
            self.objective = nn.parallel.DistributedDataParallel(self.objective, device_ids=own, gradient_as_bucket_view=True)
        self.images = self.data.train.to(device) if plan.resident else self.data.train
        self.random = torch.Generator(device)
        self.walk = CapturedStep(self._once, CudaGraph(device, self.random), device) if plan.cuda_graphs else self._once

    def feed(self, epoch: int, skip: int = 0) -> Iterator[Tensor]:
        """第 ``epoch`` 轮的各批（这个进程的一份），从第 ``skip`` 批起；次序只取决于种子与轮数。

        训练集整个在设备上的，给出设备上的行号 ``[B]``，走这一步时才取；其余的给出 uint8 图像。
        """
        self._require_wired()
        shuffle = torch.Generator().manual_seed(step_seed(self.config.seed, epoch))
        shard = (self.world.rank, self.world.size)
        rows = islice(batch_rows(len(self.images), self.config.batch_size, shuffle, shard=shard, device=self.images.device), skip, None)
        return rows if self.plan.resident else ahead((self.images[each] for each in rows), self.data, self.plan.device)

    def __call__(self, batch: Tensor, index: int, lr: float) -> Tensor:
        """走第 ``index`` 步：这一步的 ``[loss, MSE, KL, w]``，留在设备上；噪声只取决于种子与步数。

        ``batch`` 是 :meth:`feed` 给出的：uint8 图像，或训练集在设备上时的行号。
        """
        self._require_wired()
        self.random.manual_seed(step_seed(self.config.seed, index))
        return self.walk(batch, lr)

    def _once(self, batch: Tensor, lr: float | Tensor) -> Tensor:
        """一步里的全部计算，都在设备上，录成图的就是它。"""
        images = self.images[batch] if batch.dtype == torch.int64 else batch
        shape = (self.config.batch_size, self.model.latent_dim)
        eps = torch.randn(shape, generator=self.random, device=self.plan.device, dtype=torch.float32)
        if self.config.mirror:
            chance = torch.rand(self.config.batch_size, generator=self.random, device=self.plan.device, dtype=torch.float32)
            turned = chance.chunk(self.world.size)[self.world.rank] < 0.5
            images = torch.where(turned[:, None, None, None], images.flip(3), images)
        return train_step(self.objective, self.optimizer, self.scaler, images, eps.chunk(self.world.size)[self.world.rank], lr)

    def _require_wired(self) -> None:
        if not self.wired:
            raise RuntimeError("Stepper 要用在 with 里：with Stepper(…) as stepper: …；离开之后就拆开了。")

    def too_large(self, exhausted: bool = False) -> str | None:
        """这个进程的内存装不下一步（或者已经用尽）时的话；装得下则是 None。"""
        share = self.config.batch_size // self.world.size
        return too_large(self.model, share, self.plan.precision, self.memory, exhausted)  # 开始时量的：用尽之后再量，剩的就不作数了

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._give_back()
        else:
            with suppress(RuntimeError):  # 设备已经出错，搬不回来
                self._give_back()

    def _give_back(self) -> None:
        self.wired = False
        for held in ("walk", "objective", "images"):  # 放掉录好的图、编译好的东西与放在设备上的数据
            self.__dict__.pop(held, None)
        for module, name, original in self.swapped:
            setattr(module, name, original)
        for parameter, required in self.given:
            parameter.requires_grad_(required)
            parameter.grad = None
        self.model.eval()
        self.model.to(self.home)
