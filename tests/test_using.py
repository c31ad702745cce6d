"""训练完的运行要有用：载入、抽样、重建、插值、概况、导出；最好的与更早的检查点；每一步的记录。"""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from conftest import ROOT
from vaelab import cli, plot, using
from vaelab.checkpoint import BEST, CHECKPOINT, best_row, build_model, earlier_checkpoints, load_checkpoint, load_model
from vaelab.config import TrainConfig, TrainingError
from vaelab.data import load
from vaelab.export import export_onnx, export_safetensors
from vaelab.files import copy_atomically
from vaelab.images import to_float
from vaelab.steplog import COLUMNS, STEPS, TENSORBOARD
from vaelab.train import train
from vanilla_vae import VanillaVAE

CONFIG = TrainConfig(epochs=3, batch_size=16, lr=2e-3, kld_weight=1e-3, seed=1, precision="fp32")
QUIET = {"device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def data():
    return load("faces", image_size=16, count=100)


def new_model(seed: int = 0) -> VanillaVAE:
    torch.manual_seed(seed)
    return VanillaVAE(3, 4, [8, 16], image_size=16)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """一次真的训练，另开进程，如同读者敲下命令。"""
    folder = tmp_path_factory.mktemp("work")
    small = "--count 60 --image-size 16 --hidden-dims 4,8 --latent-dim 3 --epochs 2 --batch-size 8 --precision fp32 --device cpu"
    done = subprocess.run([sys.executable, ROOT / "vanilla_vae.py", *small.split()], cwd=folder, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "faces"


@pytest.fixture(scope="module")
def python_run(data, tmp_path_factory) -> Path:
    """在 Python 里训练的：没有记下数据从哪里来。"""
    out = tmp_path_factory.mktemp("python")
    train(new_model(), data, replace(CONFIG, epochs=1), out, **QUIET)
    return out


def works(capsys, *arguments: object) -> str:
    assert cli.main([*map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def fails(capsys, *arguments: object) -> str:
    """期待失败：一句话，没有 traceback。"""
    assert cli.main([*map(str, arguments)]) in (1, 2)
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("错误：") and message.endswith("。")
    return message


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- 载入


def test_the_three_lines_in_the_readme_draw(run):
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("### 用训练过的模型")[1]
    code = re.search(r"```python\n(.*?)```", section, re.S)[1]
    assert len(code.split("\n\n")) <= 2 and len([line for line in code.splitlines() if line]) == 3
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    subprocess.run([sys.executable, "-c", code], cwd=run.parent.parent, env=environment, check=True)
    with Image.open(run.parent.parent / "samples.png") as image:
        assert len(set(image.convert("L").tobytes())) > 20


def test_info_tells_what_a_run_is_and_its_lines_work(run, capsys, monkeypatch, tmp_path):
    text = works(capsys, "info", run)
    for word in ("faces", "隐变量 3 维", "第 2 轮（共 2 轮）", "最好一轮", "best.pt", "history.csv", str(run.resolve())):
        assert word in text
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line.strip() for line in text.splitlines() if line.startswith(("  from ", "  model = ", "  plot."))), {})
    assert (tmp_path / "samples.png").is_file()


def test_an_altered_checkpoint_is_refused_in_one_sentence(python_run):
    state = load_checkpoint(python_run)
    for arguments in ({"latent_dim": 10**9}, {"hidden_dims": [10**5, 10**5]}, {"hidden_dims": "宽"}, {"image_size": 7}, {"更多": 1}):
        with pytest.raises(ValueError, match="它被改动过"):
            build_model({**state, "model_args": {**state["model_args"], **arguments}})
    with pytest.raises(ValueError, match="它被改动过"):
        build_model({**state, "model": {**state["model"], "fc_mu.bias": torch.zeros(5)}})


@given(st.binary(max_size=300))
@example(b"broken")
def test_any_bytes_are_refused_as_a_checkpoint_in_one_sentence(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="不完整或不是检查点|不是检查点；|可执行的内容"):
        load_checkpoint(path)


# ---------------------------------------------------------------- 最好的、最后的、更早的


def test_best_last_and_earlier_are_what_their_names_say(data, tmp_path):
    # 测试图是训练图的反色：学得越久越差，最后的一定不是最好的
    inverted = replace(data, test=255 - data.test)
    history = train(new_model(), inverted, replace(CONFIG, epochs=10, lr=1e-2), tmp_path, keep=99, **QUIET)
    best = best_row(history)
    assert best["test_elbo"] == max(row["test_elbo"] for row in history) and best["step"] < 50
    saved = {path.name: load_checkpoint(path) for path in tmp_path.glob("*.pt")}
    assert set(saved) == {BEST, CHECKPOINT, *(f"checkpoint-{step:05d}.pt" for step in range(5, 50, 5))}
    assert saved[CHECKPOINT]["step"] == 50 and saved[BEST]["step"] == best["step"]
    assert all(saved[name]["step"] == int(name[11:16]) for name in saved if name not in (BEST, CHECKPOINT))
    assert same_weights(saved[BEST]["model"], saved[f"checkpoint-{best['step']:05d}.pt"]["model"])
    assert same_weights(load_model(tmp_path).state_dict(), saved[BEST]["model"])
    assert same_weights(load_model(tmp_path / CHECKPOINT).state_dict(), saved[CHECKPOINT]["model"])


def test_going_back_to_an_earlier_one_loses_nothing_and_gives_the_same_numbers(data, tmp_path):
    config = replace(CONFIG, epochs=6)
    train(new_model(), data, config, tmp_path, keep=2, log_every=1, **QUIET)
    assert [path.name for path in earlier_checkpoints(tmp_path)] == ["checkpoint-00020.pt", "checkpoint-00025.pt"]
    last, best = load_checkpoint(tmp_path / CHECKPOINT), load_checkpoint(tmp_path / BEST)
    train(new_model(9), data, replace(config, epochs=5, lr=1e-3), tmp_path, resume=tmp_path / "checkpoint-00020.pt", log_every=1, **QUIET)
    assert load_checkpoint(tmp_path)["step"] == 25 and same_weights(load_checkpoint(tmp_path / "checkpoint-00030.pt")["model"], last["model"])
    assert any(same_weights(load_checkpoint(path)["model"], best["model"]) for path in tmp_path.glob("*.pt"))
    train(new_model(9), data, config, tmp_path / "另一处", resume=tmp_path / "checkpoint-00020.pt", **QUIET)
    assert same_weights(load_checkpoint(tmp_path / "另一处")["model"], last["model"])
    assert [int(row["step"]) for row in steps(tmp_path)] == [*range(1, 26)]


def test_full_disk_loses_neither_best_nor_last(data, tmp_path):
    resource = pytest.importorskip("resource", reason="只有 POSIX 能限制文件大小")
    train(new_model(), data, replace(CONFIG, epochs=2), tmp_path, keep=1, log_every=1, **QUIET)
    good = {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (len(good[CHECKPOINT]) // 2, 300):  # 装不下检查点；连 steps.csv 也装不下
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(TrainingError, match="腾出磁盘空间.*--resume"):
                train(new_model(), data, replace(CONFIG, epochs=3), tmp_path, resume=True, log_every=1, **QUIET)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        for name in (BEST, CHECKPOINT):
            assert (tmp_path / name).read_bytes() == good[name]
        assert not list(tmp_path.glob("*.tmp"))


def test_without_hard_links_it_copies(tmp_path, monkeypatch):
    """exFAT 与有的网络盘做不到硬链接。"""

    def refuse(*_: object) -> None:
        raise OSError(95, "不支持")

    (tmp_path / "a").write_bytes(b"1" * 1000)
    copy_atomically(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").stat().st_ino == (tmp_path / "a").stat().st_ino
    copy_atomically(tmp_path / "a", tmp_path / "b")  # 已是同一个文件
    monkeypatch.setattr(os, "link", refuse)
    copy_atomically(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"1" * 1000 and (tmp_path / "b").stat().st_ino != (tmp_path / "a").stat().st_ino
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


# ---------------------------------------------------------------- 每一步的记录


def steps(out: Path) -> list[dict]:
    with open(out / STEPS, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


KILLED = """
import sys, torch
torch.set_num_threads(1)
from vaelab.config import TrainConfig
from vaelab.data import load
from vaelab.train import train
from vanilla_vae import VanillaVAE
torch.manual_seed(0)
config = TrainConfig(epochs=int(sys.argv[2]), batch_size=16, lr=2e-3, kld_weight=1e-3, seed=1, precision="fp32")
train(VanillaVAE(3, 4, [8, 16], image_size=16), load("faces", image_size=16, count=100), config, sys.argv[1],
      resume=len(sys.argv) > 3, keep=2, log_every=1, device="cpu", progress=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows 没有 SIGKILL")
def test_killed_at_any_moment_every_file_loads_and_the_log_has_each_step_once(data, tmp_path):
    epochs, out, moment = 30, tmp_path / "run", random.Random(0)

    def start(*more: str) -> subprocess.Popen:
        command = [sys.executable, "-c", KILLED, str(out), str(epochs), *more]
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})

    for attempt in range(2):
        process = start(*["resume"] * (attempt > 0))
        before = load_checkpoint(out)["step"] if attempt else 0
        while process.poll() is None and not ((out / CHECKPOINT).exists() and load_checkpoint(out)["step"] > before):
            time.sleep(0.005)
        time.sleep(moment.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in out.glob("*.pt"):
            assert load_model(path).latent_dim == 4
        assert int(steps(out)[-1]["step"]) >= load_checkpoint(out)["step"]
    assert start("resume").wait() == 0
    rows = steps(out)
    assert [int(row["step"]) for row in rows] == [*range(1, epochs * 5 + 1)] and tuple(rows[0]) == COLUMNS
    whole = tmp_path / "whole"
    history = train(new_model(), data, replace(CONFIG, epochs=epochs), whole, log_every=1, **QUIET)
    assert rows == steps(whole)
    assert np.mean([float(row["mse"]) for row in rows[-5:]]) == pytest.approx(history[-1]["mse"], rel=1e-5)
    assert same_weights(load_model(out).state_dict(), load_model(whole).state_dict())


def test_tensorboard_gets_each_step_once_or_says_what_to_install(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(ValueError, match="pip install tensorboard"):
            train(new_model(), data, CONFIG, tmp_path / "none", tensorboard=True, **QUIET)
        assert not (tmp_path / "none").exists()
    pytest.importorskip("tensorboard", reason="没有装 tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for epochs in (2, 3):
        train(new_model(), data, replace(CONFIG, epochs=epochs), tmp_path / "a", resume=epochs > 2, tensorboard=True, log_every=5, **QUIET)
    events = EventAccumulator(str(tmp_path / "a" / TENSORBOARD)).Reload()
    assert [event.step for event in events.Scalars("train/mse")] == [5, 10, 15]
    assert [event.step for event in events.Scalars("test/elbo")] == [5, 10, 15]


@pytest.mark.parametrize("wrong", [{"keep": -1}, {"keep": 1.5}, {"log_every": -1}, {"log_every": True}])
def test_bad_counts_are_named_before_anything_is_written(data, tmp_path, wrong):
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(wrong))} 应为非负整数，收到"):
        train(new_model(), data, CONFIG, tmp_path / "a", **wrong, **QUIET)
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------- 抽样


def test_samples_as_files_and_as_an_array_are_those_of_the_model(run, tmp_path, capsys):
    model = load_model(run)
    z = torch.randn((70, 3), generator=torch.Generator().manual_seed(5))
    wanted = torch.cat(list(using.decode(model, z, size=9))).permute(0, 2, 3, 1).numpy().astype(int)
    direct = model.sample(70, generator=torch.Generator().manual_seed(5))
    assert np.abs((direct.permute(0, 2, 3, 1).numpy() + 1) * 127.5 - wanted).max() < 1
    for _ in range(2):
        works(capsys, "sample", run, "--seed", 5, "--num", 70, "--format", "png")
    works(capsys, "sample", run, "--seed", 5, "--num", 70, "--out", tmp_path / "a.npz")
    for folder in ("sample-5", "sample-5-2"):  # 第二次另起一个文件夹，不覆盖
        names = sorted(path.name for path in (run / folder).iterdir())
        assert names == [f"{number:05d}.png" for number in range(70)]
        for name, image in zip(names, wanted):
            with Image.open(run / folder / name) as picture:
                assert np.abs(np.asarray(picture).astype(int) - image).max() <= 1 and picture.text["Software"] == "vaelab"
    with np.load(tmp_path / "a.npz") as saved:
        assert saved["images"].dtype == np.uint8 and np.abs(saved["images"].astype(int) - wanted).max() <= 1
        assert (saved["seed"], saved["prior"], saved["step"]) == (5, "standard", load_checkpoint(run / BEST)["step"])


def test_grey_samples_are_single_channel_files(tmp_path, capsys):
    torch.manual_seed(0)
    using._write_pngs(VanillaVAE(1, 2, [4], image_size=8), torch.zeros(2, 2), tmp_path / "grey")
    with Image.open(tmp_path / "grey" / "00001.png") as picture:
        assert picture.mode == "L" and picture.size == (8, 8)


@pytest.mark.parametrize("suffix", [*using.FORMATS, ".JPG"])
def test_the_suffix_decides_what_is_written(run, tmp_path, capsys, suffix):
    path = tmp_path / f"图{suffix}"
    works(capsys, "sample", run, "--num", 4, "--out", path)
    start = path.read_bytes()[:600]
    magic = {"png": b"\x89PNG", "jpg": b"\xff\xd8\xff", "jpeg": b"\xff\xd8\xff", "webp": b"RIFF", "pdf": b"%PDF", "svg": b"<?xml", "eps": b"%!PS"}
    assert start.startswith(magic.get(suffix[1:].lower(), (b"II", b"MM")))
    if suffix not in (".tif", ".tiff"):
        assert b"vaelab" in path.read_bytes()


def test_what_cannot_be_written_is_refused_before_any_work(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "文件").write_bytes(b"1")
    (tmp_path / "夹").mkdir()
    cases = [
        (["sample", run, "--out", "a.txt"], ".png .jpg"),
        (["sample", run, "--out", "没有后缀"], "没有后缀"),
        (["sample", run, "--out", "夹"], "是文件夹"),
        (["sample", run, "--out", "新的/"], "是文件夹"),
        (["sample", run, "--out", "文件/a.png"], "是一个文件"),
        (["sample", run, "--out", "a\nb.tx\tt"], r".tx\tt"),
        (["sample", run, "--out", "长" * 300 + ".png"], "写不成"),
        (["sample", run, "--num", "2001"], "--format png"),
        (["sample", run, "--format", "png", "--out", "夹"], "已经存在"),
        (["sample", run, "--format", "npz", "--out", "a.png"], ".npz"),
        (["reconstruct", run, "--num", "1001"], "减小 --num"),
        (["reconstruct", run, "--images", "夹"], "没有图片"),
        (["reconstruct", run, "--out", "a.gif"], "后缀是 .gif"),
        (["interpolate", run, "--images", "夹", "文件"], "是文件夹"),
        (["interpolate", run, "--steps", "10000000"], "--steps"),
        (["export", run, "--out", "a.bin"], ".safetensors"),
    ]
    for arguments, expected in cases:
        assert expected in fails(capsys, *arguments), arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["夹", "文件"])


def test_sampling_from_the_fitted_prior_is_cached_for_these_weights_and_this_data(run, tmp_path, capsys):
    def draw(name: str, *more: object) -> tuple[str, bytes]:
        text = works(capsys, "sample", run, "--prior", "fitted", "--num", 4, "--out", tmp_path / name, *more)
        return text, (tmp_path / name).read_bytes()

    (run / using.PRIOR).unlink()  # 训练完画图时拟合过
    (first, a), (second, b) = draw("a.png"), draw("b.png")
    assert "拟合先验" in first and "拟合先验" not in second and a == b
    (run / using.PRIOR).write_bytes(b"broken")
    again, c = draw("c.png")
    assert "拟合先验" in again and a == c
    fitted, plain = tmp_path / "a.png", tmp_path / "d.png"
    works(capsys, "sample", run, "--num", 4, "--out", plain)
    assert fitted.read_bytes() != plain.read_bytes()


# ---------------------------------------------------------------- 自己的图，没有记下数据的训练


def test_num_means_what_it_says(python_run, data):
    model = load_model(python_run)
    for num, shape in ((1, (1, 2)), (8, (8, 2)), (9, (5, 4)), (10, (5, 4))):
        figure = using.pairs(model, data.test[:num])
        tiles = figure.axes[0].images[0].get_array()
        columns, rows = (tiles.shape[1] + 2) // 18, (tiles.shape[0] + 2) // 18
        assert (columns, rows) == shape
        if num % columns:  # 空的是末一行原图与末一行重建的最后一格，重建仍在原图的正下方
            assert all((tiles[18 * r : 18 * r + 16, 18 * (columns - 1) :] == 255).all() for r in (rows - 2, rows - 1))
        blank = sum((tiles[18 * r : 18 * r + 16, 18 * c : 18 * c + 16] == 255).all() for r in range(rows) for c in range(columns))
        assert columns * rows - blank == 2 * num
        for index in range(num):  # 每一张原图都在它的位置上
            r, c = 2 * (index // columns), index % columns
            assert (tiles[18 * r : 18 * r + 16, 18 * c : 18 * c + 16] == data.test[index].permute(1, 2, 0).numpy()).all()
        plot.plt.close(figure)


def test_runs_from_python_work_or_say_what_is_missing(python_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VAELAB_CACHE", str(python_run / "cache"))
    for number in range(24):
        Image.new("RGB", (20, 20), (10 * number, 100, 255 - 10 * number)).save(tmp_path / f"{number}.png")
    for command in (["evaluate"], ["reconstruct"], ["interpolate"], ["sample", "--prior", "fitted"]):
        assert "--data" in fails(capsys, command[0], python_run, *command[1:])
        text = works(capsys, command[0], python_run, *command[1:], "--data", tmp_path)
        assert "这批图与训练时的不同" in text
    again = ["sample", python_run, "--prior", "fitted", "--data"]
    assert "拟合先验" not in works(capsys, *again, tmp_path)
    assert "拟合先验" in works(capsys, *again, "faces")  # 换了数据，重新拟合
    works(capsys, "reconstruct", python_run, "--images", tmp_path / "1.png", "--out", "一张.png")
    works(capsys, "interpolate", python_run, "--images", tmp_path / "1.png", tmp_path / "9.png", "--out", "两张.png")
    for command in ("info", "sample"):
        works(capsys, command, python_run)


# ---------------------------------------------------------------- 导出


def test_safetensors_rebuild_the_model(run, tmp_path):
    pytest.importorskip("safetensors", reason="没有装 safetensors")
    from safetensors import safe_open

    model, path = load_model(run), tmp_path / "a.safetensors"
    export_safetensors(model, path, {"step": "7"})
    with safe_open(path, "pt") as file:
        about, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    rebuilt = VanillaVAE(**json.loads(about["model_args"]))
    rebuilt.load_state_dict(weights)
    assert same_weights(rebuilt.state_dict(), model.state_dict()) and about["step"] == "7"


def test_onnx_gives_the_numbers_of_torch_for_any_batch(run, tmp_path, data):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"没有装 {name}")
    import onnxruntime

    model, paths = load_model(run), (tmp_path / "e.onnx", tmp_path / "d.onnx")
    assert export_onnx(model, *paths) < 1e-5
    encoder, decoder = (onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]) for path in paths)
    for size in (1, 2, 7):
        x = to_float(data.test[:1].repeat(size, 1, 1, 1))
        mu, log_var = encoder.run(["mu", "log_var"], {"x": x.numpy()})
        (image,) = decoder.run(["image"], {"z": mu})
        with torch.no_grad():
            wanted = model.encode(x)
            torch.testing.assert_close(torch.from_numpy(mu), wanted[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(torch.from_numpy(log_var), wanted[1], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(torch.from_numpy(image), model.decode(wanted[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind, package", [("safetensors", "safetensors"), ("onnx", "onnx")])
def test_a_missing_package_is_named(run, tmp_path, monkeypatch, capsys, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {package}" in fails(capsys, "export", run, "--format", kind, "--out", tmp_path / f"a.{kind}")
    assert not list(tmp_path.iterdir())
