"""The page that `mbv3dist doctor` prints: facts, rates, and what follows from them."""

from __future__ import annotations

from typing import Any

_COLUMN = 12  # characters of the names in front


def report_text(result: dict[str, Any]) -> str:
    """Returns what `doctor` measured as a page to read."""
    lines = [
        *_about_machine(result["environment"]),
        ("data", _about_data(result["data"])),
        ("setting", _about_setting(result["settings"])),
        ("", ""),
        *_about_rates(result["rates"]),
        ("", ""),
    ]
    page = [f"{name:<{_COLUMN}}{text}".rstrip() for name, text in lines]
    page.append(result["verdict"])
    page += [f"advice: {line}" for line in result["advice"]] or ["nothing to change"]
    return "\n".join(page)


def _about_machine(facts: dict[str, Any]) -> list[tuple[str, str]]:
    cores, memory, decoder, versions = (
        facts[name] for name in ("cores", "memory", "decoder", "versions")
    )
    quota = "" if cores["quota"] is None else f", quota {cores['quota']:g}"
    numbers = (
        f"{cores['usable']} of {cores['machine']} cores usable (affinity {cores['affinity']}"
        f"{quota}), {_gigabytes(memory['available_bytes'])} of "
        f"{_gigabytes(memory['total_bytes'])} memory available"
    )
    cuda = f"CUDA {versions['cuda']}" if versions["cuda"] else "without CUDA"
    parts = [
        f"nvImageCodec {decoder['nvimgcodec'] or 'missing'}",
        f"numba {decoder['numba'] or 'missing'}",
    ]
    files = "any number of" if facts["open_files"] is None else f"{facts['open_files']:,}"
    rest = [
        f"{files} open files",
        f"/dev/shm {_gigabytes(facts['shm_bytes'])}",
        f"{_gigabytes(facts['disk']['free_bytes'])} free on {facts['disk']['file_system']}",
        f"NCCL {facts['nccl'] or 'missing'}",
    ]
    return [
        ("machine", f"{facts['cpu']}, {facts['system']}, load {facts['load_1min']}"),
        ("", numbers),
        ("gpu", _about_gpu(facts["gpu"])),
        ("versions", f"python {versions['python']}, torch {versions['torch']} ({cuda})"),
        ("decoder", f"{decoder['name']} {decoder['version']}; {', '.join(parts)}"),
        ("limits", ", ".join(rest)),
    ]


def _about_gpu(gpu: dict[str, Any]) -> str:
    if not gpu["usable"]:
        return f"none: {gpu['reason']}"
    names = [
        f"{device['name']} ({_gigabytes(device['free_bytes'])} of "
        f"{_gigabytes(device['memory_bytes'])} free)"
        for device in gpu["devices"]
    ]
    return ", ".join(names)


def _about_data(data: dict[str, Any]) -> str:
    kind = "pictures stored as pixels" if data["is_raw"] else "pictures"
    size = f"{data['width']:.0f} x {data['height']:.0f}, {data['picture_bytes'] / 1e3:,.3g} KB"
    if data["where"] is None:
        return f"{data['samples']} {kind} drawn for this ({size}); name a data set to measure it"
    return (
        f"{data['where']}, {data['split']}: {data['samples']:,} {kind}, {size} on average, "
        f"{data['shards']:,} shard(s), {_gigabytes(data['bytes'])}"
    )


def _about_setting(settings: dict[str, Any]) -> str:
    return (
        f"{settings['architecture']} at {settings['input_size']}, view {settings['view']}, batch "
        f"{settings['batch_size']}, precision {settings['precision']}, {settings['ranks']} rank(s) "
        f"with {settings['num_threads']} thread(s) on {settings['device']}"
    )


def _about_rates(rates: dict[str, Any]) -> list[tuple[str, str]]:
    decode = [f"{rate:,.0f} with {count}" for count, rate in rates["decode"].items()]
    lines = [
        ("reading", _about_disk(rates["disk"])),
        ("checksum", f"{rates['crc_mb_per_s']:,.0f} MB/s in a thread"),
        ("decoding", f"{', '.join(decode)} thread(s), images/s"),
    ]
    if rates["ways"]:
        parts = [f"{mode} {rate:,.0f}" for mode, rate in rates["ways"].items()]
        parts += [f"{mode} not here ({why})" for mode, why in rates["ways_not_possible"].items()]
        lines.append(("to the gpu", f"{', '.join(parts)}; images/s of a rank by data.decode"))
    if rates["copy"] is not None:
        lines.append(
            (
                "copy",
                f"{rates['copy']['mb_per_s']:,.0f} MB/s from page-locked memory, "
                f"{rates['copy']['pageable_mb_per_s']:,.0f} from plain",
            )
        )
    lines += [
        (
            "step" if place == 0 else "",
            f"{step['images_per_s']:,.4g} images/s, batch {step['batch_size']}, precision "
            f"{step['precision']}",
        )
        for place, step in enumerate(rates["step"])
    ]
    together = rates["together"]
    waited = f"the device waited for data {100 * together['device_wait']:.0f} % of the time"
    if together["data_wait"] != together["device_wait"]:
        waited += f", the host {100 * together['data_wait']:.0f} %"
    how = f"{together['num_threads']} thread(s), decode {together['decode']}"
    lines.append(("together", f"{together['images_per_s']:,.4g} images/s with {how}; {waited}"))
    return lines


def _about_disk(disk: dict[str, Any] | None) -> str:
    if disk is None:
        return "not measured without a data set"
    if "sequential_mb_per_s" not in disk:
        return f"{disk['mb_per_s']:,.0f} MB/s over the network, one connection"
    text = (
        f"{disk['mb_per_s']:,.0f} MB/s sample by sample with {disk['num_threads']} thread(s), "
        f"{disk['sequential_mb_per_s']:,.0f} MB/s in order"
    )
    cached, before = disk["cached_share"], disk["cached_share_before"]
    if cached is None:
        return f"{text}; whether disk or page cache answered is not known here"
    if cached > 0.1:
        return f"{text}; from the page cache ({100 * cached:.0f} %), which could not be emptied"
    return f"{text}; from the disk (the page cache held {100 * before:.0f} % and was emptied)"


def _gigabytes(number: float | None) -> str:
    return "unknown" if number is None else f"{number / 1e9:.3g} GB"
