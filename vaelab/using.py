"""用训练过的模型：抽样、重建、插值、评价、概况、导出；图写成文件。"""

from __future__ import annotations

import argparse
import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from vaelab.checkpoint import BEST, CHECKPOINT, HISTORY, best_row, build_model, checkpoint_file, load_checkpoint
from vaelab.config import DATA_DEFAULTS
from vaelab.evaluate import evaluate, log_likelihood_bound
from vaelab.export import export_onnx, export_safetensors
from vaelab.files import command, shown, system_reason, write_atomically
from vaelab.images import ImageSet, to_float, to_uint8
from vaelab.pictures import read_pictures
from vaelab.prior import Mixture, fit_prior, load_prior, save_prior
from vaelab.runs import latest_run, load_data
from vaelab.steplog import STEPS, TENSORBOARD
from vanilla_vae import VanillaVAE, eval_mode, positive_int

PRIOR = "prior.pt"
MOST_IN_A_FIGURE = 2_000  # 一张图里至多拼这么多小图：再多，每一张都看不清，图也大得画不下
MOST_STEPS = 200  # 插值是一行：再长，图宽得画不下
SOFTWARE = "vaelab"  # 写进图的元数据：放在图片文件夹里，也认得出不是数据


@dataclass(frozen=True)
class Opened:
    """打开的一次训练：文件夹，用的是哪一个检查点，它的内容，重建的模型。"""

    folder: Path
    file: Path
    state: dict
    model: VanillaVAE

    @property
    def which(self) -> str:
        """用的是哪一份，一句话。"""
        step = self.state["step"]
        epoch = f"第 {step / self.state['steps_per_epoch']:.4g} 轮（第 {step} 步）"
        if self.file.name == BEST:
            epoch += "，测试 ELBO 最高的一轮"
        elif self.file.name == CHECKPOINT:
            epoch += "，最后的一份"
        return f"{shown(self.file)}：{epoch}"


def open_run(run: str | None, device: str) -> Opened:
    """运行文件夹（默认最近一次训练）用其中测试 ELBO 最高的一份；指明检查点文件就用它。"""
    file = checkpoint_file(Path(run).expanduser() if run else latest_run(), best=True)
    state = load_checkpoint(file)
    return Opened(file.parent, file, state, build_model(state, device))


# ---------------------------------------------------------------- 子命令


def sample(options: argparse.Namespace) -> int:
    from vaelab import plot

    num = positive_int("--num", options.num)
    kind = "npz" if options.format == "grid" and (options.out or "").lower().endswith(".npz") else options.format
    run = open_run(options.run, options.device)
    stem = f"sample-{options.seed}" + "-fitted" * (options.prior == "fitted")
    if kind == "grid":
        path = figure_path(options.out, run.folder / f"{stem}.png", num)
    elif kind == "npz":
        path = _writable(options.out, run.folder / f"{stem}.npz", (".npz",))
    else:
        path = _new_folder(options.out, run.folder / stem)
        if run.model.in_channels not in (1, 3):
            raise ValueError(f"PNG 只存得下 1 或 3 个通道，这个模型有 {run.model.in_channels} 个；请改用 --format npz。")
    print(f"用的是 {run.which}")
    generator = torch.Generator().manual_seed(options.seed)
    if options.prior == "fitted":
        z = fitted_prior(run, lambda: _data(run, options).train, options.data).sample(num, generator)
    else:
        z = torch.randn((num, run.model.latent_dim), generator=generator)
    if kind == "png":
        _write_pngs(run.model, z, path)
    elif kind == "npz":
        about = {"seed": options.seed, "prior": options.prior, "step": run.state["step"]}
        with _writing(path):
            write_atomically(path, lambda file: _write_npz(run.model, z, file, about))
    else:
        plot.use_chinese_font()
        title = "拟合的先验的样本" if options.prior == "fitted" else "先验样本"
        columns = max(1, round(num**0.5)) if num <= 100 else max(10, round(num**0.5 * 0.8))
        save_figure(plot.grid(torch.cat(list(decode(run.model, z))), min(columns, 40), title=title), path)
    print(f"{'图' if kind == 'grid' else f'{num} 张图'}在 {shown(path.resolve())}")
    return 0


def reconstruct(options: argparse.Namespace) -> int:
    from vaelab import plot

    num = positive_int("--num", options.num)
    run = open_run(options.run, options.device)
    path = figure_path(options.out, run.folder / "reconstruct.png", 2 * num)
    if options.images is None:
        images = _data(run, options).test
        if len(images) < num:
            print(f"注意：测试图只有 {len(images)} 张，少于 --num {num}。")
    else:
        images = _own(run.model, options.images, num)
    print(f"用的是 {run.which}")
    plot.use_chinese_font()
    return _report(pairs(run.model, images[:num]), path)


