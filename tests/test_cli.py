"""命令行：每个子命令在真的训练结果上都能用；坏输入得到一句中文，什么也不丢。"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import ROOT
from vaelab import cli
from vaelab.checkpoint import CHECKPOINT, load_checkpoint
from vaelab.files import command

SMALL = "--count 60 --image-size 16 --hidden-dims 4,8 --latent-dim 3 --epochs 2 --batch-size 8 --precision fp32".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """一次真的训练，另开进程，如同读者敲下命令。"""
    folder = tmp_path_factory.mktemp("work")
    command = [sys.executable, ROOT / "vanilla_vae.py", *SMALL]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "faces", done.stdout


def fails(capsys, *arguments: object) -> str:
    """运行并期待失败：退出码 1，命令写得不对则是 2；错误只有一句话，没有 traceback。"""
    assert cli.main([str(argument) for argument in arguments]) in (1, 2)
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("错误：") and message.endswith("。")
    return message


def is_picture(path) -> bool:
    with Image.open(path) as image:
        return len(set(image.convert("L").tobytes())) > 20


def test_training_ends_with_pictures_and_says_where(run):
    folder, output = run
    for name in ("reconstructions.png", "samples.png", "kl.png", "history.png"):
        assert is_picture(folder / name) and name in output
    assert str(folder.resolve()) in output and "接下来可以试" in output and "ELBO" in output


def test_the_commands_suggested_at_the_end_work(run, monkeypatch, capsys):
    folder, output = run
    monkeypatch.chdir(folder.parent.parent)
    suggested = re.findall(r"python vanilla_vae\.py (.+?)(?:   .*)?$", output, re.MULTILINE)
    assert len(suggested) == 3
    for line in suggested:
        assert cli.main(line.split()) == 0, capsys.readouterr().err
    assert load_checkpoint(folder)["history"][-1]["epoch"] == 4
    assert "注意：改了 epochs 2 → 4" in capsys.readouterr().out


def test_every_subcommand_works_on_the_latest_run(run, tmp_path, monkeypatch, capsys):
    folder, _ = run
    monkeypatch.chdir(folder.parent.parent)
    for arguments in (
        ["sample", "--num", "5"],
        ["reconstruct", "--num", "3"],
        ["interpolate", "--second", "4", "--steps", "3"],
        ["evaluate", "--importance-samples", "4"],
    ):
        assert cli.main(arguments) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    pictures = re.findall(r"图在 (.+)", output)
    assert len(pictures) == 3 and all(is_picture(path) for path in pictures)
    assert "重要性加权下界（K = 4）" in output


def test_same_seed_same_samples_other_seed_other_samples(run, tmp_path):
    folder, _ = run
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for path, seed in zip(paths, "112"):
        assert cli.main(["sample", str(folder), "--seed", seed, "--out", str(path)]) == 0
    a, b, c = (path.read_bytes() for path in paths)
    assert a == b != c


def test_own_pictures_train_and_reconstruct(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VAELAB_CACHE", str(tmp_path / "cache"))
    pictures = tmp_path / "我的 图片"
    pictures.mkdir()
    for i in range(24):
        Image.new("RGB", (20 + i, 30), (10 * i, 128, 255 - 10 * i)).save(pictures / f"{i}.png")
    (pictures / "坏.jpg").write_bytes(b"\xff\xd8\xff broken")
    assert cli.main(["--data", str(pictures), *SMALL]) == 0, capsys.readouterr().err
    assert "坏.jpg" in capsys.readouterr().out
    assert cli.main(["reconstruct", "runs/我的 图片", "--images", str(pictures)]) == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows 上不能只向子进程发信号")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_training_with_its_exit_code_and_nothing_lost(tmp_path, number, code):
    """真的信号：进度存好，说怎样接着走，退出码照惯例；照着说的做，接得上。"""
    arguments = [*SMALL, "--epochs", "100000"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "vanilla_vae.py", *arguments],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
    )  # fmt: skip
    out = tmp_path / "runs" / "faces"
    while process.poll() is None and not ((out / CHECKPOINT).exists() and load_checkpoint(out)["step"]):
        time.sleep(0.05)
    process.send_signal(number)
    output, errors = process.communicate()
    assert process.returncode == code and "Traceback" not in errors, errors
    step, said = load_checkpoint(out)["step"], re.search(r"第 (\d+) 步的进度存好了；接着训练：python vanilla_vae\.py (.+)", output)
    assert said and step == int(said[1]) > 0 and not (out / "samples.png").exists()
    again = [sys.executable, ROOT / "vanilla_vae.py", *shlex.split(said[2]), "--epochs", str(step // 6 + 1)]  # 54 张，每轮 6 步
    done = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and is_picture(out / "samples.png"), done.stderr


@pytest.mark.parametrize("command", ["", "train", "sample", "reconstruct", "interpolate", "evaluate"])
def test_help_is_chinese(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "用法：" in text and "选项" in text
    for english in ("usage:", "options:", "positional arguments", "show this help"):
        assert english not in text


def test_bad_input_gets_one_sentence(run, tmp_path, monkeypatch, capsys):
    folder, _ = run
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    before = (folder / CHECKPOINT).read_bytes()
    cases = [
        (["--data", "fases"], "faces"),
        (["--data", tmp_path / "无此处"], "没有文件夹"),
        (["--data", "empty"], "没有图片"),
        (["--data", "mnist", "--root", "nowhere"], "--download"),
        (["--data", "celeba", "--root", "nowhere"], "img_align_celeba"),
        (["--image-size", "50", "--hidden-dims", "4,4,4,4,4", "--count", "10"], "2 的 5 次方"),
        (["--hidden-dims", "4,x"], "逗号"),
        (["--hidden-dims", "4,-1", "--count", "10"], "正整数"),
        (["--kld-weight", "大"], "optimal"),
        (["--lr", "-1"], "学习率"),
        (["--batch-size", "1"], "batch_size"),
        (["--batch-size", "64", "--count", "50"], "训练图数"),
        (["--count", "1"], "count"),
        (["--bogus"], "--help"),
        (["dance"], "--help"),
        (["--out", folder], "--resume"),
        (["--resume"], "还没有训练结果"),
        (["--resume", "--out", "empty"], "没有检查点"),
        (["--resume", "--out", folder, "--epochs", "1"], "已走完"),
        (["--resume", "--out", folder, "--image-size", "32"], "同样的数据"),
        (["--resume", "--out", folder, "--latent-dim", "4", "--epochs", "99"], "同样的结构"),
        (["sample", "nowhere"], "没有检查点"),
        (["sample", folder, "--num", "0"], "正整数"),
        (["reconstruct", folder, "--num", "0"], "正整数"),
        (["reconstruct", folder, "--images", "empty"], "没有图片"),
        (["interpolate", folder, "--first", "999"], "编号"),
        (["interpolate", folder, "--steps", "1"], "两端"),
        (["evaluate", folder, "--importance-samples", "-2"], "应为 0 到"),
    ]
    if not torch.cuda.is_available():
        cases.append((["--device", "cuda", "--count", "10"], "用不了设备 cuda"))
    for arguments, expected in cases:
        assert expected in fails(capsys, *arguments), arguments
    assert (folder / CHECKPOINT).read_bytes() == before
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob(f"*/{CHECKPOINT}"))


def test_mnist_trains_and_resumes(mnist_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = f"--data mnist --root {mnist_root} --image-size 32 --hidden-dims 2,2 --latent-dim 2 --batch-size 2000".split()
    assert cli.main(["train", *arguments, "--epochs", "1"]) == 0, capsys.readouterr().err
    assert "训练 60000 张，测试 10000 张" in capsys.readouterr().out
    assert cli.main(["train", "--resume", "--epochs", "2"]) == 0, capsys.readouterr().err
    assert load_checkpoint("runs/mnist")["step"] == 60


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """自己的图片 ``甲``、``乙``，各 24 张；在 ``甲`` 上训练过的 ``r``。"""
    folder = tmp_path_factory.mktemp("own")
    for name, seed in (("甲", 0), ("乙", 1)):
        (folder / name).mkdir()
        pixels = torch.randint(256, (24, 16, 16, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        for index, each in enumerate(pixels.numpy()):
            Image.fromarray(each).save(folder / name / f"{index}.png")
    small = "--image-size 16 --hidden-dims 4,8 --latent-dim 3 --epochs 3 --precision fp32".split()
    assert cli.main(["train", "--data", str(folder / "甲"), *small, "--out", str(folder / "r")]) == 0
    return folder


def test_after_other_data_the_best_is_chosen_among_epochs_on_them_only(own_run, tmp_path):
    state = load_checkpoint(own_run / "r")
    state["history"] = [{**row, "test_elbo": 1e9} for row in state["history"]]  # 旧数据上的 ELBO 再高，也不能相比
    for name in (CHECKPOINT, "best.pt"):
        torch.save(state, tmp_path / name)
    assert cli.main(["train", "--resume", "--out", str(tmp_path), "--data", str(own_run / "乙"), "--other-data", "--epochs", "5"]) == 0
    best, last = load_checkpoint(tmp_path / "best.pt"), load_checkpoint(tmp_path)
    assert best["history"][-1]["epoch"] > 3 and best["data"] == last["data"] != state["data"] and last["since"] == 3
    assert load_checkpoint(tmp_path / f"checkpoint-{state['step']:05d}.pt")["data"] == state["data"]  # 旧数据上最好的还在
    assert cli.main(["train", "--resume", "--out", str(tmp_path), "--epochs", "6"]) == 0
    assert load_checkpoint(tmp_path)["since"] == 3


def test_the_same_pictures_under_another_name_are_the_same_data(own_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(own_run)
    shutil.copytree("r", tmp_path / "r")
    shutil.copytree("甲", tmp_path / "搬走的")
    for epochs, data in enumerate(("甲", "./甲/", tmp_path / "搬走的"), 4):
        assert cli.main(["train", "--resume", "--out", str(tmp_path / "r"), "--data", str(data), "--channels", "3", "--epochs", str(epochs)]) == 0
    assert "同样的数据" in fails(capsys, "train", "--resume", "--out", tmp_path / "r", "--data", "乙", "--epochs", 9)


@pytest.mark.parametrize("wrong", [["--epochs", "2"], ["--batch-size", "2"], ["--latent-dim", "5"]], ids=" ".join)
def test_resume_refuses_before_decoding_what_the_checkpoint_alone_decides(own_run, monkeypatch, capsys, wrong):
    monkeypatch.setenv("VAELAB_CACHE", "/dev/null/不会去解码")
    assert any(word in fails(capsys, "train", "--resume", "--out", own_run / "r", *wrong) for word in ("已走完", "批大小", "结构"))


def test_results_are_not_written_among_the_pictures(own_run, capsys):
    before = set((own_run / "乙").iterdir())
    assert "图片所在的文件夹" in fails(capsys, "train", "--data", own_run / "乙", "--out", own_run / "乙")
    assert set((own_run / "乙").iterdir()) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="要有 /dev/full")
@pytest.mark.parametrize("words", [["info"], ["--help"]], ids=" ".join)
def test_output_that_cannot_be_written_is_one_sentence(own_run, words):
    command = [sys.executable, ROOT / "vanilla_vae.py", *words, *([own_run / "r"] if words == ["info"] else [])]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment)
    assert (done.returncode, done.stderr.decode()) == (1, "错误：写不下，磁盘满了；请腾出空间。\n")


@pytest.mark.skipif(os.name == "nt", reason="Windows 的文件名没有这些")
@pytest.mark.parametrize("name", ['it\'s "q"', "换\n行", "-x", "$HOME `x`", "\x1b[31m", os.fsdecode(b"bad\xff")])
def test_a_printed_command_gives_the_name_back(name, tmp_path):
    line = command("info", Path(name))
    assert line.isprintable()
    script = f"printf '%s\\0' {line.partition('info ')[2]}"
    assert os.fsdecode(subprocess.check_output(["bash", "-c", script]).rstrip(b"\0")) in (name, f"./{name}")


def test_default_sizes_of_own_pictures_are_what_is_checked(own_run, capsys, tmp_path):
    data = ["train", "--data", own_run / "甲", "--steps", 1, "--out", tmp_path / "r"]
    assert cli.main([str(word) for word in [*data, "--image-size", 8]]) == 0
    assert "整除" in fails(capsys, *data[:-1], tmp_path / "s", "--image-size", 28)
    assert "只给一个" in fails(capsys, *data, "--minutes", 1)


def test_a_checkpoint_from_before_still_resumes(tmp_path, monkeypatch, capsys):
    """从前的检查点没有记下数据的摘要、翻转与换数据的步数。"""
    monkeypatch.chdir(tmp_path)
    assert cli.main(SMALL) == 0
    file = tmp_path / "runs" / "faces" / CHECKPOINT
    state = load_checkpoint(file)
    del state["config"]["mirror"], state["data"]
    state.pop("since", None)
    file.unlink()
    torch.save(state, file)
    (file.parent / "best.pt").unlink()
    assert cli.main(["train", "--resume", "--epochs", "3"]) == 0, capsys.readouterr().err
    assert [row["epoch"] for row in load_checkpoint(file)["history"]] == [1, 2, 3]
