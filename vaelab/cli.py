"""``python vanilla_vae.py`` 的命令行：训练、抽样、重建、插值、评价。"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vaelab.checkpoint import CHECKPOINT, load_checkpoint, load_model
from vaelab.config import MODEL_DEFAULTS, PRECISIONS, TrainConfig, TrainingError
from vaelab.data import NAMES, load
from vaelab.evaluate import Evaluation, evaluate, log_likelihood_bound
from vaelab.files import write_atomically
from vaelab.images import ImageSet, to_float
from vaelab.plan import PLACES, SWITCHES
from vaelab.processes import World, join, pick_device
from vaelab.train import train
from vanilla_vae import VanillaVAE

RUNS = Path("runs")
DATA_DEFAULTS = {"data": "faces", "root": "data", "image_size": 64, "channels": None, "count": 10_000, "data_seed": 0}

EXAMPLES = """例子：
  python vanilla_vae.py                                       画一万张卡通脸，训练，画出结果
  python vanilla_vae.py train --data mnist --download --image-size 32
  python vanilla_vae.py train --data ~/Pictures --image-size 64 --epochs 50
  python vanilla_vae.py train --resume --epochs 40            接着最近一次训练，直到 40 轮
  python vanilla_vae.py sample runs/faces --num 100
  python vanilla_vae.py interpolate runs/faces --first 3 --second 8
  python vanilla_vae.py evaluate runs/faces --importance-samples 64
  torchrun --nproc_per_node 4 vanilla_vae.py train --batch-size 256    四个进程一起训练，批大小是四份之和