def interpolate(options: argparse.Namespace) -> int:
    from vaelab import plot

    if not 2 <= options.steps <= MOST_STEPS:
        raise ValueError(f"--steps 应在 2（两端各一张）与 {MOST_STEPS} 之间，收到 {options.steps}；请改用其中的数。")
    run = open_run(options.run, options.device)
    name = f"interpolate-{options.first}-{options.second}.png" if options.images is None else "interpolate.png"
    path = figure_path(options.out, run.folder / name)
    if options.images is None:
        test = _data(run, options).test
        for index in (options.first, options.second):
            if not 0 <= index < len(test):
                raise ValueError(f"测试图的编号应在 0 与 {len(test) - 1} 之间，收到 {index}；请改用其中之一。")
        ends = test[[options.first, options.second]]
    else:
        for each in options.images:
            if Path(each).expanduser().is_dir():
                raise IsADirectoryError(f"--images 应为两个图片文件，{shown(each)} 是文件夹；请写明其中的一张。")
        ends = torch.cat([_own(run.model, each, 1) for each in options.images])
    print(f"用的是 {run.which}")
    device = run.model.fc_mu.weight.device
    ends = to_float(ends).to(device)
    with torch.no_grad():
        mu, _ = run.model.encode(ends)
        t = torch.linspace(0, 1, options.steps, device=device).unsqueeze(1)
        images = torch.cat(list(decode(run.model, mu[:1] + t * (mu[1:] - mu[:1]))))  # [steps, C, H, W]
    plot.use_chinese_font()
    row = torch.cat([to_uint8(ends[:1]).cpu(), images, to_uint8(ends[1:]).cpu()])
    labels = ["原图", *(f"{value:.2f}" for value in t.flatten().tolist()), "原图"]
    return _report(plot.grid(row, len(row), title="隐变量之间的插值", column_labels=labels), path)


def evaluate_run(options: argparse.Namespace) -> int:
    if options.importance_samples < 0:
        raise ValueError(f"--importance-samples 应为正整数，收到 {options.importance_samples}；例如 64。")
    run = open_run(options.run, options.device)
    data = _data(run, options)
    print(f"用的是 {run.which}" + "（它是按测试集挑的，略偏乐观）" * (run.file.name == BEST))
    result = evaluate(run.model, data.test)
    print(result.summary())
    if options.importance_samples:
        bound, stderr = log_likelihood_bound(run.model, data.test, result.sigma2, options.importance_samples)
        print(f"  重要性加权下界（K = {options.importance_samples}）{bound:.1f} ± {stderr:.1f} nat/图")
    return 0


