"""笔记里的图怎样比较：由公式画出的处处一样，训练过的模型的图在另一种机器上由另一种标准来比；以及 nbval 看不见的其余几样。"""

import io
import os
import re
import subprocess
import sys

import matplotlib
import nbformat
import numpy as np
import pytest
import torch
from figures_plugin import _trained_difference, figure_difference, free_threads
from nbclient import NotebookClient
from torch.optim.optimizer import register_optimizer_step_post_hook

from conftest import ROOT
from vaelab import plot, provenance
from vaelab.faces import FACE_FACTORS, draw_faces

X = np.linspace(-4, 4, 200)


def draw(*curves: np.ndarray, title: str = "密度 $p(x)$", version: str = "", **style) -> bytes:
    """一张带标题、图例的曲线图，PNG；``version`` 假称是另一版 matplotlib 画的。"""
    plot.use_chinese_font()
    with matplotlib.rc_context(style):
        figure, axes = matplotlib.pyplot.subplots(figsize=(7, 3), layout="constrained")
        for index, curve in enumerate(curves):
            axes.plot(X, curve, label=f"$\\sigma_{index}$，第 {index} 条")
        axes.set(title=title, xlabel="x", ylabel="概率密度", ylim=(-1.2, 1.6))  # 自动的范围会把相差一个因子的曲线画得一样
        if curves:
            axes.legend(frameon=False, loc="upper left")
        file = io.BytesIO()
        figure.savefig(file, metadata={"Software": version} if version else None)
        matplotlib.pyplot.close(figure)
        return file.getvalue()


def bell(sigma: float, mu: float = 0) -> np.ndarray:
    return np.exp(-((X - mu) ** 2) / (2 * sigma**2)) / sigma


@pytest.mark.parametrize(
    ("version", "style"),
    [
        ("", {"text.hinting": "none"}),
        ("", {"text.antialiased": False}),
        ("另一版", {"text.hinting": "none"}),
        ("另一版", {"font.size": 10.3}),  # 字宽略有不同，布局跟着挪动
        ("另一版", {"legend.labelspacing": 0.8}),
        ("另一版", {"savefig.dpi": 101}),
    ],
    ids=str,
)
def test_another_rendering_of_the_same_figure_passes(version, style):
    if not version and matplotlib.__version_info__ < (3, 11):
        pytest.skip("存着的图是 3.11 画的，更旧的总按另一版来比")
    curves = [bell(1), bell(1.5), bell(0.8, 2)]
    new, old = draw(*curves, version=version, **style), draw(*curves)
    assert new != old and figure_difference(new, old) < 1


@pytest.mark.parametrize(
    ("version", "curves"),
    [
        ("", [bell(1, 0.2)]),
        ("", [bell(1.2)]),
        ("", [bell(1) * 0.9]),
        ("另一版", [bell(1, 1)]),
        ("另一版", [bell(1) / 2]),
        ("另一版", [-bell(1)]),
        ("另一版", [bell(1), bell(2)]),
        ("另一版", []),
    ],
    ids=["平移", "变宽", "变矮", "平移一个标准差", "少一个因子", "反号", "多一条", "一条也没有"],
)
def test_another_curve_fails(version, curves):
    assert figure_difference(draw(*curves, version=version), draw(bell(1))) > 1


def test_another_picture_or_size_fails():
    faces = draw_faces(torch.rand(4, len(FACE_FACTORS), generator=torch.Generator().manual_seed(0)), 64)
    pictures = []
    for pair in (faces[:2], faces[2:]):
        file = io.BytesIO()
        plot.grid(pair, columns=2, cell=1.5).savefig(file)
        pictures.append(file.getvalue())
    assert figure_difference(*pictures) > 1
    assert figure_difference(draw(bell(1), **{"savefig.dpi": 120}), draw(bell(1))) == float("inf")


def test_a_missing_glyph_is_an_error():
    draw(bell(1), title="变分自动编码器：后验坍塌 ½ σ² −1")
    with pytest.raises(UserWarning, match="missing from"):
        draw(bell(1), title="\ue123")


# —— 训练过的模型的图 ——

RNG = np.random.default_rng(0)
LOSS = 0.1 + np.exp(-np.linspace(0, 5, 200))  # 一条训练曲线


