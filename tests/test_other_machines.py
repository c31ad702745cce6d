"""造出来的别的机器（tools/other_machine.py）：函数的值错在末位、初值错在末位、假的 T4。字节、结论、要比较的文字都不变。"""

import json
import os
import subprocess
import sys

import other_machine
import pytest
import torch
from torch import nn

from conftest import ROOT
from vaelab import step, stepper
from vaelab.config import LOSSES, TrainConfig
from vaelab.data import _fit, load
from vaelab.faces import _root
from vaelab.plan import make_plan
from vaelab.step import memory_layout, train_step

BYTES = """
import hashlib, sys, torch
sys.path.insert(0, sys.argv[2])
import other_machine
if sys.argv[1]: other_machine.install(sys.argv[1])
from vaelab.data import _fit, load
digest = lambda *parts: hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in parts)).hexdigest()[:16]
faces = load("faces", count=40, seed=3)
pictures = torch.randint(0, 256, (60, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
print(digest(faces.train, faces.test), digest(*(_fit(pictures, size, channels) for size in (16, 32, 64) for channels in (1, 3))))
"""
FINGERPRINTS = "a37b7d851e2e50a6 f0e52c1af56a6d46"


@pytest.mark.parametrize(
    ("kind", "environment"),
    [
        ("", {"OMP_NUM_THREADS": "1"}),
        ("", {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "3"}),
        ("", {"ATEN_CPU_CAPABILITY": "avx2"}),
        ("one-ulp", {}),
    ],
    ids=["一个线程", "没有 AVX，三个线程", "AVX2", "函数的值错在末位"],
)
def test_same_bytes_on_every_machine(kind, environment):
    """脸与缩放过的图，有固定的指纹。"""
    command = [sys.executable, "-c", BYTES, kind, str(ROOT / "tools")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True)
    assert done.stdout.strip() == FINGERPRINTS, done.stderr


def test_the_root_is_the_correctly_rounded_one_even_if_the_library_errs():
    """与整数运算比：r 是 √x 的正确舍入，当且仅当 x 在 r 与两边中点的平方之间。库错一个末位，结果不变。"""
    x = torch.cat([torch.rand(200_000), torch.arange(1, 300.0) ** 2, torch.rand(1000) * 1e-30, torch.zeros(1)])
    root = _root(x)
    with other_machine.OneUlp():
        assert torch.equal(_root(x), root)
        assert not torch.equal(x.double().sqrt(), root.double())
    near = [torch.nextafter(root, torch.tensor(way)).double() for way in (-1.0, torch.inf)]
    low, high = ((root.double() + each) / 2 for each in near)  # 25 位，平方 50 位，float64 里都是精确的
    assert bool(((low**2 <= x.double()) & (x.double() <= high**2))[:-1].all()) and root[-1] == 0


def test_grey_is_what_pillow_gives():
    from PIL import Image

    pictures = torch.randint(0, 256, (50, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for ours, picture in zip(_fit(pictures, 9, 1), pictures):
        assert ours[0].numpy().tobytes() == Image.fromarray(picture.permute(1, 2, 0).numpy()).convert("L").tobytes()


def test_the_made_up_rounding_errs_where_it_may_and_nowhere_else():
    x, weight = torch.rand(1000, dtype=torch.float64) + 1, torch.rand(30, 30)
    pinned = (lambda: x * 3 - x / 7, lambda: x.clamp(1.2, 1.5).abs().max(), lambda: torch.rand(9, generator=torch.Generator().manual_seed(0)))
    exact = (lambda: torch.arange(100.0).sum(), lambda: (torch.arange(40.0) ** 2).sqrt(), lambda: torch.ones(3, 9) @ torch.ones(9, 3))
    loose = (
        x.sqrt,
        x.exp,
        x.log,
        lambda: x.sum(),
        lambda: weight @ weight,
        x.std,
        lambda: nn.functional.batch_norm(weight, None, None, training=True),
    )
    for work in (*pinned, *exact, *loose):
        before = work()
        with other_machine.OneUlp():
            after, again = work(), work()
        assert torch.equal(after, again)
        moved = after != before
        if work not in loose:
            assert not moved.any()
            continue
        assert moved.double().mean() >= 0.15
        assert torch.equal(torch.nextafter(before, after)[moved], after[moved])  # 正好是相邻的数


def test_noisy_weights_are_neighbours():
    script = (
        "import torch, other_machine as o; make = lambda: (torch.manual_seed(0), torch.nn.Conv2d(3, 8, 3))[1].weight.detach();"
        "a = make(); o.install('noisy-weights'); b = make(); m = a != b;"
        "assert 0.15 < m.float().mean() < 0.25 and torch.equal(torch.nextafter(a, b)[m], b[m])"
    )
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT / "tools")}, check=True)