def info(options: argparse.Namespace) -> int:
    """一次训练的一屏概况；不读数据，不用 GPU。"""
    run = open_run(options.run, "cpu")
    last = run.state if run.file.name != BEST or not (run.folder / CHECKPOINT).is_file() else load_checkpoint(run.folder / CHECKPOINT)
    config, extra, model, history = last["config"], last["extra"], run.model, last["history"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    source = shown(str(extra["data"])) if "data" in extra else "没有记下（来自 Python 里的 train）；用 --data 指明"
    settings = "，".join(f"{name} {value}" for name, value in config.items())
    print(
        f"{shown(run.folder.resolve())}\n"
        f"  数据      {source}，{[model.in_channels, model.image_size, model.image_size]}\n"
        f"  模型      {parameters:,} 个参数，隐变量 {model.latent_dim} 维，各级通道 {list(model.hidden_dims)}\n"
        f"  设置      {settings}\n"
        f"  走到      第 {last['step'] / last['steps_per_epoch']:.4g} 轮（共 {config['epochs']} 轮），第 {last['step']} 步\n"
        f"  跑在      {'，'.join(f'{name} {value}' for name, value in last.get('ran_on', {}).items())}"
    )
    for label, row in (("最后一轮", history[-1] if history else None), ("最好一轮", best_row(history, last.get("since", 0)))):
        if row:
            print(f"  {label}  第 {row['epoch']} 轮：测试 ELBO {row['test_elbo']:.1f} nat/图，MSE {row['test_mse']:.5f}，KL {row['test_kld']:.2f}")
    names = (BEST, CHECKPOINT, "checkpoint-*.pt", HISTORY, STEPS, f"{TENSORBOARD}/*", PRIOR, "*.png")
    files = [path for name in names for path in sorted(run.folder.glob(name))]
    print("  文件      " + "，".join(f"{shown(path.relative_to(run.folder))} {_size(path.stat().st_size)}" for path in files))
    print(
        "在 Python 里用它（在课程的文件夹里）：\n"
        "  from vaelab import checkpoint, plot\n"
        f"  model = checkpoint.load_model({str(run.folder.resolve())!r})\n"
        '  plot.grid(model.sample(16)).savefig("samples.png")\n'
        f"命令行：{command('sample', run.folder)}"
    )
    return 0


def export(options: argparse.Namespace) -> int:
    run = open_run(options.run, "cpu")
    suffix = f".{options.format}"
    path = _writable(options.out, run.folder / f"model{suffix}", (suffix,))
    print(f"用的是 {run.which}")
    if options.format == "safetensors":
        with _writing(path):
            export_safetensors(run.model, path, {"step": str(run.state["step"])})
        print(f"权重与构造参数在 {shown(path.resolve())}，读回的与原来逐位相同")
        return 0
    encoder, decoder = (path.with_name(f"{path.stem}-{part}.onnx") for part in ("encoder", "decoder"))
    with _writing(path):
        worst = export_onnx(run.model, encoder, decoder)
    checked = "没有装 onnxruntime，未与 torch 比对" if worst is None else f"与 torch 至多差 {worst:.1g}"
    print(f"编码器 x → mu, log_var 在 {shown(encoder.resolve())}\n解码器 z → image 在 {shown(decoder.resolve())}\n（{checked}）")
    return 0


# ---------------------------------------------------------------- 图从哪里来


def decode(model: VanillaVAE, z: Tensor, size: int = 64) -> Iterator[Tensor]:
    """``z [N, L]`` 一批一批地解码成 uint8 ``[B, C, H, W]``，在 CPU 上；内存只随 ``size`` 增长。"""
    weight = model.fc_mu.weight
    for part in z.split(size):
        with torch.no_grad(), eval_mode(model):
            yield to_uint8(model.decode(part.to(weight.dtype).to(weight.device))).cpu()


def _data(run: Opened, options: argparse.Namespace) -> ImageSet:
    """训练时的数据；``--data``、``--root`` 可以另外指明。"""
    extra, model = run.state["extra"], run.model
    chosen = {name: value for name in ("data", "root") if (value := getattr(options, name, None)) is not None}
    if "data" not in chosen and "data" not in extra:
        raise ValueError(
            "检查点没有记下数据从哪里来（它来自 Python 里的 train）；请加 --data 名字或图片文件夹指明（torchvision 的数据再加 --root），"
            "须是训练时的那一份。"
        )
    size = {"image_size": model.image_size, "channels": model.in_channels}
    data = load_data({**DATA_DEFAULTS, **{name: extra[name] for name in DATA_DEFAULTS if name in extra}, **chosen, **size})
    if run.state.get("data") not in (None, data.digest()):
        print("注意：这批图与训练时的不同，其中的测试图可能有训练时用过的。")
    return data


def _own(model: VanillaVAE, path: str, limit: int) -> Tensor:
    images, notes = read_pictures(path, model.image_size, model.in_channels, limit=limit)
    for note in notes:
        print(f"注意：{note}")
    return images


def fitted_prior(run: Opened, train: Tensor | Callable[[], Tensor], data: str | None = None) -> Mixture:
    """用训练图 ``[N, C, H, W]`` 的隐变量拟合的先验，存在运行文件夹里；换了权重或数据就重新拟合。"""
    key = hashlib.blake2b(repr((run.state.get("data"), data)).encode(), digest_size=16)
    for name, value in run.state["model"].items():
        key.update(name.encode() + value.contiguous().view(-1).numpy().tobytes())
    path = run.folder / PRIOR
    mixture = load_prior(path, key.hexdigest())
    if mixture is None:
        train = train() if callable(train) else train
        print(f"用 {len(train)} 张训练图的隐变量拟合先验……", flush=True)
        mixture = fit_prior(run.model, train)
        try:
            save_prior(path, key.hexdigest(), mixture)
        except OSError as error:
            print(f"注意：先验存不进 {shown(path)}（{system_reason(error, advice=False)}），下次要重新拟合。")
    print(f"先验：{len(mixture.weights)} 个高斯的混合")
    return mixture


# ---------------------------------------------------------------- 写到哪里


def figure_path(out: str | None, default: Path, images: int = 1) -> Path:
    """图写到哪里；不能写的、一张图拼不下的，动手之前就拒绝。

    Raises:
        ValueError, OSError: 后缀不认得，是文件夹，不能写，或小图太多。
    """
    if images > MOST_IN_A_FIGURE:
        raise ValueError(f"一张图至多拼 {MOST_IN_A_FIGURE} 张小图，这里要 {images} 张；请减小 --num，抽样也可以改用 --format png 或 npz。")
    return _writable(out, default, tuple(FORMATS))


def _writable(out: str | None, default: Path, suffixes: tuple[str, ...]) -> Path:
    text = str(default) if out is None else out
    path = Path(text).expanduser()
    with _writing(path):
        if not text or "\0" in text:
            raise ValueError(f"--out 应为文件的路径，收到 {shown(text)!r}；例如 {default.name}。")
        if text.endswith(("/", os.sep)) or path.is_dir():
            raise IsADirectoryError(f"--out 应为文件，收到的 {shown(text)} 是文件夹；请写明文件名，例如 {shown(path / default.name)}。")
        if path.suffix.lower() not in suffixes:
            came = f"后缀是 {shown(path.suffix)}" if path.suffix else "没有后缀"
            raise ValueError(f"--out 的{came}，这里能写 {' '.join(suffixes)}；请改用其中之一。")
        _check_parent(path)
    return path


def _new_folder(out: str | None, default: Path) -> Path:
    """一个还不存在的文件夹；没有指明就在默认的名字后面加编号。"""
    if out is None:
        names = (default if number == 1 else default.with_name(f"{default.name}-{number}") for number in count(1))
        return next(path for path in names if not path.exists())
    path = Path(out).expanduser()
    with _writing(path):
        if not out or "\0" in out:
            raise ValueError(f"--out 应为新文件夹的路径，收到 {shown(out)!r}；例如 {default.name}。")
        if path.exists():
            raise FileExistsError(f"{shown(path)} 已经存在；--format png 写进一个新的文件夹，请换一个名字。")
        _check_parent(path)
    return path


def _check_parent(path: Path) -> None:
    parent = next(each for each in path.absolute().parents if each.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"{shown(parent)} 是一个文件，里面放不下 {shown(path.name)}；请换一个位置。")
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"没有权限写进 {shown(parent)}；请用 --out 换一个位置。")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """系统写文件时的错误换成一句话。"""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # 是我们自己说清的
            raise
        raise OSError(f"{shown(path)} 写不成（{system_reason(error, advice=False)}）；请检查磁盘空间与权限，或用 --out 换一个位置。") from error