def noted(*curves: np.ndarray, trained: bool = True, on: str = "甲", code: str = "x", ink: bool = True, **options) -> bytes:
    """带来历的图，像笔记的内核画出来的；坐标轴自动取范围，所以放大两倍的曲线看上去一模一样。"""
    plot.use_chinese_font()
    figure, axes = matplotlib.pyplot.subplots(figsize=(5, 3), layout="constrained")
    for curve in curves:
        axes.plot(X, curve, visible=ink)
    axes.set(**{"title": "训练损失", **options})
    file = io.BytesIO()
    figure.savefig(file)
    label = {"machine": on, "trained": trained, "code": code, **provenance.content(figure)}
    matplotlib.pyplot.close(figure)
    return provenance.write(file.getvalue(), label)


def wobbly(curve: np.ndarray) -> np.ndarray:
    """另一种机器上训练出来的：走向相同，处处差一点。"""
    return curve * (1 + 0.1 * RNG.standard_normal(len(curve)))


def test_a_trained_figure_may_wobble_on_another_machine_only():
    stored = noted(LOSS)
    assert figure_difference(noted(wobbly(LOSS), on="乙"), stored) < 1
    assert figure_difference(noted(wobbly(LOSS)), stored) > 1  # 同一种机器
    assert figure_difference(noted(wobbly(LOSS), on="乙", trained=False), stored) > 1  # 说不是训练出来的
    assert figure_difference(noted(wobbly(LOSS), on="乙"), noted(LOSS, trained=False)) > 1
    on_gpu = [noted(curve, on="linux，cuda T4") for curve in (wobbly(LOSS), LOSS)]
    assert figure_difference(*on_gpu) < 1  # GPU 上求和的次序每次都可能不同


@pytest.mark.parametrize(
    "wrong",
    [
        noted(on="乙"),
        noted(LOSS[::-1], on="乙"),
        noted(-LOSS, on="乙"),
        noted(2 * LOSS, on="乙"),
        noted(LOSS / 2, on="乙"),
        noted(LOSS, LOSS[::-1], on="乙"),
        noted(RNG.uniform(0, 1, 200), on="乙"),
        noted(np.full(200, LOSS.mean()), on="乙"),
        noted(LOSS, on="乙", title="测试损失"),
        noted(LOSS, on="乙", ylim=(0, 3)),
        noted(LOSS, on="乙", code="y"),
        noted(LOSS, on="乙", ink=False),
    ],
    ids=["空的", "左右颠倒", "上下颠倒", "两倍", "一半", "多一条", "噪声", "走平", "标题不同", "纵轴不同", "别的单元的", "没有画上去"],
)
def test_a_wrong_picture_fails_on_another_machine_too(wrong):
    assert figure_difference(wrong, noted(LOSS)) > 1


def test_a_formula_is_compared_strictly_everywhere():
    stored = noted(bell(1), trained=False)
    assert figure_difference(noted(bell(1) * (1 + 1e-9), trained=False, on="乙"), stored) < 1
    for wrong in (bell(1, 0.2), bell(1.1), 2 * bell(1), -bell(1)):  # 两倍：只有刻度上的数字不同
        assert figure_difference(noted(wrong, trained=False, on="乙"), stored) > 1


def test_pixels_that_were_changed_lose_their_label():
    stored = noted(LOSS)
    (start, _) = next(span for name, _, span in provenance._chunks(stored) if name == b"IDAT")
    end = max(span[1] for name, _, span in provenance._chunks(stored) if name == b"IDAT")
    blank = noted(on="乙", code="x")
    pixels = [span for name, _, span in provenance._chunks(blank) if name == b"IDAT"]
    forged = stored[:start] + blank[pixels[0][0] : pixels[-1][1]] + stored[end:]  # 空白的像素，配上完好的来历
    assert provenance.read(stored) and provenance.read(forged) is None
    assert figure_difference(noted(LOSS, on="乙"), forged) > 1
    assert provenance.read(b"GIF89a") is None and provenance.read(draw(bell(1))) is None


def test_content_of_every_kind_of_plot():
    """条、面、散点、位图、对数轴都记得下来；放大一倍都看得出。"""
    plot.use_chinese_font()

    def drawn(scale: float) -> dict:
        figure, axes = matplotlib.pyplot.subplots(1, 5)
        axes[0].bar(range(1, 5), scale * np.array([4.0, 3, 2, 1]))
        axes[1].fill_between(X, scale * bell(1))
        axes[2].scatter(scale * X, X**2)
        axes[3].imshow(np.outer(np.ones(8), np.linspace(0, 1, 8)), vmin=0, vmax=scale)
        axes[4].semilogy(10 ** (scale * bell(1)))
        content = {"code": "", **provenance.content(figure)}
        matplotlib.pyplot.close(figure)
        return content

    names = {name.split()[-1] for name, _ in drawn(1)["series"]}
    assert {"横轴", "纵轴", "x", "y", "面", "亮度", "纹理", "色标"} <= names and any(name.endswith("上") for name in names)
    assert drawn(1)["words"] == []  # 刻度上只有数，对数轴的也是
    assert _trained_difference(drawn(1.02), drawn(1)) < 1
    for number in range(5):
        one, two = ({**each, "series": [s for s in each["series"] if s[0].startswith(str(number))]} for each in (drawn(1), drawn(2)))
        assert _trained_difference(two, one) > 1, number


