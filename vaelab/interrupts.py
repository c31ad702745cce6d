"""训练半途停下：按了 Ctrl-C，收到 SIGTERM，内存用尽，别的进程没了；各有说得清的结局；各种错误说成一句话。"""

from __future__ import annotations

import os
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from vaelab.checkpoint import Run
from vaelab.config import TrainingError
from vaelab.files import command, shown, system_reason
from vaelab.memory import out_of_memory
from vaelab.parser import quoted
from vaelab.processes import World, current_world


class Terminated(BaseException):
    """收到了 SIGTERM；只在 :func:`terminated_by_signal` 里有。"""


class Stop:
    """有没有要求停下；``number`` 是收到的信号。"""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self) -> bool:
        return self.number is not None

    def by_any(self) -> None:
        """别的进程要求停下而停的，也算收到 SIGTERM：各进程的结局相同，谁也不当作走完了。"""
        self.number = self.number or signal.SIGTERM


@contextmanager
def stop_on_signal(run: Run, speak: bool = False) -> Iterator[Stop]:
    """Ctrl-C（SIGINT）与 SIGTERM 先记下来，由循环在一步走完、存好之后停下；离开时再交给原来的处理，调用者照常收到。

    再按一次 Ctrl-C 立即中断；几个进程时不理第二次，因为 torchrun 会替每个进程再按一次。只有主线程能装信号处理。
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(signum: int, frame: object) -> None:
        if stop() and signum == signal.SIGINT and current_world().size == 1:
            raise KeyboardInterrupt
        stop.number = stop.number or signum

    minded = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]  # 放在后台的不理 Ctrl-C
    previous = {number: signal.signal(number, handler) for number in minded}
    try:
        yield stop
        if speak and stop():
            print(_how_to_go_on(run), flush=True)
    except BaseException:
        if current_world().size > 1:  # torchrun 看见有进程死了，就向其余的发 SIGTERM；不理它，才来得及说出原因
            previous[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
    if stop.number is not None:
        signal.raise_signal(stop.number)


def _how_to_go_on(run: Run) -> str:
    if run.path is None:
        return f"已停在第 {run.step} 步；没有给 out，进度没有存下。"
    if run.step >= run.config.epochs * run.steps_per_epoch:
        return f"已停下；训练恰好走完，结果存在 {shown(run.path)}。"
    return f"已停下，第 {run.step} 步的进度存好了；接着训练：{command('train', '--resume', '--out', run.path)}"


@contextmanager
def terminated_by_signal() -> Iterator[None]:
    """其间收到 SIGTERM 就报 :class:`Terminated`，好让打开的文件、会合的进程来得及收拾；只有主线程能装信号处理。"""

    def handler(signum: int, frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def explain(error: BaseException) -> str:
    """一个错误说成一句中文。

    本项目自己报的照原样；系统的按错误号说；其余是没有料到的，说出是什么、在哪里。设了环境变量 ``VAELAB_DEBUG`` 就原样抛出。
    """
    text = str(error)
    if os.environ.get("VAELAB_DEBUG"):
        raise error
    if isinstance(error, OSError) and error.errno is not None:
        names = "、".join(quoted(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes)))
        return f"{names + ' ' if names else ''}{system_reason(error)}。"
    if re.search("[\u4e00-\u9fff].*。$", text, re.DOTALL):
        return text
    if isinstance(error, MemoryError) or out_of_memory(error):
        return "内存不够用；请关掉别的程序，减小 --batch-size、--num 或 --image-size，在 GPU 上也可以加 --device cpu。"
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(place.filename)} 第 {place.lineno} 行"
    return f"没有料到的 {type(error).__name__}（{where}：{' '.join(text.split())[:120]}）；请设 VAELAB_DEBUG=1 再运行一次，把全部输出报告出来。"


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
