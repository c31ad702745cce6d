"""命令行，``python vanilla_vae.py`` 或安装之后的 ``vae-zh``：把参数交给训练，或交给 :mod:`vaelab.using`。"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch

from vaelab import choose, using
from vaelab.arguments import build_parser, check_early
from vaelab.cache import cache_summary, clear_cache
from vaelab.checkpoint import load_checkpoint, require_resumable
from vaelab.config import DATA_DEFAULTS, MODEL_DEFAULTS, TrainConfig
from vaelab.data import NAMES
from vaelab.evaluate import Evaluation, evaluate
from vaelab.files import command, program, shown
from vaelab.images import ImageSet
from vaelab.interrupts import Terminated, explain, terminated_by_signal
from vaelab.parser import UsageError
from vaelab.processes import World, join, pick_device
from vaelab.runs import claim, load_data
from vaelab.train import train
from vanilla_vae import VanillaVAE

PASSED_ON = ("other_data", "keep", "log_every", "tensorboard")  # 原样交给 train 的参数


def main(argv: Sequence[str] | None = None) -> int:
    """命令行入口；返回退出码，原因写到标准错误。

    Returns:
        0 成功；1 出错；2 命令写得不对；130 按了 Ctrl-C，143 收到 SIGTERM（训练的进度都已存好）。
    """
    for stream in (sys.stdout, sys.stderr):  # Windows 的终端未必默认 UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version")):
        argv.insert(0, "train")
    try:
        with terminated_by_signal(), _all_said():
            options = build_parser().parse_args(argv)
            check_early(options)
            _draw_without_screen()
            return COMMANDS[options.command](options)
    except KeyboardInterrupt:
        print("已中断；存好的检查点不受影响。", file=sys.stderr)
        return 130
    except Terminated:
        print("收到 SIGTERM，已停下；存好的检查点不受影响。", file=sys.stderr)
        return 143
    except Exception as error:
        print(f"错误：{explain(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _draw_without_screen() -> None:
    """图只写成文件，没有屏幕也行。环境变量里的后端导入时就会检查，写错了也不该拦住这里，所以导入时先拿开。"""
    before = os.environ.pop("MPLBACKEND", None)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # 存字体表的文件夹不能写，它会说一段英文；不影响画图
    import matplotlib

    matplotlib.use("Agg")
    if before is not None:
        os.environ["MPLBACKEND"] = before


@contextmanager
def _all_said() -> Iterator[None]:
    """离开时把要说的都送出去；送不出（管道断了，磁盘满了）就在这里报错，不留到解释器退出时由它用英文说。"""
    stopped = False
    try:
        yield
    except (KeyboardInterrupt, Terminated):
        stopped = True
        raise
    finally:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not stopped:
                raise


def _train(options: argparse.Namespace) -> int:
    given = vars(options)
    with join(options.device, given.get("join_timeout", 300.0)) as world, ExitStack() as stack:
        out, resume = world.from_first(lambda: stack.enter_context(claim(given)))
        return _train_in(out, resume, options, world)


def _train_in(out: Path, resume: Path | None, options: argparse.Namespace, world: World) -> int:
    """在占住的文件夹里训练；几个进程时都走这里，由第 0 个说话、写文件、画图。"""
    given, device = vars(options), pick_device(options.device)
    say = partial(print, flush=True) if world.rank == 0 else lambda *_: None
    saved = world.from_first(lambda: load_checkpoint(resume)) if resume else None
    extra = _where_from(given, saved, device)
    source = extra["data"]
    shape = {"in_channels": extra["channels"] or 3, "image_size": extra["image_size"]}
    named = {name: given[name] for name in MODEL_DEFAULTS if name in given}
    wanted = {**(saved["model_args"] if saved else {**shape, **choose.model_defaults(source, shape["image_size"])}), **named}
    with torch.device("meta"):
        VanillaVAE(**wanted)  # 结构不对，解码之前就说
    settings = _config(given, saved, {})
    if saved:
        require_resumable(saved, wanted, settings, epochs_known=not {"steps", "minutes"} & given.keys())

    say(f"数据：{shown(source)}")
    with world.first_goes_first():  # 下载与解码只由一个进程做，其余用它的结果
        data = load_data(extra, given.get("download", False), say)
    if world.size > 1:  # 量速度、定批大小之前：数据不同，各进程定下的就不同
        world.agree(f"{len(data.train)} 张训练图、{len(data.test)} 张测试图，摘要 {data.digest()}", "数据")
    config = _config(given, saved, choose.config_defaults(source, data.train, world.size))
    torch.manual_seed(config.seed)
    model = VanillaVAE(**{**wanted, **({} if saved else {"in_channels": data.train.shape[1]})}).to(device)
    how = {name: given[name] for name in ("compile", "cuda_graphs", "data_on") if name in given}
    config, why = _with_epochs(config, model, data, given, saved, device, world, how)
    _say_settings(say, model, data, config, why, source, saved, given, out, world)

    history = train(
        model, data, config, out, device=options.device, resume=resume or False, extra=extra,
        sync_batch_norm=not given.get("local_batch_norm", False), **{name: given[name] for name in PASSED_ON if name in given}, **how,
    )  # fmt: skip
    if world.rank:
        return 0
    run = using.open_run(str(out), options.device)
    if run.state["step"] != history[-1]["step"]:
        print(f"用测试 ELBO 最高的一份：{run.which}")
    result = evaluate(run.model, data.test, seed=config.seed)
    print(result.summary())
    _draw_results(run, data, history, result)
    names = "reconstructions.png（原图与重建）、samples.png（从先验、从拟合的先验抽样）、kl.png（逐维 KL）、history.png（曲线）"
    print(f"图在 {shown(out.resolve())}：{names}")
    hints = {
        command("sample", out, "--prior", "fitted", "--num", 100): "再抽一些新的图",
        command("interpolate", out, "--second", min(5, len(data.test) - 1)): "看一张变成另一张",
        command("train", "--resume", "--out", out, "--epochs", config.epochs * 2): "训练得更久",
    }
    if program() != "vae-zh":  # 课程的文件夹里才有笔记
        hints["jupyter lab notebooks"] = "打开课程"
    width = max(map(len, hints))
    print("接下来可以试：\n" + "\n".join(f"  {line:{width}}   {what}" for line, what in hints.items()))
    return 0


def _where_from(given: dict, saved: dict | None, device: torch.device) -> dict:
    """数据从哪里来、多大：指明的，否则续训照旧，否则缺省。"""
    source = given.get("data", DATA_DEFAULTS["data"])
    before = saved["extra"] if saved else {}
    extra = {**DATA_DEFAULTS, "image_size": choose.image_size(source, device), **before}
    extra.update({name: given[name] for name in extra if name in given})
    if saved and not before and "data" not in given:
        raise ValueError("检查点没有记下数据从哪里来（它来自 Python 里的 train）；请加 --data 指明，须是训练时的那一份。")
    if saved and before:  # 没有写明的通道数，就是检查点里的
        before, extra = ({**each, "channels": each.get("channels") or saved["model_args"]["in_channels"]} for each in (before, extra))
    compared = (before.keys() & extra.keys()) - {"root"}
    if "data" in before and not {before["data"], extra["data"]} & {*NAMES}:  # 两个文件夹：挪动、改名不要紧，图片的摘要说了算
        folders = {Path(each["data"]).expanduser().resolve() for each in (before, extra)}
        compared -= {"data"} if saved.get("data") or len(folders) == 1 else set()
    changed = "、".join(f"{k} {before[k]!r} → {extra[k]!r}" for k in sorted(compared) if extra[k] != before[k])
    if changed and not given.get("other_data"):
        raise ValueError(f"续训须用同样的数据，这次改了 {changed}；请去掉这些参数，或加 --other-data 坚持，或不加 --resume 另起一次训练。")
    return extra


def _config(given: dict, saved: dict | None, defaults: dict) -> TrainConfig:
    """训练的设置：指明的，否则续训照旧，否则缺省。"""
    chosen = {field.name: given[field.name] for field in fields(TrainConfig) if field.name in given}
    if given.get("flip", "auto") != "auto":
        chosen["mirror"] = given["flip"] == "on"
    return TrainConfig(**{**(saved["config"] if saved else defaults), **chosen})


def _with_epochs(
    config: TrainConfig, model: VanillaVAE, data: ImageSet, given: dict, saved: dict | None, device: torch.device, world: World, how: dict
) -> tuple[TrainConfig, str]:
    """轮数：``--epochs``、``--steps`` 或 ``--minutes`` 指明的，否则续训照旧，否则自己的图片按时间定；与一句为什么。"""
    per_epoch = config.steps_per_epoch(len(data.train), world.size)
    if "steps" in given:
        return replace(config, epochs=math.ceil(given["steps"] / per_epoch)), "你指明的步数，凑成整轮"
    timed = "minutes" in given or not (saved or "epochs" in given or given.get("data", DATA_DEFAULTS["data"]) in NAMES)
    if not timed:
        return config, ""
    seconds = choose.pace(model, data, config, device, world, **how)
    epochs, why = choose.epochs_within(given.get("minutes"), seconds, config, data, device, world)
    done = math.ceil(saved["step"] / saved["steps_per_epoch"]) if saved else 0
    return replace(config, epochs=done + epochs), why


def _say_settings(
    say: Callable[[str], None], model: VanillaVAE, data: ImageSet, config: TrainConfig, why: str, source: str, saved: dict | None,
    given: dict, out: Path, world: World,
) -> None:  # fmt: skip
    count = sum(parameter.numel() for parameter in model.parameters())
    per_epoch = config.steps_per_epoch(len(data.train), world.size)
    say(
        f"训练 {len(data.train)} 张，测试 {len(data.test)} 张，{list(data.train.shape[1:])}\n"
        f"模型：{count:,} 个参数，隐变量 {model.latent_dim} 维，各级通道 {list(model.hidden_dims)}\n"
        f"批大小 {config.batch_size}{f'（{world.size} 个进程均分）' * (world.size > 1)}，KL 权重 {config.kld_weight}，"
        f"{config.epochs} 轮共 {config.epochs * per_epoch} 步{f'（{why}）' * bool(why)}，结果在 {shown(out)}{os.sep}"
    )
    if saved:
        changed = {field.name: (saved["config"].get(field.name, field.default), getattr(config, field.name)) for field in fields(TrainConfig)}
        if listed := "、".join(f"{name} {old} → {new}" for name, (old, new) in changed.items() if old != new):
            say(f"注意：改了 {listed}，此后的数与不间断的训练不同（学习率按新的总轮数重新展开）。")
    elif source not in NAMES:
        say(choose.why(given, model, config))
        if len(data.train) < choose.FEW:
            say(f"注意：只有 {len(data.train)} 张训练图，模型多半会把它们背下来，测试图的重建不会好；几百张起才学得到共同的样子。")


def _draw_results(run: using.Opened, data: ImageSet, history: list[dict], result: Evaluation) -> None:
    from vaelab import plot

    plot.use_chinese_font()
    using.save_figure(using.pairs(run.model, data.test[:24]), run.folder / "reconstructions.png")
    generator = torch.Generator().manual_seed(0)
    standard = torch.randn((32, run.model.latent_dim), generator=generator)
    fitted = using.fitted_prior(run, data.train).sample(32, generator)
    samples = torch.cat([images for z in (standard, fitted) for images in using.decode(run.model, z)])
    labels = ["N(0, I)"] * 4 + ["拟合的先验"] * 4
    using.save_figure(
        plot.grid(samples, 8, title="抽样，解码：上四行 z ~ N(0, I)，下四行 z ~ 拟合训练图的混合高斯", row_labels=labels), run.folder / "samples.png"
    )
    using.save_figure(plot.kl_bars(result.kld_per_dim), run.folder / "kl.png")
    using.save_figure(plot.history(history, result.baseline_mse), run.folder / "history.png")


def _cache(options: argparse.Namespace) -> int:
    """解码缓存：在哪里，多大；``--clear`` 清理。"""
    if options.clear:
        number, size = clear_cache(older_than_days=options.older_than)
        print(f"清掉了 {number} 份，{size / 1e6:.1f} MB；正在用着的没有动。")
    print(cache_summary())
    return 0


COMMANDS = {
    "train": _train,
    "sample": using.sample,
    "reconstruct": using.reconstruct,
    "interpolate": using.interpolate,
    "evaluate": using.evaluate_run,
    "info": using.info,
    "export": using.export,
    "cache": _cache,
}
