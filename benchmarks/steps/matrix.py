"""In which ways each system is run, and how it is made ready; what fails says why, others go on.

Settings stand in the order of their worth. All libraries get a setting, or none: once the time for
making systems is spent, the settings that are left stand in the report as left out.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steps.systems import Mark, Setting, System

WARM_UP = 3  # steps before a graph is captured, or compilation has settled
RING_AGAIN_S = 5.0
REASON_LENGTH = 240
Make = Callable[[Setting], System]


@dataclass
class Built:
    """Systems that are ready.

    Attributes:
        systems: Name -> system.
        failed: Name -> why there is none.
        first_call_s: Name -> seconds of making it and of its first step: compilation, cuDNN's
            search, capture.
        first_losses: Name -> loss before any optimiser step.
    """

    systems: dict[str, System] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    first_call_s: dict[str, float] = field(default_factory=dict)
    first_losses: dict[str, float] = field(default_factory=dict)


def settings_of(
    device: torch.device,
    *,
    amps: Sequence[str],
    modes: Sequence[str],
    graphs: bool,
    both_formats: bool,
) -> list[Setting]:
    """The ways in which systems are measured, the most wanted first.

    Args:
        device: Where.
        amps: Precisions; the first is measured in every way, the others plain and compiled.
        modes: Of torch.compile; none: nothing is compiled.
        graphs: CUDA graphs too.
        both_formats: Contiguous pictures and weights too, in the first precision, eager.
    """
    plain = Setting(device, amp=amps[0], channels_last=True)
    first_mode, other_modes = list(modes[:1]), list(modes[1:])
    found = [plain]
    if both_formats:
        found.append(replace(plain, channels_last=False))
    found += [replace(plain, amp=amp) for amp in amps[1:]]  # before what takes time to compile
    found += [replace(plain, compile=mode) for mode in first_mode]
    if graphs:
        found.append(replace(plain, graph=True))
        found += [replace(plain, compile=mode, graph=True) for mode in first_mode if own(mode)]
    found += [replace(plain, amp=amp, compile=mode) for amp in amps[1:] for mode in first_mode]
    for mode in other_modes:
        found.append(replace(plain, compile=mode))
        if graphs and own(mode):
            found.append(replace(plain, compile=mode, graph=True))
    return found


def own(mode: str) -> bool:
    """Whether a mode leaves capturing a graph to us."""
    return mode != "reduce-overhead"


def build_all(
    makes: Mapping[str, Make],
    settings: Sequence[Setting],
    *,
    limit_s: float = 0.0,
    budget_s: float = 0.0,
) -> Built:
    """Make every library's system in every setting, and do its first steps.

    Args:
        makes: Library -> what makes its system.
        settings: In the order of their worth.
        limit_s: For one system; 0: none.
        budget_s: Once so many seconds are spent, no more settings are begun; 0: no end. Where the
            first library is not ready within its limit, the others are not tried: they would
            hardly be.
    """
    release()
    built, started = Built(), time.perf_counter()
    allow_many_graphs()
    pool: Any = None
    for setting in settings:
        if setting.graph and pool is None:
            # Graphs run one after the other, so that they can work in the same memory.
            pool = torch.cuda.graph_pool_handle()
        left_out = ""
        if budget_s and time.perf_counter() - started > budget_s:
            left_out = f"left out: {budget_s:g} s for making systems were spent"
        for library, make in makes.items():
            name = f"{library} {setting.kind}"
            if left_out:
                built.failed[name] = left_out
                continue
            print(f"  {name}", file=sys.stderr)
            begun = time.perf_counter()
            try:
                with limited(limit_s):
                    system, loss = ready(make, setting, pool)
            except Exception as error:  # of compilers, drivers and allocators: any type
                built.failed[name] = reason(error)
                if isinstance(error, TimeoutError) and library == next(iter(makes)):
                    left_out = f"left out: {library} was not ready in time"
                release()
                continue
            built.systems[name] = system
            built.first_call_s[name] = round(time.perf_counter() - begun, 2)
            built.first_losses[name] = loss
    return built


def ready(make: Make, setting: Setting, pool: Any) -> tuple[System, float]:
    """Make a system, captured if its setting says so; return it with the loss of its first step."""
    system = make(setting)
    if setting.graph:
        system = captured(system, pool)
    return system, float(system.whole_step(no_mark).detach().float().mean())


def no_mark(_stage: str) -> None:
    """Measures nothing."""


def captured(system: System, pool: Any = None) -> System:
    """The same system as one CUDA graph of forward, loss and backward.

    Args:
        system: Has not run yet.
        pool: Memory that it may share with other graphs that never run at the same time.

    Raises:
        RuntimeError: Something in the step cannot be captured, such as a synchronisation.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            _forget_gradients(system)
            system.step(no_mark)
    torch.cuda.current_stream().wait_stream(stream)
    _forget_gradients(system)
    refuse_waits(system)
    _forget_gradients(system)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        value = system.step(no_mark)

    def step(mark: Mark) -> Tensor:
        graph.replay()  # writes the same gradients again: they are not added up
        mark("graph")
        return value

    return replace(system, step=step, loss_only=None)


def _forget_gradients(system: System) -> None:
    if system.optimizer is not None:
        system.optimizer.zero_grad(set_to_none=True)


def refuse_waits(system: System) -> None:
    """Find out whether a step waits for the device before it is captured.

    A capture that fails in its middle leaves torch's random numbers and its memory in a state in
    which other systems fail too.

    Raises:
        RuntimeError: It waits.
    """
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        system.step(no_mark)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise RuntimeError(f"cannot be captured: it waits for the device ({error})") from None
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer; 0: no limit.

    It rings again until it is heard: compilers catch errors of their trials.
    """
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"not ready within {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, stop)
    rest, interval = signal.setitimer(signal.ITIMER_REAL, seconds, RING_AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
        if rest:
            signal.setitimer(signal.ITIMER_REAL, rest, interval)


def reason(error: BaseException) -> str:
    """An error in one line, with what caused it where that says more."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or "no message"
    line = f"{type(error).__name__}: {text}"
    return line if len(line) <= REASON_LENGTH else line[: REASON_LENGTH - 3] + "..."


def release() -> None:
    """Give back the memory of systems that are gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def allow_many_graphs() -> None:
    """Let one class's forward be compiled for many models and modes: 8 is the default.

    Beyond it a model would run eagerly under the name of a compiled one.
    """
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 4096


def best_names(figures: Mapping[str, float], systems: Mapping[str, System]) -> dict[str, str]:
    """Each library's fastest system: library -> name."""
    best: dict[str, str] = {}
    for name, figure in figures.items():
        library = systems[name].library
        if library not in best or figure > figures[best[library]]:
            best[library] = name
    return best


def choose_base(names: Sequence[str], wanted: str) -> str:
    """What ratios are against: the wanted system, else the first of its library, else the first.

    Raises:
        RuntimeError: There is no system at all.
    """
    if not names:
        raise RuntimeError("no system could be measured")
    if wanted in names:
        return wanted
    library = wanted.partition(" ")[0]
    return next((name for name in names if name.startswith(f"{library} ")), names[0])


def same_as(system: System, names: Sequence[str]) -> str:
    """The name of torchvision's system in the same setting, else in the nearest that there is."""
    setting = system.setting
    nearest = (
        setting,
        replace(setting, graph=False),
        replace(setting, graph=False, compile=setting.compile and "default"),
        replace(setting, graph=False, compile=""),
    )
    candidates = [f"torchvision {other.kind}" for other in nearest]
    own_name = f"{system.library} {setting.kind}"
    return next((name for name in candidates if name in names), own_name)
