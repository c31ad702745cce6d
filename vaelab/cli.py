"""``python vanilla_vae.py`` 的命令行：把参数交给训练，或交给 :mod:`vaelab.using`。"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch

from vaelab import using
from vaelab.arguments import build_parser, check_early
from vaelab.config import MODEL_DEFAULTS, TrainConfig
from vaelab.evaluate import Evaluation, evaluate
from vaelab.images import ImageSet
from vaelab.interrupts import Terminated, explain, terminated_by_signal
from vaelab.parser import UsageError
from vaelab.processes import World, join, pick_device
from vaelab.runs import DATA_DEFAULTS, choose_out, load_data
from vaelab.train import train
from vanilla_vae import VanillaVAE


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
        with terminated_by_signal():
            options = build_parser().parse_args(argv)
            check_early(options)
            os.environ["MPLBACKEND"] = "Agg"  # 只写文件，没有屏幕也行；环境里原来写着什么，导入时就会检查
            import matplotlib

            matplotlib.use("Agg")
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


def _train(options: argparse.Namespace) -> int:
    with join(options.device, getattr(options, "join_timeout", 300.0)) as world:
        return _train_together(options, world)


def _train_together(options: argparse.Namespace, world: World) -> int:
    """训练；几个进程时都走这里，由第 0 个说话、写文件、画图。"""
    given = vars(options)
    say = partial(print, flush=True) if world.rank == 0 else lambda *_: None
    out, saved = world.from_first(lambda: choose_out(given))
    extra = {**DATA_DEFAULTS, **(saved["extra"] if saved else {})}
    extra.update({name: given[name] for name in extra if name in given})
    if saved and extra != saved["extra"]:
        changed = "、".join(f"{k} {saved['extra'][k]!r} → {extra[k]!r}" for k in extra if extra[k] != saved["extra"][k] and k != "root")
        if changed:
            raise ValueError(f"续训须用同样的数据，这次改了 {changed}；请去掉这些参数，或不加 --resume 另起一次训练。")
    config = _merged_config(given, saved, say)

    say(f"数据：{extra['data']}")
    with world.first_goes_first():  # 下载与解码只由一个进程做，其余用它的结果
        data = load_data(extra, given.get("download", False), say)
    model_args = saved["model_args"] if saved else {
        "in_channels": data.train.shape[1],
        "image_size": data.train.shape[2],
        **{name: given.get(name, default) for name, default in MODEL_DEFAULTS.items()},
    }  # fmt: skip
    if saved:
        model_args = {**model_args, **{name: given[name] for name in MODEL_DEFAULTS if name in given}}
    torch.manual_seed(config.seed)
    model = VanillaVAE(**model_args).to(pick_device(options.device))
    count = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"训练 {len(data.train)} 张，测试 {len(data.test)} 张，{list(data.train.shape[1:])}\n"
        f"模型：{count:,} 个参数，隐变量 {model.latent_dim} 维，各级通道 {list(model.hidden_dims)}\n"
        f"批大小 {config.batch_size}{f'（{world.size} 个进程均分）' * (world.size > 1)}，KL 权重 {config.kld_weight}，结果在 {out}{os.sep}"
    )
    how = {name: given[name] for name in ("compile", "cuda_graphs", "data_on") if name in given}
    how["sync_batch_norm"] = not given.get("local_batch_norm", False)
    history = train(model, data, config, out, device=options.device, resume=saved is not None, extra=extra, **how)
    if world.rank:
        return 0
    finished = bool(history) and history[-1]["epoch"] == config.epochs
    if not finished:
        print(f"已停下，进度存好了；接着训练：python vanilla_vae.py train --resume --out {out}")
    result = evaluate(model, data.test, seed=config.seed)
    print(result.summary())
    _draw_results(model, data, history, result, out)
    names = "reconstructions.png（原图与重建）、samples.png（先验样本）、kl.png（逐维 KL）"
    names += "、history.png（曲线）" if history else ""
    print(f"图在 {out.resolve()}：{names}")
    print(
        "接下来可以试：\n"
        f"  python vanilla_vae.py sample {out} --num 100 --seed 1   再抽一些新的图\n"
        f"  python vanilla_vae.py interpolate {out} --second {min(5, len(data.test) - 1)}          看一张变成另一张\n"
        f"  python vanilla_vae.py train --resume --out {out} --epochs {config.epochs * 2}   训练得更久\n"
        "  jupyter lab notebooks                                    打开课程"
    )
    return 0


def _merged_config(given: dict, saved: dict | None, say: Callable[[str], None]) -> TrainConfig:
    chosen = {field.name: given[field.name] for field in fields(TrainConfig) if field.name in given}
    if not saved:
        return TrainConfig(**chosen)
    changed = {name: value for name, value in chosen.items() if value != saved["config"][name]}
    if changed:
        listed = "、".join(f"{name} {saved['config'][name]} → {value}" for name, value in changed.items())
        say(f"注意：改了 {listed}，此后的数与不间断的训练不同（学习率按新的总轮数重新展开）。")
    return TrainConfig(**{**saved["config"], **chosen})


def _draw_results(model: VanillaVAE, data: ImageSet, history: list[dict], result: Evaluation, out: Path) -> None:
    from vaelab import plot

    plot.use_chinese_font()
    using.save_figure(using.pairs(model, data.test[:24]), out / "reconstructions.png")
    samples = model.sample(64, generator=torch.Generator().manual_seed(0))
    using.save_figure(plot.grid(samples, 8, title="先验样本：z ~ N(0, I)，解码"), out / "samples.png")
    using.save_figure(plot.kl_bars(result.kld_per_dim), out / "kl.png")
    if history:
        using.save_figure(plot.history(history, result.baseline_mse), out / "history.png")


COMMANDS = {
    "train": _train,
    "sample": using.sample,
    "reconstruct": using.reconstruct,
    "interpolate": using.interpolate,
    "evaluate": using.evaluate_run,
}
