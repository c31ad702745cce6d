"""用训练过的模型：抽样、重建、插值、评价；图写成文件。"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from vaelab.checkpoint import load_checkpoint, load_model
from vaelab.data import load
from vaelab.evaluate import evaluate, log_likelihood_bound
from vaelab.files import write_atomically
from vaelab.images import to_float
from vaelab.runs import latest_run, load_data
from vanilla_vae import VanillaVAE


def sample(options: argparse.Namespace) -> int:
    from vaelab import plot

    run, model, _ = _open_run(options)
    plot.use_chinese_font()
    images = model.sample(options.num, generator=torch.Generator().manual_seed(options.seed))
    columns = min(10, max(1, round(options.num**0.5)))
    return _report(plot.grid(images, columns, title="先验样本"), options, run / f"sample-{options.seed}.png")


def reconstruct(options: argparse.Namespace) -> int:
    from vaelab import plot

    run, model, extra = _open_run(options)
    if options.num < 1:
        raise ValueError(f"--num 应为正整数，收到 {options.num}；请改为 1 或更大的数。")
    if options.images is None:
        images = load_data(extra).test
    else:
        data = load(options.images, image_size=model.image_size, channels=model.in_channels)
        for note in data.notes:
            print(f"注意：{note}")
        images = torch.cat([data.test, data.train])
    plot.use_chinese_font()
    return _report(pairs(model, images[: options.num]), options, run / "reconstruct.png")


def interpolate(options: argparse.Namespace) -> int:
    from vaelab import plot

    run, model, extra = _open_run(options)
    if options.steps < 2:
        raise ValueError(f"--steps 应至少为 2（两端各一张），收到 {options.steps}；请加大它。")
    test = load_data(extra).test
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


def evaluate_run(options: argparse.Namespace) -> int:
    run, model, extra = _open_run(options)
    if options.importance_samples < 0:
        raise ValueError(f"--importance-samples 应为正整数，收到 {options.importance_samples}；例如 64。")
    data = load_data(extra)
    result = evaluate(model, data.test)
    print(f"{run}\n{result.summary()}")
    if options.importance_samples:
        bound, stderr = log_likelihood_bound(model, data.test, result.sigma2, options.importance_samples)
        print(f"  重要性加权下界（K = {options.importance_samples}）{bound:.1f} ± {stderr:.1f} nat/图")
    return 0


def _open_run(options: argparse.Namespace) -> tuple[Path, VanillaVAE, dict]:
    run = Path(options.run) if options.run else latest_run()
    model = load_model(run, options.device)
    return (run if run.is_dir() else run.parent), model, load_checkpoint(run)["extra"]


def _report(figure, options: argparse.Namespace, default: Path) -> int:
    path = Path(options.out) if options.out else default
    save_figure(figure, path)
    print(f"图在 {path.resolve()}")
    return 0


def pairs(model: VanillaVAE, images: Tensor):
    """原图与重建逐行相间。"""
    from vaelab import plot

    device = model.fc_mu.weight.device
    real = to_float(images)
    recons = torch.cat([model.generate(part.to(device)).float().cpu() for part in real.split(64)])
    columns = min(8, len(real))
    keep = len(real) // columns * columns
    rows = [row for pair in zip(real[:keep].split(columns), recons[:keep].split(columns)) for row in pair]
    return plot.grid(torch.cat(rows), columns, title="原图与重建", row_labels=["原图", "重建"] * (keep // columns))


def save_figure(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
    plt.close(figure)
