"""各测试共用：小网络用一个线程更快，也使结果与机器的核数无关；真实数据在仓库旁边，没有就跳过。

笔记由 nbval 执行，它看不见的由 ``tests/figures_plugin.py`` 补上。
"""

import os
import signal
from pathlib import Path

# 空转的 OpenMP 线程会与别的程序抢 CPU。须在 import torch 之前；笔记的内核与测试起的子进程都继承这里设的环境变量。
import vaelab.prepare  # noqa: F401

os.environ.pop("MPLBACKEND", None)  # 集群上常设为 Agg，笔记的内核就一张图也不显示

import hypothesis
import matplotlib  # noqa: F401  存字体表的文件夹不能写，它改用临时的，记在环境变量里
import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # 放在后台的 pytest 不理 Ctrl-C，它起的进程也会不理
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["figures_plugin"]
ROOT = Path(__file__).resolve().parent

hypothesis.settings.register_profile("vae", deadline=None)  # 不拿快慢当对错
hypothesis.settings.load_profile("vae")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def one_thread_in_children():
    """测试起的进程也用一个线程：测试自己在旁边轮询，占着一个核。离开 tests/ 时恢复，笔记的内核不受影响。"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def mnist_root() -> Path:
    """放着真实 MNIST 的文件夹，布局同 torchvision。"""
    root = ROOT.parent / "shared" / "data"
    if not (root / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file():
        pytest.skip(f"没有真实的 MNIST（{root}），只在有它的机器上测试")
    return root


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """造好的课程网站，几个测试共用。"""
    build_site = pytest.importorskip("build_site", reason="造网站要 markdown-it-py、mdit-py-plugins、jinja2 与 pygments", exc_type=ImportError)
    out = tmp_path_factory.mktemp("site") / "site"
    build_site.build(out)
    return out
