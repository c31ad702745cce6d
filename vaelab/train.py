"""训练：一个读者能看懂的循环。

每一步的随机数只取决于种子与步数，每一轮的次序只取决于种子与轮数，
所以从检查点续训与一口气训完，几个进程与一个进程，走的是同样的路、得到同样的数（舍入除外）。

循环之外：接线在 ``stepper.py``，一步在 ``step.py``，为什么这样跑在 ``plan.py``，检查点在 ``checkpoint.py``，半途停下在 ``interrupts.py``。
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.auto import tqdm

from vaelab.checkpoint import Run, checkpoint_file, load_checkpoint
from vaelab.config import TrainConfig
from vaelab.evaluate import evaluate
from vaelab.files import hold
from vaelab.images import ImageSet
from vaelab.interrupts import clear_errors, stop_on_signal
from vaelab.plan import make_plan
from vaelab.processes import current_world, pick_device
from vaelab.step import learning_rate
from vaelab.steplog import StepLog, whole_number
from vaelab.stepper import Stepper
from vaelab.transfer import fetch_later
from vaelab.watch import look
from vanilla_vae import VanillaVAE


def train(
    model: VanillaVAE,
    data: ImageSet,
    config: TrainConfig,
    out: str | os.PathLike | None = None,
    *,
    device: str | torch.device = "auto",
    compile: str = "auto",
    cuda_graphs: str = "auto",
    data_on: str = "auto",
    sync_batch_norm: bool = True,
    resume: bool | str | os.PathLike = False,
    other_data: bool = False,
    extra: dict | None = None,
    keep: int = 0,
    log_every: int = 0,
    tensorboard: bool = False,
    progress: bool = True,
) -> list[dict]:
    """训练 ``model``（就地改动），每一轮之后在测试集上评价，并存下检查点。

    按 Ctrl-C（或收到 SIGTERM）会在当前这一步之后停下：存一份精确到步的检查点，``resume=True`` 从那里接着走；
    存好之后，信号照常交给调用者：Ctrl-C 是 KeyboardInterrupt，SIGTERM 默认结束进程。
    在 :func:`vaelab.processes.join` 之内调用，几个进程就一起训练：各算每一批的一份，梯度取平均，只有第 0 个进程写文件。
    不论怎样结束，模型都在 eval 模式，各参数的 ``requires_grad`` 与所在的设备同给来时一样；冻结的参数不训练，
    批归一化的运行统计量照常更新。

    Args:
        model: 图像大小、通道数须与 ``data`` 相符。
        data: 训练与测试图像。
        config: 训练的设置。
        out: 存放 ``checkpoint.pt``（最后一份）、``best.pt``（测试 ELBO 最高的一份）与 ``history.csv`` 的文件夹；None 则什么也不存。
        device, compile, cuda_graphs, data_on: 怎样跑，见 :func:`vaelab.plan.make_plan`。
        sync_batch_norm: 几个进程时，批归一化是否在整批上统计；关掉就各算各的，快一点，数不再与一个进程相同。
        resume: 从 ``out`` 里最后的检查点，或指明的一个检查点文件接着训练，直到 ``config.epochs`` 轮；进程数可以与原来不同。
        other_data: 续训时，数据与检查点记着的不同也坚持走下去。
        extra: 一并存进检查点的设置（字典，只含数、字符串与列表），例如数据从哪里来。
        keep: 另外保留最近几份更早的检查点，``checkpoint-步数.pt``。
        log_every, tensorboard: 每一步的记录，见 :class:`vaelab.steplog.StepLog`。
        progress: 是否显示进度条，并先用一行说明这样跑的理由。

    Returns:
        每一轮一行的历史，列见 ``history.csv``。

    Raises:
        BlockingIOError: 另一个训练正占着 ``out``。
        TrainingError: 损失不再是有限的数，或大得荒唐（见 :func:`vaelab.watch.look`），检查点存不下，内存装不下一批，或与别的进程失去联系。
        ValueError: 设置与数据、与检查点不相符，``out`` 里已有检查点而不续训，或设备做不到所要求的。
        KeyboardInterrupt: 按了 Ctrl-C；进度已经存好。
    """
    if resume and not out:
        raise ValueError("resume=True 时应给出 out，即检查点所在的文件夹；请补上，或去掉 resume 从头训练。")
    world, place = current_world(), pick_device(device)
    path = None if out is None or world.rank else Path(out)
    steps_per_epoch = config.steps_per_epoch(len(data.train), world.size)
    total_steps = config.epochs * steps_per_epoch
    log, keep = StepLog(path, log_every, tensorboard), whole_number("keep", keep)
    digest = data.digest() if out or world.size > 1 else None
    world.agree(f"{len(data.train)} 张训练图、{len(data.test)} 张测试图，摘要 {digest}", "数据")
    source = checkpoint_file(out if resume is True else resume) if resume and out else None
    saved = world.from_first(lambda: load_checkpoint(source)) if source else None
    plan = make_plan(
        data, config, model, device=place, compile=compile, cuda_graphs=cuda_graphs, data_on=data_on,
        total_steps=total_steps, before=(saved or {}).get("ran_on"),
    )  # fmt: skip
    plan = world.from_first(lambda: plan).on(plan.device)
    show = progress and world.rank == 0
    if show:
        print(plan.why(), flush=True)

    with Stepper(model, data, config, plan, world, sync_batch_norm=sync_batch_norm) as stepper, hold(path):
        run = Run(model, stepper.optimizer, stepper.scaler, config, plan.ran_on, path, steps_per_epoch, extra or {}, digest, log, keep)
        if saved:
            run.restore(saved, other_data, source)
        else:
            run.start()
        images_total, images_done = (n * config.batch_size for n in (total_steps, run.step))
        bar = tqdm(total=images_total, initial=images_done, unit="图", unit_scale=True, smoothing=0.1, disable=not show)
        with stop_on_signal(run, show) as stop_asked, bar, clear_errors(run, world, stepper.too_large):
            stop = False
            while run.step < total_steps and not stop:
                stop = _epoch(stepper, run, total_steps, stop_asked, bar)
                run.save()
            if stop:
                stop_asked.by_any()
    return run.history


def _epoch(stepper: Stepper, run: Run, total_steps: int, stop_asked: Callable[[], bool], bar: tqdm) -> bool:
    """走一轮（续训时从断处走到轮末），走完就评价；返回是否要停下。"""
    config, world, data = stepper.config, stepper.world, stepper.data
    epoch, done = divmod(run.step, run.steps_per_epoch)
    bar.set_description(f"第 {epoch + 1}/{config.epochs} 轮")
    started, first, pending, stop = time.perf_counter(), run.step, None, False
    stepper.model.train()
    for images in stepper.feed(epoch, skip=done):
        lr = learning_rate(run.step, total_steps, config.lr)
        record = stepper(images, run.step, lr)
        run.step += 1
        # 看的是上一步：等它的几个数时，这一步已经在设备上排着，设备不会闲下来。
        stop = run.read(pending) or (world.size == 1 and stop_asked())
        pending = (run.step, lr, fetch_later(world.mean(record, stop_asked())))
        bar.update(config.batch_size)
        if stop:
            break
        if run.step % 10 == 0 and run.last:
            bar.set_postfix_str(f"MSE {run.last[1]:.4f}，KL {run.last[2]:.1f}", refresh=False)
    stop = run.read(pending) or stop
    seconds = time.perf_counter() - started
    if run.step % run.steps_per_epoch == 0 and world.rank == 0:
        data.require_whole()
        test = evaluate(stepper.model, data.test, seed=config.seed)
        if (note := look(test, config, epoch + 1, run.steps_per_epoch, run.history[-1]["test_mse"] if run.history else None)) and not bar.disable:
            bar.write(note)
        run.finish_epoch(test, (run.step - first) * config.batch_size / seconds, seconds)
    return stop