ON_A_FAKE_GPU = """
import json, torch, other_machine
from vaelab.config import TrainConfig
from vaelab.data import load
from vaelab.plan import make_plan
from vaelab.train import train
from vanilla_vae import VanillaVAE
data, found = load("faces", image_size=16, count=200), []
for kind in ("", "t4"):
    if kind: other_machine.install(kind)
    rows = {}
    for precision in ("auto", "fp32", "fp16", "bf16")[1 - bool(kind) : 4 if kind else 2]:
        torch.manual_seed(0)
        try:
            config = TrainConfig(epochs=2, batch_size=20, precision=precision)
            rows[precision] = train(VanillaVAE(3, 4, [8, 16], 16), data, config, compile="off", progress=False)[-1]["mse"]
        except ValueError as error:
            rows[precision] = str(error)
    plan = make_plan(data, TrainConfig(), compile="off")
    found.append([rows, plan.device.type, plan.precision, plan.resident, plan.why()])
torch.cuda.is_bf16_supported = lambda including_emulation=True: True
print(json.dumps([*found, make_plan(data, TrainConfig(), compile="off").precision]))
"""


def test_training_takes_the_path_of_the_card_it_finds():
    """T4 没有 bf16：自动选 fp16，指名 bf16 是一句话；有 bf16 的卡自动选它。fp32 的数与没有 GPU 时相同。"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tools"))), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", ON_A_FAKE_GPU], env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    cpu, t4, on_a_newer_card = json.loads(done.stdout.splitlines()[-1])
    assert t4[1:4] == ["cuda", "fp16", True] and "Tesla T4" in t4[4] and "没有 bf16" in t4[4]
    assert on_a_newer_card == "bf16" and cpu[1] == "cpu"
    rows = t4[0]
    assert rows["bf16"] == "bf16 应有硬件支持，Tesla T4 没有；请改用 --precision fp16、fp32 或 auto。"
    assert rows["fp32"] == pytest.approx(cpu[0]["fp32"], rel=1e-3)
    assert rows["auto"] == rows["fp16"] == pytest.approx(rows["fp32"], rel=0.1)


def test_mps_keeps_the_usual_layout():
    """MPS 上，批归一化收到 channels_last 会算错梯度；这里没有 MPS，看的是选哪种排列。"""
    from vanilla_vae import VanillaVAE

    assert memory_layout(torch.device("mps")) is torch.contiguous_format
    assert memory_layout(torch.device("cuda")) is memory_layout(torch.device("cpu")) is torch.channels_last
    seen, usual, data = [], memory_layout, load("faces", image_size=16, count=10)
    for device, expected in (("cpu", True), ("mps", False)):
        model = VanillaVAE(3, 4, [8, 16], 16)
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.register_forward_pre_hook(lambda _, inputs: seen.append(not inputs[0].is_contiguous()))
        config = TrainConfig(batch_size=4, precision="fp32")
        with pytest.MonkeyPatch.context() as patch:
            for room in (step, stepper):
                patch.setattr(room, "memory_layout", lambda _, device=device: usual(torch.device(device)))
            with stepper.Stepper(model, data, config, make_plan(data, config, device="cpu")) as walk:
                seen.clear()  # 不看估算内存时的前向
                walk(data.train[:4], 0, 1e-3)
        assert len(seen) == 4 and set(seen) == {expected}
        seen.clear()


def test_only_cuda_copies_without_waiting():
    """别的设备上 non_blocking 会读到已经放掉的内存；假的 meta 设备代替 MPS。"""

    class Seen(torch.overrides.TorchFunctionMode):
        asked = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.to:
                self.asked.append((kwargs or {}).get("non_blocking"))
            return function(*args, **(kwargs or {}))

    weight = nn.Parameter(torch.zeros((), device="meta"))
    losses = dict.fromkeys(LOSSES, weight * 1.0)
    with Seen() as seen:
        train_step(
            lambda images, eps: losses, torch.optim.SGD([weight]), torch.amp.GradScaler("cpu", enabled=False),
            torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 4, device="meta"), 0.1,
        )  # fmt: skip
    assert seen.asked == [False]


def test_compared_text_and_verdicts_do_not_rest_on_the_last_digit(tmp_path):
    """推导最多的一章，在函数的值错在末位的机器上，严格地通过；全部的笔记见 tools/matrix.py。"""
    environment = {**os.environ, **other_machine.kernel_environment("one-ulp", tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "notebooks/05_kl_divergence.ipynb"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout[-4000:]
