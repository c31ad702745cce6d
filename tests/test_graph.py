"""整个一步录成图（vaelab.graph）：这里没有 GPU，就用一张只会记账的图（tools/other_machine.py），规矩与 CUDA 图相同：

录的时候什么也不算，重放时不经过 Python，只照记下的算子、记下的内存再算一遍。写死在图里的学习率、
录之后换了地方的张量、漏在图外的噪声，用它都露馅。真的 CUDA 图由最后几条测试在有 GPU 的机器上试。
"""

import signal
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conftest import ROOT
from vaelab import graph, stepper
from vaelab import train as training
from vaelab.checkpoint import load_checkpoint
from vaelab.config import TrainConfig, TrainingError
from vaelab.data import load
from vaelab.graph import WARMUP, has_hooks
from vaelab.memory import out_of_memory, step_memory, too_large
from vaelab.plan import COMPILE_IMAGES, HALF_IMAGES, make_plan
from vaelab.step import learning_rate
from vaelab.train import train
from vanilla_vae import VanillaVAE

sys.path.insert(0, str(ROOT / "tools"))
from other_machine import RecordingGraph

CONFIG = TrainConfig(epochs=2, batch_size=16, lr=2e-3, kld_weight=1e-3, seed=1, precision="fp32")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="没有 CUDA")


class RecordedGraph:
    """与 :class:`vaelab.graph.CudaGraph` 同样的四个方法。"""

    made: list["RecordedGraph"] = []
    failure: str = ""
    waiting: str = ""

    def __init__(self, device: torch.device, random: torch.Generator) -> None:
        self.random, self.waits, self.watched, self.replays, self.recovered = random, "", [], 0, False
        RecordedGraph.made.append(self)

    def warm_up(self, work: Callable[[], Tensor], watch: bool) -> Tensor:
        self.watched.append(watch)
        self.waits = self.waiting if watch else ""
        return work()

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        self.graph = RecordingGraph()
        self.graph.register_generator_state(self.random)
        with self.graph:
            record = work()
            if self.failure:
                raise RuntimeError(self.failure)
        return record

    def replay(self) -> None:
        self.replays += 1
        self.graph.replay()

    def recover(self) -> None:
        self.recovered = True


@pytest.fixture(scope="module")
def data():
    return load("faces", image_size=16, count=100)


@pytest.fixture
def captured(monkeypatch):
    """CPU 上的计划，录成会记账的图。"""
    monkeypatch.setattr(RecordedGraph, "made", [])
    monkeypatch.setattr(stepper, "CudaGraph", RecordedGraph)
    real = training.make_plan
    monkeypatch.setattr(training, "make_plan", lambda *a, **k: replace(real(*a, **k), cuda_graphs=True, resident=True))
    return RecordedGraph


def new_model() -> VanillaVAE:
    torch.manual_seed(0)
    return VanillaVAE(3, 4, [8, 16], image_size=16)


def run(data, *, config=CONFIG, out=None, resume=False) -> tuple[list[dict], dict[str, Tensor]]:
    model = new_model()
    history = train(model, data, config, out, device="cpu", compile="off", resume=resume, progress=False)
    return history, model.state_dict()


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 2e-5) -> bool:
    return all(torch.allclose(a.double(), b.double(), atol=tolerance, rtol=1e-3) for a, b in zip(ours.values(), theirs.values()))