def test_a_grid_of_faces_is_told_from_noise_blanks_and_negatives():
    generator = torch.Generator().manual_seed(0)
    faces, others = draw_faces(torch.rand(32, 12, generator=generator), 32).split(16)
    noise = torch.randint(0, 256, faces.shape, dtype=torch.uint8, generator=generator)

    def drawn(images: torch.Tensor) -> dict:
        figure = plot.grid(images, 8)
        content = {"code": "", **provenance.content(figure)}
        matplotlib.pyplot.close(figure)
        return content

    blurred = torch.nn.functional.avg_pool2d(others.float(), 3, 1, 1).to(torch.uint8)
    for fine in (others, blurred, (faces.float() * 0.9 + 10).to(torch.uint8)):  # 另一批脸、糊一点、暗一点
        assert _trained_difference(drawn(fine), drawn(faces)) < 1
    for wrong in (
        noise,
        torch.full_like(faces, 255),
        torch.zeros_like(faces),
        torch.full_like(faces, 128),
        (faces.float() + noise).div(2).to(torch.uint8),
    ):
        assert _trained_difference(drawn(wrong), drawn(faces)) > 1


# —— 哪些图是训练出来的：由规则定，不列名单 ——


def test_training_leaves_its_mark_and_formulas_stay_clean():
    space: dict = {}
    tracker = provenance.Tracker(space)
    handle = register_optimizer_step_post_hook(tracker.optimizer_stepped)

    def cell(source: str) -> bool:
        tracker.start(source)
        exec(source, space)
        trained = tracker.cell_is_trained
        tracker.finish()
        return trained

    try:
        assert not cell("import torch\nfrom torch import nn\nx, y = torch.rand(8, 3), torch.rand(8, 1)\nnet, losses = nn.Linear(3, 1), []")
        assert not cell("before = net(x)")  # 还没有训练
        assert not cell("a = nn.Parameter(torch.zeros(()))\no = torch.optim.SGD([a], 0.1)\n(a - 1).square().backward()\no.step()")  # 只有一个数
        assert not cell(
            "def fit(net):\n o = torch.optim.Adam(net.parameters())\n o.zero_grad(); loss = (net(x) - y).square().mean()\n"
            " loss.backward(); o.step()\n return loss.item()"
        )
        assert not cell("o = torch.optim.Adam(net.parameters())\no.step()")  # 没有梯度，什么也没有改动
        assert cell("for _ in range(2):\n losses.append(fit(net))")
        assert cell("z = net(x)") and cell("print(losses)") and cell("w = z.detach().numpy() * 2") and cell("print(w.sum())")
        assert cell("def later(): return {'k': [net]}") is False and cell("later()") and cell("[n for n in (net,)]")
        assert not cell("@torch.no_grad()\ndef look(): return net(x)") and cell("seen = look()") and cell("print(seen)")  # 套着装饰器
        assert not cell("z = x * 2") and not cell("print(z)")  # 重新由公式算出
        assert not cell("[z for z in range(3)]\nfor w in range(2): print(w)")  # 名字相同，先写后读
        assert cell("best = fit(nn.Linear(3, 1))") and cell("print(best)")  # 模型没有留下来，数还是训练出来的
        assert not cell("x.mean(); y[0] = 1") and not cell("%time x".replace("%time ", ""))
    finally:
        handle.remove()
    assert provenance.names_of("%time x") == (set(), set())
    assert provenance.names_of("a.b[0] = c; d += 1; f(lambda e: e + g)") == ({"a", "c", "d", "f", "g"}, {"a", "d"})


def test_the_machine_has_a_name():
    name = provenance.machine()
    assert f"torch {torch.__version__}" in name and f"{torch.get_num_threads()} 线程" in name
    assert provenance.repeatable(name) == (not torch.cuda.is_available())
    state = torch.get_rng_state()
    provenance._trial.cache_clear()
    assert provenance.machine() == name and torch.equal(torch.get_rng_state(), state)  # 试算每次一样，不动随机数
    script = (
        "import other_machine as o; from vaelab.provenance import _trial, machine\n"
        "for kind in ('', 'noisy-weights', 'one-ulp'):\n _trial.cache_clear(); kind and o.install(kind); print(machine())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tools"))), "OMP_NUM_THREADS": "1"}
    names = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True, encoding="utf-8").splitlines()
    assert len(set(names)) == 3  # 认不出的机器，由试算分开