# ---------------------------------------------------------------- 写什么


def _png_metadata() -> PngImagePlugin.PngInfo:
    metadata = PngImagePlugin.PngInfo()
    metadata.add_text("Software", SOFTWARE)
    return metadata


def _write_pngs(model: VanillaVAE, z: Tensor, folder: Path) -> None:
    """每张一个文件：00000.png …"""
    width, metadata, done = max(5, len(str(len(z) - 1))), _png_metadata(), 0
    with _writing(folder):
        folder.mkdir(parents=True)
        for part in decode(model, z):
            for image in part.permute(0, 2, 3, 1).numpy():
                Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(folder / f"{done:0{width}}.png", pnginfo=metadata)
                done += 1


def _write_npz(model: VanillaVAE, z: Tensor, file, about: dict[str, object]) -> None:
    """``images`` uint8 ``[N, H, W, C]``，与 ``about`` 的各项；边解码边写，不把全部的图留在内存里。"""
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            shape = (len(z), model.image_size, model.image_size, model.in_channels)
            np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for part in decode(model, z):
                member.write(part.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
        for name, value in about.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(value))


def _report(figure, path: Path) -> int:
    save_figure(figure, path)
    print(f"图在 {shown(path.resolve())}")
    return 0


def pairs(model: VanillaVAE, images: Tensor):
    """原图与重建逐行相间；uint8 ``[N, C, H, W]``，一行至多 8 张，末一行不满就空着。"""
    from vaelab import plot

    device = model.fc_mu.weight.device
    recons = torch.cat([to_uint8(model.generate(to_float(part.to(device)))).cpu() for part in images.split(64)])
    lines = -(-len(images) // 8)
    columns = -(-len(images) // lines)
    blank = torch.full((lines * columns - len(images), *images.shape[1:]), 255, dtype=torch.uint8)
    rows = zip(*(torch.cat([part.cpu(), blank]).split(columns) for part in (images, recons)))
    return plot.grid(torch.cat([row for pair in rows for row in pair]), columns, title="原图与重建", row_labels=["原图", "重建"] * lines)


# 后缀 → savefig 的参数。只列 matplotlib 自己就写得出的；元数据各种格式写法不同
_EXIF = Image.Exif()
_EXIF[0x0131] = SOFTWARE
_PIL = {"pil_kwargs": {"exif": _EXIF}}
FORMATS: dict[str, dict] = {
    ".png": {"metadata": {"Software": SOFTWARE}},
    ".jpg": _PIL, ".jpeg": _PIL, ".webp": _PIL, ".tif": {}, ".tiff": {},
    ".pdf": {"metadata": {"Creator": SOFTWARE}}, ".svg": {"metadata": {"Creator": SOFTWARE}}, ".eps": {"metadata": {"Creator": SOFTWARE}},
}  # fmt: skip


def save_figure(figure, path: Path) -> None:
    """图写成文件，格式由后缀定（见 ``FORMATS``）；关掉它。"""
    import matplotlib.pyplot as plt

    suffix = path.suffix.lower()
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: figure.savefig(file, format=suffix[1:], dpi=150, **FORMATS[suffix]))
    plt.close(figure)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} KB"