@pytest.mark.parametrize("weight", [1e-3, "optimal"])
def test_replayed_training_gives_the_numbers_of_the_eager_loop(data, request, weight):
    config = replace(CONFIG, kld_weight=weight)
    eager, eager_weights = run(data, config=config)
    request.getfixturevalue("captured")
    rows, weights = run(data, config=config)
    (used,) = RecordedGraph.made
    steps = 2 * (len(data.train) // 16)
    assert used.replays == steps - WARMUP and used.watched == [False] * (WARMUP - 1) + [True]
    assert same(weights, eager_weights)
    for ours, theirs in zip(rows, eager):
        for key in ("loss", "mse", "kld", "kld_weight", "test_mse", "test_elbo"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)


def test_capturing_computes_nothing_and_every_replay_sees_its_own_batch_rate_and_noise(data, captured):
    plan = replace(make_plan(data, CONFIG, device="cpu"), cuda_graphs=True, resident=True)
    plain = replace(plan, cuda_graphs=False)
    records = []
    for each in (plan, plain):
        with stepper.Stepper(new_model(), data, CONFIG, each) as step:
            rows = list(step.feed(0))
            assert all(row.dtype == torch.int64 for row in rows)  # 行号，图在走的时候才取
            records.append([step(row, k, learning_rate(k, 20, 1e-2)) for k, row in enumerate(rows + rows)])
    assert torch.stack(records[0]).allclose(torch.stack(records[1]), rtol=1e-4)
    assert len({tuple(record.tolist()) for record in records[0]}) == len(records[0])  # 每次给出自己的一份，不被下一次覆盖


def test_a_streamed_batch_is_copied_into_its_place(data, captured):
    """不在设备上的数据：图像拷进固定的张量，其余照样重放。"""
    plan = replace(make_plan(data, CONFIG, device="cpu"), cuda_graphs=True)
    records = []
    for each in (plan, replace(plan, cuda_graphs=False)):
        with stepper.Stepper(new_model(), data, CONFIG, each) as step:
            records.append(torch.stack([step(images, k, 1e-2) for k, images in enumerate(list(step.feed(0)) * 2)]))
            assert step.feed(0).__next__().dtype == torch.uint8
    assert records[0].allclose(records[1], rtol=1e-4) and captured.made[0].replays == len(records[0]) - WARMUP


def test_resuming_across_the_graph_and_the_eager_loop_gives_the_same_numbers(data, captured, tmp_path, monkeypatch):
    """录成图的训练在半途停下，不录的接着走（或反过来）：与一口气走完的相同；检查点里的学习率是一个数。"""
    whole, weights = run(data)
    for first_is_captured in (True, False):
        out = tmp_path / str(first_is_captured)
        seen, real_step, real_plan = [], stepper.Stepper.__call__, training.make_plan
        with monkeypatch.context() as stopping:
            if not first_is_captured:
                stopping.setattr(training, "make_plan", lambda *a, **k: replace(real_plan(*a, **k), cuda_graphs=False, resident=False))
            stopping.setattr(
                stepper.Stepper, "__call__", lambda *a: (seen.append(1), len(seen) == 7 and signal.raise_signal(signal.SIGINT), real_step(*a))[-1]
            )
            with pytest.raises(KeyboardInterrupt):
                run(data, out=out)
        saved = load_checkpoint(out)
        assert saved["step"] == 7 and isinstance(saved["optimizer"]["param_groups"][0]["lr"], float)
        with monkeypatch.context() as other:
            if first_is_captured:
                other.setattr(training, "make_plan", lambda *a, **k: replace(real_plan(*a, **k), cuda_graphs=False, resident=False))
            rows, resumed = run(data, out=out, resume=True)
        assert same(resumed, weights) and rows[-1]["test_elbo"] == pytest.approx(whole[-1]["test_elbo"], rel=1e-4)


def test_what_waits_for_the_device_is_named_and_not_captured(data, captured, monkeypatch, capsys):
    expected = run(data)[1]
    monkeypatch.setattr(RecordedGraph, "waiting", "mine.py 第 7 行要等 GPU 算完")
    weights = run(data)[1]
    assert RecordedGraph.made[-1].replays == 0 and same(weights, expected)
    assert capsys.readouterr().out.count("这一步录不成 CUDA 图（mine.py 第 7 行要等 GPU 算完）") == 1


class Nosy(VanillaVAE):
    """前向里有一处要等设备算完。"""

    def encode(self, input: Tensor) -> list[Tensor]:
        mu, log_var = super().encode(input)
        assert mu.sum().item() is not None
        return [mu, log_var]


def test_a_step_that_cannot_be_captured_goes_on_eagerly_and_says_so(data, captured, capsys):
    torch.manual_seed(0)
    model = Nosy(3, 4, [8, 16], image_size=16)
    train(model, data, CONFIG, device="cpu", compile="off", progress=False)
    (used,) = RecordedGraph.made
    assert used.replays == 0 and used.recovered
    assert capsys.readouterr().out.count("operation not permitted when stream is capturing") == 1
    assert same(model.state_dict(), run(data)[1])


def test_out_of_memory_while_capturing_says_what_fits_and_keeps_the_checkpoint(data, captured, monkeypatch, tmp_path):
    monkeypatch.setattr(RecordedGraph, "failure", "CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(TrainingError, match=r"请把 --batch-size 减到 8.*检查点停在第 0 步") as caught:
        run(data, out=tmp_path)
    assert out_of_memory(caught.value) and load_checkpoint(tmp_path)["step"] == 0


def test_a_device_error_in_the_middle_keeps_the_last_checkpoint_and_says_so(data, captured, monkeypatch, tmp_path):
    def dying(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA`")

    monkeypatch.setattr(RecordedGraph, "replay", dying)
    with pytest.raises(TrainingError, match=r"第 4 步时 GPU 出了错（CUDA error: an illegal memory access was encountered）.*检查点停在第 0 步"):
        run(data, out=tmp_path)
    assert load_checkpoint(tmp_path)["step"] == 0


@pytest.mark.parametrize("place", ["module", "everywhere", "parameter"])
def test_hooks_are_seen(place):
    model = new_model()
    assert not has_hooks(model)
    if place == "module":
        handle = model.encoder[0][1].register_forward_hook(lambda *a: None)
    elif place == "everywhere":
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *a: None)
    else:
        handle = model.fc_mu.weight.register_hook(lambda grad: grad)
    assert has_hooks(model)
    handle.remove()
    assert not has_hooks(model)


# ---------------------------------------------------------------- 在 CUDA 上怎样安排；设备是假的


@pytest.fixture
def h200(monkeypatch):
    """一块假的 H200：只够问，不够算。"""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (120 * 10**9, 150 * 10**9))
    monkeypatch.setattr("vaelab.plan.pick_device", lambda device: torch.device("cuda:0"))
    monkeypatch.setattr("vaelab.plan._why_no_compiler", lambda device: None)


AUTO = replace(CONFIG, precision="auto", batch_size=64)


def test_on_cuda_the_step_is_captured_whatever_its_length_and_compiled_only_when_long(data, h200):
    for steps in (1, 100, 10_000):
        plan = make_plan(data, AUTO, new_model(), total_steps=steps)
        assert plan.cuda_graphs and plan.precision == "bf16" and not plan.compile and plan.resident
        assert "整个一步录成一张 CUDA 图（准备不到 0.1 秒）" in plan.why() and "不编译" in plan.why()
    images = COMPILE_IMAGES * (64 / 16) ** 2  # 这里的图是 16×16
    long = make_plan(data, AUTO, total_steps=int(images / 64) + 1)
    assert long.compile and long.cuda_graphs and "抵得回准备的十几秒" in long.why()
    assert not make_plan(data, AUTO, total_steps=int(images / 64) - 1).compile


def test_what_cannot_be_captured_runs_in_the_precision_that_is_not_slower(data, h200, monkeypatch):
    model = new_model()
    model.encoder.register_forward_hook(lambda *a: None)
    plan = make_plan(data, AUTO, model)
    assert (plan.cuda_graphs, plan.precision) == (False, "fp32") and "逐个启动核函数（录成一张 CUDA 图要模型没有挂钩子）" in plan.why()
    with pytest.raises(ValueError, match="cuda_graphs=on 要模型没有挂钩子"):
        make_plan(data, AUTO, model, cuda_graphs="on")
    off = make_plan(data, AUTO, cuda_graphs="off")
    assert (off.cuda_graphs, off.precision) == (False, "fp32") and "你指定的" in off.why()
    heavy = replace(AUTO, batch_size=HALF_IMAGES * 16)  # 活够多，启动不再是瓶颈
    assert make_plan(data, heavy, cuda_graphs="off").precision == "bf16"
    monkeypatch.setattr("vaelab.plan.current_world", lambda: type("World", (), {"size": 2}))
    several = make_plan(data, AUTO)
    assert (several.cuda_graphs, several.precision) == (False, "fp32") and "只有一个进程" in several.why()
    assert make_plan(data, replace(AUTO, precision="bf16")).precision == "bf16"  # 指定的照办


def test_cards_without_bf16_take_fp16_in_the_graph_and_older_ones_fp32(data, h200, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert (make_plan(data, AUTO).precision, make_plan(data, AUTO).cuda_graphs) == ("fp16", True)
    assert make_plan(data, AUTO, cuda_graphs="off").precision == "fp32"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (6, 1))
    assert make_plan(data, AUTO).precision == "fp32"


def test_the_advice_on_memory_counts_what_is_free(monkeypatch):
    from vaelab.memory import available_memory

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (3 * 10**9, 24 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 2 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 10**9)
    assert available_memory(torch.device("cuda")) == 4 * 10**9
    model = new_model()
    fixed, each = step_memory(model)
    assert too_large(model, 10, "fp32", 10**10) is None
    assert "减到 5" in too_large(model, 10, "fp32", 10**10, exhausted=True)


# ---------------------------------------------------------------- 有 GPU 时


@CUDA
@pytest.mark.parametrize("precision", ["fp32", "auto"])
@pytest.mark.parametrize("data_on", ["device", "host"])
def test_cuda_replays_what_the_eager_step_computes(data, precision, data_on):
    config, records = replace(CONFIG, precision=precision), []
    for graphs in ("on", "off"):
        plan = make_plan(data, config, cuda_graphs=graphs, data_on=data_on)
        with stepper.Stepper(new_model(), data, config, replace(plan, precision=make_plan(data, config).precision)) as step:
            records.append(torch.stack([step(batch, k, learning_rate(k, 20, 2e-3)) for k, batch in enumerate(list(step.feed(0)) * 3)]).cpu())
            assert graphs == "off" or (step.walk.record is not None and not step.walk.refusal)
    assert records[0].allclose(records[1], rtol=2e-2 if precision == "auto" else 1e-3)


@CUDA
def test_cuda_names_what_waits(data, capsys):
    torch.manual_seed(0)
    train(Nosy(3, 4, [8, 16], image_size=16), data, CONFIG, device="cuda", progress=False)
    assert "test_graph.py 第" in capsys.readouterr().out


@CUDA
def test_cuda_goes_on_after_a_capture_that_failed(data, monkeypatch, capsys):
    real = graph.CudaGraph.warm_up
    monkeypatch.setattr(graph.CudaGraph, "warm_up", lambda self, work, watch: real(self, work, False))  # 不先看，撞上去
    torch.manual_seed(0)
    history = train(Nosy(3, 4, [8, 16], image_size=16), data, CONFIG, device="cuda", progress=False)
    assert len(history) == 2 and "录不成 CUDA 图" in capsys.readouterr().out
    assert torch.randn(3, device="cuda").isfinite().all()