# —— nbval 与 figures_plugin.py 一起，在真的内核上 ——

CURVE = "plt.figure(figsize=(4, 2)); plt.plot(range(9), [(x - 4) ** 2 * {} for x in range(9)]); plt.show()"
WARN = "import sys; print('x', file=sys.stderr)"
PREPARE = "import matplotlib.pyplot as plt, torch\nfrom vaelab import plot\nplot.use_chinese_font()"
FIT = """
torch.manual_seed(0)
net, x, losses = torch.nn.Linear(3, 1), torch.rand(99, 3), []
optimizer = torch.optim.Adam(net.parameters(), 0.01)
for _ in range(60):
    loss = (net(x) - x.sum(1, keepdim=True)).square().mean() {}
    optimizer.zero_grad(); loss.backward(); optimizer.step(); losses.append(loss.item())
"""
SHOW = "plt.figure(figsize=(4, 2)); plt.plot(losses{}); plt.show()"
DEADLY = "import os, signal; os.kill(os.getpid(), signal.SIGTERM if os.name == 'nt' else signal.SIGKILL)"
CASES = [  # 执行并存下的源码，重跑的源码，应不应通过；重跑时换一个线程数，也就是换一种机器
    ("import matplotlib.pyplot as plt", "import matplotlib.pyplot as plt", True),
    (CURVE.format(1), CURVE.format(1), True),
    (CURVE.format(1), CURVE.format(-1), False),
    (CURVE.format(1), CURVE.format(1) + CURVE.format(1), False),
    ("1", "1", False),  # 存着的没有执行过
    (WARN, WARN, False),  # 带 nbval-ignore-output
    ("plt.title('a'); plt.show()", "plt.title('\ue123'); plt.show()", False),
    ("1", "1", True),
    (PREPARE, PREPARE, True),
    (FIT.format(""), FIT.format("* 1.15"), True),  # 训练得来的数有一点不同
    (SHOW.format(""), SHOW.format(""), True),
    (CURVE.format(1), CURVE.format(1.1), False),  # 训练之后的公式图，仍旧严格
    (SHOW.format(""), SHOW.format("[::-1]"), False),
    ("losses = losses[:]", "losses = losses[::-1]", True),
    (SHOW.format(""), SHOW.format(""), False),  # 代码没有变，画的数左右颠倒了
    ("2", DEADLY, False),
    ("3", "3", False),  # 内核已经死了
]


def test_strict_nbval_sees_pictures_warnings_unexecuted_cells_and_a_dead_kernel(tmp_path):
    """每个单元是一种情形；存着的输出先由真的执行得到，再弄坏源码。"""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(stored) for stored, _, _ in CASES])
    NotebookClient(book, kernel_name="python3").execute()
    for each, (_, source, _) in zip(book.cells, CASES):
        each.source = source
    book.cells[4].update(execution_count=None, outputs=[])
    book.cells[5].metadata["tags"] = ["nbval-ignore-output"]
    nbformat.write(book, tmp_path / "case.ipynb")
    command = [sys.executable, "-m", "pytest", "-p", "figures_plugin", "-q", "-rA", "-p", "no:cacheprovider", "case.ipynb"]
    environment = {
        **os.environ,
        "PYTHONIOENCODING": "utf-8",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
    }  # 存的时候是 1
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8")
    passed = {int(number) for number in re.findall(r"^PASSED .*Cell (\d+)", done.stdout, re.MULTILINE)}
    assert passed == {index for index, (_, _, good) in enumerate(CASES) if good}, done.stdout
    if os.name == "posix":
        assert "内核在这一格里结束了（信号 SIGKILL" in done.stdout and "内核在第 15 格已经结束" in done.stdout


def test_a_busy_machine_leaves_its_cores_alone(monkeypatch):
    """四个核的机器，别的程序占着零到四个核时，内核用几个线程。"""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for taken, expected in ((0.0, None), (0.4, None), (1.0, 3), (2.0, 2), (3.0, 1), (4.0, 1)):
        monkeypatch.setattr("psutil.cpu_percent", lambda interval, taken=taken: 100 * taken / 4)
        assert free_threads(0) == expected
