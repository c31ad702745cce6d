"""命令行的每一个参数：写错了，一句中文，在做任何活之前；什么也不写。"""

import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from vaelab import cli
from vaelab.arguments import build_parser, check_early, version
from vaelab.interrupts import explain
from vaelab.parser import Parser, UsageError, did_you_mean
from vaelab.processes import join, pick_device

NUMBERS = [str(10**30), str(-(10**30)), "1e400", "nan", "-inf", "一", "", " ", "0x10", "9" * 5000, "\0", "\udcff", "1e-3.5", "--"]
PATHS = ["", "\0", "a\0b", "a" * 5000, "文件/里面"]
WORDS = ["fp23", "", "ＧＰＵ", "auto ", "on,off", "\u202eno", "a" * 5000]
DEVICES = ["meta", "cuda:99", "cuda:-1", "cuda:99999999999", "cpu:x", "tpu", "xla", "hpu", "mkldnn", "", "\n", "privateuseone", "fpga"]
COMMANDS = build_parser()._subparsers._group_actions[0].choices


def refused(capsys, *arguments: object) -> tuple[int, str]:
    """运行并期待被拒绝：标准错误只有一句中文，没有 traceback。"""
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    sentence = err.rstrip("\n")
    assert code in (1, 2), (arguments, code, out, err)
    assert sentence.startswith("错误：") and sentence.endswith("。") and "\n" not in sentence, (arguments, err)
    assert not re.search(r"[a-z]{2,}( [a-z]{2,}){2,}", sentence) and "没有料到" not in sentence, (arguments, sentence)
    assert sentence.isprintable() and len(sentence) < 700, (arguments, sentence)
    return code, sentence


def options_with_values() -> list[tuple[str, str]]:
    return [(name, option) for name, command in COMMANDS.items() for option, takes in command.takes_value.items() if takes and option != "-h"]


def bad_values(command: str, option: str) -> list[str]:
    (action,) = (each for each in COMMANDS[command]._actions if option in each.option_strings)
    if option == "--device":
        return DEVICES
    if action.choices:
        return WORDS + NUMBERS
    if option in ("--lr", "--kld-weight"):
        return [value for value in NUMBERS if value != str(10**30)]  # 荒唐，却是一个数：训练会在第一步说不行
    return NUMBERS if action.metavar in ("N", "X", "K", "秒", "天", "N,N,…", "X|optimal") else PATHS


@pytest.mark.parametrize("command, option", options_with_values())
def test_no_value_gets_deeper_than_one_sentence(command, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "文件").write_text("不是文件夹", encoding="utf-8")
    if command not in cli.COMMANDS:
        monkeypatch.setitem(cli.COMMANDS, command, lambda options: cli.using._open_run(options))
    for value in bad_values(command, option):
        rest = ["--data", "nowhere"] if command == "train" and option != "--data" else [] if command in ("train", "cache") else ["nowhere"]
        pair = [f"{option}={value}"] if value.startswith("-") else [option, value]
        pair += ["另一张"] * (COMMANDS[command]._option_string_actions[option].nargs == 2)
        _, sentence = refused(capsys, command, *rest, *pair)
        if value not in PATHS[2:] and option not in ("--data", "--root"):
            assert "nowhere" not in sentence, (option, value, sentence)  # 先于数据与检查点
        assert [path.name for path in tmp_path.iterdir()] == ["文件"]
    for missing in ([option], [f"{option}"]):
        code, sentence = refused(capsys, command, *missing)
        assert code == 2 and option in sentence


@given(st.sampled_from(options_with_values()), st.text(max_size=20))
def test_any_text_is_parsed_or_refused_in_chinese(which, text):
    command, option = which
    try:
        check_early(build_parser().parse_args([command, option, text]))
    except (ValueError, OSError) as error:
        sentence = explain(error)
        assert sentence.endswith("。") and "没有料到" not in sentence and re.search("[\u4e00-\u9fff]", sentence)
    except SystemExit as ended:
        assert ended.code == 0 and text in ("-h", "--help")