每个子命令都有自己的 --help。"""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def add_usage(self, usage, actions, groups, prefix=None):
        super().add_usage(usage, actions, groups, prefix or "用法：")


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, add_help=False, formatter_class=_Formatter, **kwargs)
        self._positionals.title, self._optionals.title = "位置参数", "选项"
        self.add_argument("-h", "--help", action="help", help="显示这份说明")

    def error(self, message: str):
        raise ValueError(f"命令行参数有误（{message}）；加 --help 看可用的参数。")


def _widths(text: str) -> list[int]:
    try:
        return [int(width) for width in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"应为逗号隔开的整数，如 32,64,128；收到 {text!r}") from None


def _kld_weight(text: str) -> float | str:
    try:
        return text if text == "optimal" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"应为一个数或 optimal；收到 {text!r}") from None


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vanilla_vae.py", description="训练与使用变分自动编码器。不带子命令就是 train。", epilog=EXAMPLES)
    commands = parser.add_subparsers(title="子命令", dest="command", parser_class=_Parser, metavar="")

    # 缺省值一律不写进解析结果（SUPPRESS），这样续训时才知道哪些是你明说的。
    command = commands.add_parser("train", help="训练", description="训练一个 VAE，结果存在 --out 里。", epilog=EXAMPLES)
    config = {field.name: field.default for field in fields(TrainConfig)}

    def option(name: str, text: str, **kwargs) -> None:
        command.add_argument(name, default=argparse.SUPPRESS, help=text, **kwargs)

    option("--data", f"数据：{'、'.join(NAMES)}，或图片文件夹的路径（默认 faces，按公式画的卡通脸）", metavar="名字或路径")
    option("--root", "torchvision 数据与 CelebA 所在的文件夹（默认 data）", metavar="路径")
    option("--download", "没有时允许下载", action="store_true")
    option("--image-size", "图像边长，像素（默认 64）", type=int, metavar="N")
    option("--channels", "1 灰度，3 彩色（默认随数据）", type=int, choices=(1, 3))
    option("--count", "画多少张脸（默认 10000）", type=int, metavar="N")
    option("--data-seed", "画脸与划分测试集的种子（默认 0）", type=int, metavar="N")
    option("--latent-dim", f"隐变量维数（默认 {MODEL_DEFAULTS['latent_dim']}）", type=int, metavar="N")
    widths = ",".join(map(str, MODEL_DEFAULTS["hidden_dims"]))
    option("--hidden-dims", f"各级通道数（默认 {widths}）", type=_widths, metavar="N,N,…")
    option("--epochs", f"轮数（默认 {config['epochs']}）", type=int, metavar="N")
    option("--batch-size", f"批大小（默认 {config['batch_size']}）", type=int, metavar="N")
    option("--lr", f"学习率的最高值（默认 {config['lr']}）", type=float, metavar="X")
    kld_text = f"KL 的权重 2σ²/D：一个数，或 optimal，即 σ² = MSE（默认 {config['kld_weight']}）"
    option("--kld-weight", kld_text, type=_kld_weight, metavar="X|optimal")
    option("--seed", "初始权重、次序与噪声的种子（默认 0）", type=int, metavar="N")
    option("--precision", "计算精度（默认 auto：这台设备上真的更快才用半精度）", choices=PRECISIONS)
    option("--compile", "用 torch.compile 编译（默认 auto：CPU 与 CUDA 上步数够多才编译）", choices=SWITCHES)
    option("--cuda-graphs", "把整个一步录成一张 CUDA 图（默认 auto：CUDA 上只有一个进程时就录）", choices=SWITCHES)
    option("--data-on", "训练集放在设备上还是逐批搬运（默认 auto：显存放得下就放）", choices=PLACES)
    option("--local-batch-norm", "多进程时批归一化各算各的（默认合起来统计，数与单进程相同）", action="store_true")
    option("--join-timeout", "多进程时等其余进程到齐的秒数（默认 300）", type=float, metavar="秒")
    option("--out", "结果文件夹（默认 runs/<数据名>，已有就另起一个）", metavar="路径")
    option("--resume", "从 --out（默认最近一次训练）的检查点接着训练", action="store_true")

    def run_command(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=f"{text}。")
        command.add_argument("run", nargs="?", help="训练过的文件夹（默认最近一次训练）", metavar="运行文件夹")
        return command

    command = run_command("sample", "从先验抽样，解码成图")
    command.add_argument("--num", type=int, default=64, help="张数（默认 64）", metavar="N")
    command.add_argument("--seed", type=int, default=0, help="种子（默认 0）", metavar="N")
    command = run_command("reconstruct", "重建测试图，或你给的图片")
    command.add_argument("--images", help="图片文件夹（默认用训练时的测试集）", metavar="路径")
    command.add_argument("--num", type=int, default=16, help="张数（默认 16）", metavar="N")
    command = run_command("interpolate", "在两张测试图的隐变量之间插值")
    command.add_argument("--first", type=int, default=0, help="第一张的编号（默认 0）", metavar="N")
    command.add_argument("--second", type=int, default=1, help="第二张的编号（默认 1）", metavar="N")
    command.add_argument("--steps", type=int, default=9, help="含两端共几张（默认 9）", metavar="N")
    command = run_command("evaluate", "在测试集上评价")
    samples_text = "再算每张图取 K 个样本的重要性加权下界（默认不算）"
    command.add_argument("--importance-samples", type=int, default=0, help=samples_text, metavar="K")
    for name in ("sample", "reconstruct", "interpolate"):
        commands.choices[name].add_argument("--out", help="图片存到哪里（默认在运行文件夹里）", metavar="文件.png")
    for command in commands.choices.values():
        command.add_argument("--device", default="auto", help="cuda、mps、cpu 或 auto（默认）", metavar="设备")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """命令行入口；返回退出码，0 为成功，1 为出错（原因写到标准错误）。"""
    for stream in (sys.stdout, sys.stderr):  # Windows 的终端未必默认 UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv.insert(0, "train")
    try:
        options = build_parser().parse_args(argv)
        import matplotlib

        matplotlib.use("Agg")  # 只写文件，没有屏幕也行
        return COMMANDS[options.command](options)
    except torch.OutOfMemoryError:
        print("错误：设备的内存不够用；请关掉别的程序，或加 --device cpu。", file=sys.stderr)
        return 1
    except (OSError, TypeError, ValueError, TrainingError) as error:
        print(f"错误：{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("已中断；存好的检查点不受影响。", file=sys.stderr)
        return 130


# ---------------------------------------------------------------- 子命令


def _train(options: argparse.Namespace) -> int:
    with join(options.device, getattr(options, "join_timeout", 300.0)) as world:
        return _train_together(options, world)


def _train_together(options: argparse.Namespace, world: World) -> int:
    """训练；几个进程时都走这里，由第 0 个说话、写文件、画图。"""
    given = vars(options)
    say = partial(print, flush=True) if world.rank == 0 else lambda *_: None
    out, saved = world.from_first(lambda: _choose_out(given))
    extra = {**DATA_DEFAULTS, **(saved["extra"] if saved else {})}
    extra.update({name: given[name] for name in extra if name in given})
    if saved and extra != saved["extra"]:
        changed = "、".join(f"{k} {saved['extra'][k]!r} → {extra[k]!r}" for k in extra if extra[k] != saved["extra"][k] and k != "root")
        if changed:
            raise ValueError(f"续训须用同样的数据，这次改了 {changed}；请去掉这些参数，或不加 --resume 另起一次训练。")
    config = _merged_config(given, saved, say)

    say(f"数据：{extra['data']}")
    with world.first_goes_first():  # 下载与解码只由一个进程做，其余用它的结果
        data = _load_data(extra, given.get("download", False), say)
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


def _choose_out(given: dict) -> tuple[Path, dict | None]:
    """结果文件夹，以及续训时的检查点。不续训就绝不写进已有结果的文件夹。"""
    if given.get("resume"):
        out = Path(given["out"]) if "out" in given else _latest_run()
        return out, load_checkpoint(out)
    if "out" in given:
        out = Path(given["out"])
        if (out / CHECKPOINT).exists():
            raise ValueError(f"{out} 里已有训练结果；加 --resume 接着训练，或用 --out 换一个文件夹。")
        return out, None
    name = str(given.get("data", DATA_DEFAULTS["data"]))
    name = name if name in NAMES else Path(name).expanduser().resolve().name or "images"
    out, number = RUNS / name, 1
    while (out / CHECKPOINT).exists():
        number += 1
        out = RUNS / f"{name}-{number}"
    return out, None


def _merged_config(given: dict, saved: dict | None, say: Callable[[str], None]) -> TrainConfig:
    chosen = {field.name: given[field.name] for field in fields(TrainConfig) if field.name in given}
    if not saved:
        return TrainConfig(**chosen)
    changed = {name: value for name, value in chosen.items() if value != saved["config"][name]}
    if changed:
        listed = "、".join(f"{name} {saved['config'][name]} → {value}" for name, value in changed.items())
        say(f"注意：改了 {listed}，此后的数与不间断的训练不同（学习率按新的总轮数重新展开）。")
    return TrainConfig(**{**saved["config"], **chosen})


def _load_data(extra: dict, download: bool = False, say: Callable[[str], None] = print) -> ImageSet:
    data = load(
        extra["data"],
        root=extra["root"],
        image_size=extra["image_size"],
        channels=extra["channels"],
        count=extra["count"],
        seed=extra["data_seed"],
        download=download,
    )
    for note in data.notes:
        say(f"注意：{note}")
    return data


def _draw_results(model: VanillaVAE, data: ImageSet, history: list[dict], result: Evaluation, out: Path) -> None:
    from vaelab import plot

    plot.use_chinese_font()
    _save_figure(_pairs(model, data.test[:24]), out / "reconstructions.png")
    samples = model.sample(64, generator=torch.Generator().manual_seed(0))
    _save_figure(plot.grid(samples, 8, title="先验样本：z ~ N(0, I)，解码"), out / "samples.png")
    _save_figure(plot.kl_bars(result.kld_per_dim), out / "kl.png")
    if history:
        _save_figure(plot.history(history, result.baseline_mse), out / "history.png")


def _pairs(model: VanillaVAE, images: Tensor):
    """原图与重建逐行相间。"""
    from vaelab import plot

    device = model.fc_mu.weight.device
    real = to_float(images)
    recons = torch.cat([model.generate(part.to(device)).float().cpu() for part in real.split(64)])
    columns = min(8, len(real))
    keep = len(real) // columns * columns
    rows = [row for pair in zip(real[:keep].split(columns), recons[:keep].split(columns)) for row in pair]
    return plot.grid(torch.cat(rows), columns, title="原图与重建", row_labels=["原图", "重建"] * (keep // columns))


def _save_figure(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
    plt.close(figure)


def _sample(options: argparse.Namespace) -> int:
    from vaelab import plot

    run, model, _ = _open_run(options)
    plot.use_chinese_font()
    images = model.sample(options.num, generator=torch.Generator().manual_seed(options.seed))
    columns = min(10, max(1, round(options.num**0.5)))
    return _report(plot.grid(images, columns, title="先验样本"), options, run / f"sample-{options.seed}.png")


def _reconstruct(options: argparse.Namespace) -> int:
    from vaelab import plot

    run, model, extra = _open_run(options)
    if options.num < 1:
        raise ValueError(f"--num 应为正整数，收到 {options.num}；请改为 1 或更大的数。")
    if options.images is None:
        images = _load_data(extra).test
    else:
        data = load(options.images, image_size=model.image_size, channels=model.in_channels)
        for note in data.notes:
            print(f"注意：{note}")
        images = torch.cat([data.test, data.train])
    plot.use_chinese_font()
    return _report(_pairs(model, images[: options.num]), options, run / "reconstruct.png")


def _interpolate(options: argparse.Namespace) -> int:
    from vaelab import plot

    run, model, extra = _open_run(options)
    if options.steps < 2:
        raise ValueError(f"--steps 应至少为 2（两端各一张），收到 {options.steps}；请加大它。")
    test = _load_data(extra).test
    for index in (options.first, options.second):
        if not 0 <= index < len(test):
            raise ValueError(f"测试图的编号应在 0 与 {len(test) - 1} 之间，收到 {index}；请改用其中之一。")
    ends = to_float(test[[options.first, options.second]]).to(model.fc_mu.weight.device)
    with torch.no_grad():
        mu, _ = model.encode(ends)
        t = torch.linspace(0, 1, options.steps, device=mu.device).unsqueeze(1)
        images = model.decode(mu[:1] + t * (mu[1:] - mu[:1]))  # [steps, C, H, W]
    plot.use_chinese_font()
    row = torch.cat([ends[:1], images, ends[1:]])
    labels = ["原图", *(f"{value:.2f}" for value in t.flatten().tolist()), "原图"]
    figure = plot.grid(row, len(row), title="隐变量之间的插值", column_labels=labels)
    return _report(figure, options, run / f"interpolate-{options.first}-{options.second}.png")


def _evaluate(options: argparse.Namespace) -> int:
    run, model, extra = _open_run(options)
    if options.importance_samples < 0:
        raise ValueError(f"--importance-samples 应为正整数，收到 {options.importance_samples}；例如 64。")
    data = _load_data(extra)
    result = evaluate(model, data.test)
    print(f"{run}\n{result.summary()}")
    if options.importance_samples:
        bound, stderr = log_likelihood_bound(model, data.test, result.sigma2, options.importance_samples)
        print(f"  重要性加权下界（K = {options.importance_samples}）{bound:.1f} ± {stderr:.1f} nat/图")
    return 0


COMMANDS = {
    "train": _train,
    "sample": _sample,
    "reconstruct": _reconstruct,
    "interpolate": _interpolate,
    "evaluate": _evaluate,
}


def _latest_run() -> Path:
    found = sorted(RUNS.glob(f"*/{CHECKPOINT}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{RUNS.resolve()} 里还没有训练结果；请先运行 python vanilla_vae.py，或写明运行文件夹。")
    return found[-1].parent


def _open_run(options: argparse.Namespace) -> tuple[Path, VanillaVAE, dict]:
    run = Path(options.run) if options.run else _latest_run()
    model = load_model(run, options.device)
    return (run if run.is_dir() else run.parent), model, load_checkpoint(run)["extra"]


def _report(figure, options: argparse.Namespace, default: Path) -> int:
    path = Path(options.out) if options.out else default
    _save_figure(figure, path)
    print(f"图在 {path.resolve()}")
    return 0
