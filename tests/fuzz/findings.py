"""Every input that was once answered wrongly, and the attacks that must be refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import struct
import tarfile
import zlib
from typing import Any

from .mutate_binary import Payload, member
from .mutate_markup import entity_bomb
from .mutate_pictures import chunk
from .pipelines import seal
from .seeds import RECIPES, Case, Seeds

# In which a model's or data set's name, a key or a value is put.
_RECIPE = RECIPES[0]
# All others are to be refused.
ACCEPTED = ("59 s for a long URL", "a pipe for train.manifest")


def past(seeds: Seeds) -> list[tuple[str, Case]]:
    """Return (what happened, the input) of all past findings."""
    return [*_recipes(), *_texts(seeds), *_models(seeds), *_weights(seeds), *_data_sets(seeds)]


def _recipes() -> list[tuple[str, Case]]:
    merges = ["a0: &a0 {x: 1}"]
    lists = ["a0: &a0 [x, x]"]
    for level in range(1, 9):
        before = ", ".join([f"*a{level - 1}"] * 9)
        merges.append(f"a{level}: &a{level} {{<<: [{before}]}}")
        lists.append(f"a{level}: &a{level} [{before}]")
    texts = {
        "merge keys that grow took minutes": "\n".join(merges),
        "aliases that grow, written out in a message": "\n".join([*lists, "name: *a8"]),
        "KeyError of a tag": "compile: !!bool perhaps",
        "AttributeError of a tag": "compile: !!timestamp x",
        "IndexError of a tag": "epochs: !!int ''",
        "OverflowError of a number": f"epochs: 3\noptim: {{lr: 0x{'f' * 400}}}",
        "a library's words about digits": f"seed: 0x{'f' * 20_000}",
        "a value of 5,000 letters in a message": f"resume: {'b' * 5000}",
        "a name of 5,000 letters in a message": f"data: {{path: x}}\nname: {'b ' * 2500}",
        "control characters in a message": '"\\e[2J": 1',
        "values nested too deep": "name: " + "[" * 20_000,
        "as many keys as fit into a megabyte": "\n".join(f"k{n}: 1" for n in range(40_000)),
    }
    cases = [(what, Case("recipe", {"recipe.yaml": t.encode()}, {})) for what, t in texts.items()]
    recipe = {"recipe.yaml": _RECIPE.encode()}
    for what, words in (
        ("a flag of 5,000 letters in a message", ["--data.path." + "a" * 5000, "1"]),
        ("control characters of a flag in a message", ["--\x1b[2J.a", "1", "--\x1b[2J", "1"]),
        ("KeyError of a tag in a flag", ["--compile", "!!bool perhaps"]),
    ):
        cases.append((what, Case("flags", recipe, {"flags": words})))
    return cases


def _texts(seeds: Seeds) -> list[tuple[str, Case]]:
    index = seeds.datasets["detection"]["train/000000.idx"]
    second = index.split(b" ")[4]
    boxes = b'{"width":9,"height":9,"boxes":[[%s]],"labels":[%s],"difficult":[0]}'
    detection = {"task": "detection"}
    found = [
        ("control characters of a name", "idx", index.replace(second, b"\x1b[2J.jpg", 1), {}),
        ("control characters of an extension", "idx", index.replace(b"jpg", b"\x1b[2J"), {}),
        ("59 s for a long URL", "url", b"https://example.org/" + b"amp" * 4000, {}),
        ("59 s for a long word", "url", b"simp" * 3000, {}),
        ("a URL of 10 KB in a message", "url", b"gs://bucket/a b" + b"b " * 5000, {}),
        ("a password behind a long scheme", "url", b"ht" * 50 + b"tps://user:SECRETWORD@b.c/d", {}),
        ("control characters of a file: URL", "url", b"file://a/data\x1b[31m", {}),
        ("a warning of NumPy", "target", boxes % (b"0,0,1e308,2", b"1"), detection),
        ("class 1.9 was taken for 1", "target", boxes % (b"1,1,2,2", b"1.9"), detection),
        ("texts were taken for numbers", "target", boxes % (b"1,1,2,2", b'"1"'), detection),
        ("AttributeError of a state", "state", b"[1]", {}),
        ("TypeError of a state", "state", b"1", {}),
        ("AttributeError of a text", "state", b'"x"', {}),
        ("a box turned inside out", "target", boxes % (b"5,5,2,2", b"1"), detection),
    ]
    sides = struct.pack(">IIBBBBB", 70_000, 1, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(70_001))
    png = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", sides) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )
    found.append(("a picture too long for JPEG ended the conversion", "picture", png, {}))
    return [(what, Case(target, {"input": data}, o)) for what, target, data, o in found]


def _models(seeds: Seeds) -> list[tuple[str, Case]]:
    plain = json.loads(seeds.models[1]["model.json"])

    def change(**changes: Any) -> bytes:
        return json.dumps({**plain, **changes}).encode()

    texts = {
        "RecursionError": b'{"a": ' + b"[" * 200_000,
        "classes that are no texts": change(classes=["cat", ["dog"]]),
        "a class name with control characters": change(classes=["cat\x1b[2J"]),
        "a class name of half a character": change(classes=["\ud800"]),
        "a number of 400 digits": change(dropout=10**400),
        "a text for a number": change(bn_eps="x"),
        "no number": change(width=float("nan")),
        "a text for true": change(preprocess={**plain["preprocess"], "antialias": "yes"}),
        "an architecture of 3,000 letters in a message": change(architecture="a" * 3000),
        "one value for three": change(preprocess={**plain["preprocess"], "mean": 7}),
        "nothing where something must be": change(preprocess=None),
        "3,000 scales in a message": change(anchors={**plain["anchors"], "scales": [0] * 3000}),
        "thresholds without a count": change(thresholds={"topk_candidates": None}),
    }
    cases = [(what, Case("spec", {"input": data}, {})) for what, data in texts.items()]
    for what, changes in (
        ("a model of 24 TB was built", {"width": 1e6}),
        ("anchors of a canvas of 10**8 pixels", {"input_size": 10**8}),
        ("a million classes", {"classes": [str(number) for number in range(10**6)]}),
    ):
        files = {**seeds.models[1], "model.json": change(**changes)}
        cases.append((what, Case("model", files, {})))
    return cases


def _weights(seeds: Seeds) -> list[tuple[str, Case]]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))
    zipped, old = seeds.pickles[:2]
    memory = pickle.dumps(Payload(bytearray, 1 << 36), protocol=2)
    head = old[: old.index(b"little_endian")]
    files = {
        "a command in a pickle": pickle.dumps(Payload(os.system, "touch EVIL"), protocol=2),
        "64 GiB of memory in a pickle": head + b"\x88u." + memory,
        "a tar, unpacked beside": buffer.getvalue(),
        "UnicodeDecodeError": zipped.replace(b"_rebuild_tensor_v2", b"_rebuild_\xff\xfe\xfd_v2"),
        "IndexError": zipped.replace(b"ctorch._utils", b"0torch._utils", 1),
        "a cut zip": zipped[: len(zipped) // 2],
        "a cut pickle": old[: len(old) // 2],
    }
    cases = [(what, Case("weights", {"w.pth": data}, {})) for what, data in files.items()]
    odd = seeds.safetensors[0].replace(b'"F32"', b'"F\x00\x1b"', 1)
    cases.append(("control characters of a type", Case("weights", {"w.safetensors": odd}, {})))
    state = json.loads(seeds.checkpoint["state.json"])
    step = f"run/checkpoints/step-{state['step']:08d}"
    for what, changes in (
        ("files outside the checkpoint", {"files": {"../../../x": {"bytes": 1, "sha256": ""}}}),
        ("no files at all", {"files": {}}),
        ("control characters of a name", {"files": {**state["files"], "\x1b[2J": {}}}),
        ("a step that is another", {"step": state["step"] + 1}),
        ("a step that is none", {"step": True}),
        ("data at another step", {"data": {**state["data"], "step": 7}}),
        ("AttributeError", {"identity": []}),
        ("AttributeError of what is damaged", {"damaged": [1]}),
        ("a score that is no number", {"best_score": "x"}),
    ):
        changed = {**seeds.checkpoint, "state.json": json.dumps({**state, **changes}).encode()}
        placed = {f"{step}/{name}": data for name, data in changed.items()}
        cases.append((f"checkpoint: {what}", Case("checkpoint", placed, {})))
    return cases


def _data_sets(seeds: Seeds) -> list[tuple[str, Case]]:
    files = seeds.datasets["detection"]
    assert seeds.samples
    options = {"task": "detection", "special": [], "sealed": False}
    cases = []
    for suffix in ("tar", "idx", "crc"):
        special = {**options, "special": [[f"train/000000.{suffix}", "fifo", ""]]}
        cases.append((f"a pipe for a .{suffix}: waited for ever", Case("dataset", files, special)))
    for name in ("train.manifest", "train.labels.npy", "train.sources.tsv", "train.json"):
        special = {**options, "special": [[name, "fifo", ""]]}
        cases.append((f"a pipe for {name}", Case("dataset", files, special)))
    sources = files["train.sources.tsv"].replace(b"JPEG", b"\x1b[2J\tJPEG")
    tar = files["train/000000.tar"]
    both = {**files, "train/000000.tar": bytes(512) + tar[512:], "train.sources.tsv": sources}
    cases.append(("control characters of a source", Case("dataset", both, options)))
    changed = {**files, "train/000000.tar": b"\x1b[2J.jpg\0" + tar[9:]}
    cases.append(("control characters of a member", Case("dataset", changed, options)))
    description = json.loads(files["train.json"])
    for what, key, value in (
        ("nsamples of 3,000 numbers in a message", "nsamples", [0] * 3000),
        ("10**12 samples in a small tar", "nsamples", 10**12),
        ("samples that add up to more than 2**63", "nsamples", 2**62),
        ("control characters of a URL", "url", "train/\x1b[2J.tar"),
        ("a URL of 6,000 letters in a message", "url", "train/" + "in" * 3000),
        ("a URL outside", "url", "../../etc/passwd"),
    ):
        rows = [{**row, key: value} for row in description["shardlist"]]
        data = json.dumps({**description, "shardlist": rows}).encode()
        kept = {name: body for name, body in files.items() if name != "train.manifest"}
        cases.append((what, Case("dataset", {**kept, "train.json": data}, options)))
    return cases


def attacks(seeds: Seeds) -> list[tuple[str, Case]]:
    """Return (what is tried, the input): bombs, ways out of the folder, code, absurd sizes."""
    xml = seeds.annotations[1]
    cases = [
        (f"DOCTYPE {n}", Case("xml", {"input": entity_bomb(random.Random(n), xml)}, {}))
        for n in range(40)
    ]
    for tag in ("object/apply:os.system ['touch EVIL']", "name:os.system", "module:os"):
        recipe = f"epochs: 1\nname: !!python/{tag}\n".encode()
        cases.append((f"YAML tag {tag}", Case("recipe", {"recipe.yaml": recipe}, {})))
    sides = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    picture = seeds.pictures["png"][0]
    claims = picture[:16] + sides + struct.pack(">I", zlib.crc32(b"IHDR" + sides)) + picture[33:]
    cases += [
        ("a picture of 10**10 pixels", Case(target, {"input": claims}, {"seed": 0}))
        for target in ("picture", "view")
    ]
    for name, kind, link in (
        (b"../../evil.jpg", b"0", b""),
        (b"/tmp/evil.jpg", b"0", b""),
        (b"000000000.jpg", b"2", b"/etc/passwd"),
        (b"000000000.jpg", b"1", b"../../evil"),
        (b"000000000.jpg", b"5", b""),
    ):
        files = dict(seeds.datasets["detection"])
        tar = files["train/000000.tar"]
        files["train/000000.tar"] = member(name, kind, b"", link) + tar
        seal(files)
        options = {"task": "detection", "special": [], "sealed": True}
        cases.append((f"tar member {name!r} {kind!r}", Case("dataset", files, options)))
    header = (1 << 62).to_bytes(8, "little") + seeds.safetensors[0][8:]
    files = {**seeds.models[0], "model.safetensors": header}
    cases.append(("a header of 2**62 bytes", Case("model", files, {})))
    return [*cases, *_code(seeds)]


def _code(seeds: Seeds) -> list[tuple[str, Case]]:
    """Return pickled code: in a file of weights, and in a checkpoint whose checksums are right."""
    import torch

    cases = []
    state = json.loads(seeds.checkpoint["state.json"])
    folder = f"run/checkpoints/step-{state['step']:08d}"
    for function, argument in ((os.mkdir, "EVIL"), (os.system, "touch EVIL"), (eval, "1")):
        for zipped in (True, False):
            buffer = io.BytesIO()
            value = {"optimizer": Payload(function, argument)}
            torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
            data, what = buffer.getvalue(), f"pickled {function.__name__}, zip {zipped}"
            cases.append((what, Case("weights", {"w.pth": data}, {})))
            facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            listed = {**state, "files": {**state["files"], "optimizer.pt": facts}}
            files = {**seeds.checkpoint, "optimizer.pt": data}
            files["state.json"] = json.dumps(listed).encode()
            placed = {f"{folder}/{name}": body for name, body in files.items()}
            cases.append((f"{what}, in a checkpoint", Case("checkpoint", placed, {})))
    return cases
