"""训练的接线：模型、数据、设备、精度、编译、噪声、损失缩放，接好一次，循环与测速都用它。"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from vaelab.config import TrainConfig
from vaelab.images import ImageSet, batches
from vaelab.memory import available_memory, keep_freed_memory, too_large
from vaelab.plan import Plan
from vaelab.processes import SyncBatchNorm2d, World, swap_batch_norm
from vaelab.step import Objective, make_optimizer, memory_layout, step_seed, train_step
from vaelab.transfer import ahead
from vanilla_vae import VanillaVAE

ALONE = World()


class Stepper:
    """照 ``plan`` 接好的训练：每调用一次走一步。用在 ``with`` 里。

    离开时不论是走完、出错还是被中断，模型都还给调用者：每个参数的 ``requires_grad``、所在的设备、批归一化的模块
    恢复原样，梯度清空，置于 eval 模式。权重当然是训练过的，卷积的权重在内存里排成 channels_last。

    Args:
        model: 要训练的模型；``requires_grad`` 为 False 的参数不训练。
        data: 训练图像。
        config: 训练的设置。
        plan: 怎样跑，见 :func:`vaelab.plan.make_plan`。
        world: 一起训练的进程。
        sync_batch_norm: 几个进程时，批归一化是否在整批上统计。

    Raises:
        ValueError: 进入 ``with`` 时，内存装不下一步，或没有可训练的参数；这时什么也没有做。
    """

    def __init__(
        self,
        model: VanillaVAE,
        data: ImageSet,
        config: TrainConfig,
        plan: Plan,
        world: World = ALONE,
        *,
        sync_batch_norm: bool = True,
    ) -> None:
        self.model, self.data, self.config, self.plan, self.world = model, data, config, plan, world
        self.sync_batch_norm = sync_batch_norm

    def __enter__(self) -> Stepper:
        self.given = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        self.home = self.model.fc_mu.weight.device
        self.swapped: list[tuple[nn.Module, str, nn.Module]] = []
        try:
            self._wire()
        except BaseException:
            self._give_back()
            raise
        return self

    def _wire(self) -> None:
        model, config, plan, device = self.model, self.config, self.plan, self.plan.device
        if device.type == "cpu":
            keep_freed_memory()
        model.to(device).to(memory_format=memory_layout(device)).train()
        self.optimizer = make_optimizer(model, config.lr)
        if device.type == "cpu" and (refusal := self.too_large()):
            raise ValueError(refusal)  # 真的用尽时，系统会不声不响地结束进程，所以先算
        self.scaler = torch.amp.GradScaler(device.type, enabled=plan.precision == "fp16")
        if self.world.size > 1 and self.sync_batch_norm:
            self.swapped = swap_batch_norm(model, nn.SyncBatchNorm if device.type == "cuda" else SyncBatchNorm2d)
        self.objective: Any = Objective(model, config.kld_weight, plan.precision)
        if plan.compile:
            self.objective = torch.compile(self.objective, dynamic=False, options={"triton.cudagraphs": plan.cuda_graphs})
        if self.world.size > 1:
            own = [device] if device.type == "cuda" else None
            self.objective = nn.parallel.DistributedDataParallel(self.objective, device_ids=own, gradient_as_bucket_view=True)
        self.images = self.data.train.to(device) if plan.resident else self.data.train
        self.random = torch.Generator(device)

    def feed(self, epoch: int, skip: int = 0) -> Iterator[Tensor]:
        """第 ``epoch`` 轮的各批 uint8 图像（这个进程的一份），从第 ``skip`` 批起；次序只取决于种子与轮数。"""
        shuffle = torch.Generator().manual_seed(step_seed(self.config.seed, epoch))
        order = batches(self.images, self.config.batch_size, shuffle, shard=(self.world.rank, self.world.size))
        return ahead(islice(order, skip, None), self.data, self.plan.device, self.plan.resident)

    def __call__(self, images: Tensor, index: int, lr: float) -> Tensor:
        """走第 ``index`` 步：这一步的 ``[loss, MSE, KL, w]``，留在设备上；噪声只取决于种子与步数。"""
        noise = self.random.manual_seed(step_seed(self.config.seed, index))
        shape = (self.config.batch_size, self.model.latent_dim)
        eps = torch.randn(shape, generator=noise, device=self.plan.device, dtype=torch.float32)
        return train_step(self.objective, self.optimizer, self.scaler, images, eps.chunk(self.world.size)[self.world.rank], lr)

    def too_large(self) -> str | None:
        """这个进程的内存装不下一步时的话；装得下则是 None。"""
        share = self.config.batch_size // self.world.size
        return too_large(self.model, share, self.plan.precision, available_memory(self.plan.device))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._give_back()
        else:
            with suppress(RuntimeError):  # 设备已经出错，搬不回来；原来的错误更要紧
                self._give_back()

    def _give_back(self) -> None:
        for module, name, original in self.swapped:
            setattr(module, name, original)
        for parameter, required in self.given:
            parameter.requires_grad_(required)
            parameter.grad = None
        self.model.eval()
        self.model.to(self.home)