@pytest.mark.parametrize(
    "arguments, code, wanted",
    [
        ("train --epoch 3", 2, "--epochs"),
        ("train --lr-rate 3", 2, "写 --lr；"),
        ("train --image_size 64", 2, "--image-size"),
        ("train -epochs 3", 2, "--epochs"),
        ("train --hiden-dims 3", 2, "--hidden-dims"),
        ("train --d 3", 2, "--data-seed"),
        ("trian --epochs 3", 2, "你是不是想写 train"),
        ("smaple", 2, "你是不是想写 sample"),
        ("--precision fp23", 2, "你是不是想写 fp32"),
        ("--data fases", 1, "faces"),
        ("sample --format jpg", 2, "grid、png、npz"),
        ("--download=yes", 2, "不应有值"),
        ("train more words", 2, "加引号"),
        ("sample a b", 2, "多出来一个 b"),
        ("interpolate --images 一张", 2, "2 个值"),
        ("--lr -inf", 2, "--lr=值"),
        ("--epochs 3 --steps 4", 2, "只给一个"),
        ("--hidden-dims 100000,100000", 1, "GB"),
        ("--hidden-dims 1000000000,1000000000", 1, "数不出来"),
        ("--latent-dim 1000000000", 1, "GB"),
        ("--resume --latent-dim 1000000000", 1, "GB"),
        ("--count 1000000000", 1, "GB"),
        ("--image-size 65536", 1, "GB"),
        ("--count 10000000000000", 1, "--count 应为"),
        ("--batch-size 1000000000000", 1, "--batch-size 应为"),
        ("--kld-weight inf", 1, "kld_weight"),
        ("--lr 1e39", 1, "学习率"),
        ("--out 文件", 1, "是一个文件"),
        ("sample --out 文件/a.png", 1, "是一个文件"),
    ],
)
def test_what_was_meant_is_said(arguments, code, wanted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "文件").touch()
    came, sentence = refused(capsys, *arguments.split())
    assert came == code and wanted in sentence, sentence
    assert [path.name for path in tmp_path.iterdir()] == ["文件"]


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": "2", "RANK": "-1", "MASTER_ADDR": "localhost"},
        {"WORLD_SIZE": "2", "RANK": "7", "MASTER_ADDR": "localhost"},
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"},
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"},
        {"WORLD_SIZE": "٣", "RANK": "0"},
    ],
)
def test_rubbish_in_the_environment_is_named(variables, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert "环境变量" in refused(capsys, "train", "--data", "nowhere")[1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("timeout", [float("nan"), -1, 0, float("inf")])
def test_a_timeout_that_is_no_time_is_refused(timeout, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="秒数"), join("cpu", timeout):
        pass


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    locked = tmp_path / "锁着"
    locked.mkdir()
    locked.chmod(0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("root 与 Windows 不受权限约束")
    assert "不许" in refused(capsys, "--out", locked / "a")[1]


def test_the_backend_in_the_environment_does_not_matter(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "vanilla_vae.py", "sample", "nowhere"],
        cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", env={**os.environ, "MPLBACKEND": "nonsense"},
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("错误：没有检查点"), done.stderr


def test_errors_of_the_system_and_the_unexpected_are_told_apart(tmp_path, monkeypatch):
    for error, wanted in (
        (lambda: open(tmp_path), "是文件夹"),
        (lambda: open(tmp_path / "无" / "b"), "不存在"),
        (lambda: open(tmp_path / ("长" * 300)), "名字太长"),
        (lambda: {}["data"], "没有料到的 KeyError（test_arguments.py 第"),
        (lambda: int("x"), "没有料到的 ValueError"),
        (lambda: bytearray(10**18), "内存不够用"),
    ):
        with pytest.raises(Exception) as caught:
            error()
        assert wanted in explain(caught.value) and explain(caught.value).endswith("。")
    monkeypatch.setenv("VAELAB_DEBUG", "1")
    with pytest.raises(KeyError):
        explain(KeyError("data"))


def test_the_usage_is_printed_once_and_says_all(capsys):
    for name, command in COMMANDS.items():
        text = command.format_help()
        assert text.count("用法") == 1 and text.startswith(f"用法：vanilla_vae.py {name}")
        assert not re.search(r"usage:|options:|positional|optional arguments|show this", text)
    assert set(cli.COMMANDS) <= set(COMMANDS)


def test_the_version_is_that_of_this_project(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert ended.value.code == 0 and f'\nversion = "{version()}"\n' in project
    assert capsys.readouterr().out.startswith(f"vanilla_vae.py {version()}（torch ")


def test_whatever_argparse_says_itself_is_not_passed_on():
    """必需的、互斥的参数这里没有用；将来有了，标准库的英文也不会漏出来。"""
    parser = Parser(prog="x")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--a", action="store_true")
    group.add_argument("--b", action="store_true")
    parser.takes_value |= {"--a": False, "--b": False}
    for words in ([], ["--a", "--b"]):
        with pytest.raises(UsageError) as error:
            parser.parse_args(words)
        assert not re.search("[a-z]{2,} [a-z]{2,}", str(error.value).replace("--help", ""))


def test_suggestions_come_only_when_close():
    known = ("--epochs", "--data", "--data-seed", "--lr", "--kld-weight")
    assert did_you_mean("--xyz", known) == "" == did_you_mean("--", known)
    assert did_you_mean("--data-sed", known).endswith("--data-seed")


def test_a_device_is_one_that_computes():
    assert pick_device("cpu:3").index is None
    with pytest.raises(ValueError, match="用不了设备 meta"):
        pick_device("meta")
