"""训练半途停下：按了 Ctrl-C，收到 SIGTERM，内存用尽，别的进程没了；各有说得清的结局。"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from vaelab.checkpoint import Run
from vaelab.config import TrainingError
from vaelab.memory import out_of_memory
from vaelab.processes import World, current_world


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Ctrl-C（SIGINT）与 SIGTERM 只记下来，由循环在一步走完之后停下；再按一次 Ctrl-C 立即中断。只有主线程能装信号处理。"""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return

    def handler(signum: int, frame: object) -> None:
        if requested.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        requested.set()

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested.is_set
    except BaseException:
        if current_world().size > 1:  # torchrun 看见有进程死了，就向其余的发 SIGTERM；不理它，才来得及说出原因
            previous[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextmanager
def clear_errors(run: Run, world: World, too_large: Callable[[bool], str | None]) -> Iterator[None]:
    """把内存不够、进程失联、GPU 出错这几种来自深处的错误，换成说得清的一句话。"""
    try:
        yield
    except RuntimeError as error:
        saved = "" if run.path is None else f"检查点停在第 {run.saved_step} 步，加 --resume 可接着训练。"
        if out_of_memory(error):
            what = None
            with suppress(RuntimeError):  # 估算也要一点内存，可能连它也没有
                what = too_large(True)
            raise TrainingError((what or "内存装不下这一批；请减小 --batch-size。") + saved) from error
        reason = re.sub(r"^\[\S*\] *", "", str(error).splitlines()[0])[:120] if str(error) else type(error).__name__  # 去掉 gloo 的源码位置
        if re.search(r"\b(CUDA|HIP|cuDNN|CUBLAS|MPS)\w* .*(error|fail|STATUS)|device-side", reason, re.I):
            raise TrainingError(
                f"第 {run.step + 1} 步时 GPU 出了错（{reason}）：这个进程里的 GPU 不能再用，请重新启动；"
                f"若总在同一步出错，请加 --device cpu 再试，多半会指出是哪里。{saved}"
            ) from error
        if world.size > 1 and not isinstance(error, TrainingError):
            raise TrainingError(
                f"第 {run.step + 1} 步时与别的进程失去了联系（{reason}）：多半有一个进程已经退出，请看它的错误，再重新启动，进程数可以不同。{saved}"
            ) from error
        raise
