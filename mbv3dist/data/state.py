"""The loader's state: what is needed to read on exactly where a run stopped.

It knows neither rank nor world size: the same few numbers are saved by every rank, and a run goes
on from them on any number of ranks. Nothing of the data is read again.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mbv3dist.data.decode import decoder_version
from mbv3dist.data.index import Split
from mbv3dist.data.plan import Plan

# What may differ when the user says so, and what that means.
_PIXELS = "pixels may then differ by a level or so"
_ORDER = "samples of the epoch under way may then be missed or come twice; later epochs are exact"
ACCEPTABLE = {
    "decode": _PIXELS,
    "decoder": _PIXELS,
    "decoder_version": _PIXELS,
    "data_fingerprint": _ORDER,
    "plan_version": _ORDER,
    "seed": _ORDER,
    "lanes": _ORDER,
    "block_shards": _ORDER,
    "num_shards": _ORDER,
    "shards_of_data_sets": _ORDER,
    "weights": _ORDER,
}


def data_state(split: Split, plan: Plan, step: int, *, decode: str = "cpu") -> dict[str, Any]:
    """Return the state after `step` steps, ready for JSON; `decode` as for the loader."""
    decoder, version = decoder_version()
    return {
        "step": step,
        "data_fingerprint": split.fingerprint,
        "decode": decode,
        "decoder": decoder,
        "decoder_version": version,
        **plan.state(),
    }


def resume_step(
    state: dict[str, Any],
    split: Split,
    plan: Plan,
    *,
    accept: Collection[str] = (),
    decode: str | None = None,
) -> tuple[int, list[str]]:
    """Return the step to go on from, and warnings about differences that were accepted.

    Args:
        state: What `data_state` returned when it was saved.
        split: The data of the run that goes on.
        plan: Its plan.
        accept: Names of what may differ.
        decode: How pictures will be decoded; None: as before.

    Raises:
        ValueError: if anything else differs: names what, from what, to what, and the way on.
    """
    if not isinstance(state, dict):
        raise ValueError(f"the data state is {_shown(state)}; it should be what Loader.state gave")
    mine = data_state(split, plan, 0, decode=decode or state.get("decode", "cpu"))
    warnings = []
    for name in dict.fromkeys([*mine, *state]):
        if name == "step" or mine.get(name) == state.get(name):
            continue
        change = f"{name} was {_shown(state.get(name))} and is now {_shown(mine.get(name))}"
        meaning = ACCEPTABLE.get(name)
        if meaning is None:
            raise ValueError(
                f"the data state does not fit: {change}, which changes what a step is; restore "
                "it, or start another run with --model.init_from"
            )
        if name not in accept:
            raise ValueError(
                f"the data state does not fit: {change}; restore it, or go on deliberately with "
                f"--data.accept_changes {name} ({meaning})"
            )
        warnings.append(f"{change}: {meaning}")
    step = state.get("step")
    if not isinstance(step, int) or not 0 <= step <= plan.num_steps:
        raise ValueError(
            f"the data state is at step {_shown(step)} and the run has {plan.num_steps} steps; "
            "restore --epochs, or start another run with --model.init_from"
        )
    return step, warnings


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
