"""At which clocks a GPU ran while it was measured, and whether it was held back.

`nvidia-smi` is asked before, during and after; where it is missing or refuses, there is no state.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import torch

FIELDS = "clocks.sm,clocks.mem,{reasons},temperature.gpu,power.draw"
REASONS = ("clocks_throttle_reasons.active", "clocks_event_reasons.active")  # old name, new name
LIMIT_S = 20.0
# Bits of the active reasons, as NVML names them.
THROTTLE = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}


def commands(uuid: str | None) -> list[list[str]]:
    """What may tell the state of a device, tried in turn: of that device, else of the first."""
    asked = [
        [
            "nvidia-smi",
            f"--query-gpu={FIELDS.format(reasons=name)}",
            "--format=csv,noheader,nounits",
        ]
        for name in REASONS
    ]
    chosen = [[*words, "-i", f"GPU-{uuid}"] for words in asked] if uuid else []
    return [*chosen, *asked]


def state(
    device: torch.device, meanwhile: Callable[[], object] | None = None
) -> dict[str, Any] | None:
    """Return clocks, temperature, power and what throttles; None where nothing tells.

    Args:
        device: On a CPU there is no state.
        meanwhile: Called again and again until the answer is there, so that it is of a busy GPU.
    """
    if device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    for words in commands(None if uuid is None else str(uuid)):
        answer = _ask(words, meanwhile)
        if answer is None:
            return None
        found = parse_state(answer)
        if found is not None:
            return found
    return None


def _ask(words: list[str], meanwhile: Callable[[], object] | None) -> str | None:
    """What a command prints; None if there is no such command, or it does not end."""
    try:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        return None
    with process:
        try:
            while meanwhile is not None and process.poll() is None:
                meanwhile()
            return process.communicate(timeout=LIMIT_S)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            return None


def parse_state(text: str) -> dict[str, Any] | None:
    """Read the first line of an answer; a field that is not supported becomes None.

    Returns:
        None if it is no such answer.
    """
    lines = text.strip().splitlines()
    fields = [field.strip() for field in lines[0].split(",")] if lines else []
    if len(fields) != 5:
        return None
    try:
        bits = int(fields[2], 16)
    except ValueError:
        bits = None
    sm, mem, temperature, power = (_number(fields[i]) for i in (0, 1, 3, 4))
    return {
        "sm_mhz": sm,
        "mem_mhz": mem,
        "throttle": None if bits is None else throttle_words(bits),
        "temperature_c": temperature,
        "power_w": power,
    }


def throttle_words(bits: int) -> list[str]:
    """The reasons in words."""
    known = [word for bit, word in THROTTLE.items() if bits & bit]
    rest = bits & ~sum(THROTTLE)
    return known + ([f"0x{rest:x}"] if rest else [])


def _number(field: str) -> float | None:
    try:
        return float(field)
    except ValueError:
        return None


def state_text(clocks: dict[str, dict[str, Any] | None]) -> str:
    """One line for a report; "" where nothing was told."""
    parts = []
    for when, found in clocks.items():
        if found is not None:
            throttle = found["throttle"]
            reasons = "unknown" if throttle is None else ", ".join(throttle) or "nothing"
            parts.append(
                f"{when}: SM {found['sm_mhz']} MHz, memory {found['mem_mhz']} MHz, "
                f"{found['temperature_c']} C, {found['power_w']} W, held back by {reasons}"
            )
    return "; ".join(parts) + "." if parts else ""
