"""Random damage to the files of a packed folder: their bytes, what JSON says in them, and single tensors."""

from __future__ import annotations

import json
import math
import random
import struct
from typing import Any

Folder = dict[str, bytes]  # content by file name

SINGLE = "model.safetensors"
_ALIKE = (  # dtypes of as many bytes
    ("U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"),
    ("F16", "BF16", "I16", "U16"),
    ("F32", "I32", "U32"),
    ("I64", "F64", "U64"),
)
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 5, 7, 9, 32, 64, 2**31, 2**53, 2**63, -(2**63), 2**64, 10**30, 1.5, 1e308),
    *("", "gptq", "awq", "re:(a+)+$", "re:.*.*.*.*.*.*x", "..", "../x", "/etc/passwd", "\ud800", "\x00", "a" * 5000),
    *([], {}, [[]], {"": {}}, [0] * 100, ["re:("], {"-:(": {}}, {"+:(a|a)*$": {"bits": 2}}, [2**62, 2**62], [0, 2**62]),
    *("F16", "I32", "I64", "F4", "BOOL", "C64", "F8_E8M0", "Q4", [1] * 70),
)  # fmt: skip


def _at_random(rng: random.Random, content: Any) -> Any:
    """Return a JSON value with something in it replaced, removed, doubled or swapped."""
    places: list[tuple[Any, Any]] = []
    stack = [content]
    while stack:
        here = stack.pop()
        items = here.items() if isinstance(here, dict) else enumerate(here) if isinstance(here, list) else ()
        for key, value in items:
            places.append((here, key))
            stack.append(value)
    if not places:
        return rng.choice(_ODD)
    here, key = rng.choice(places)
    action = rng.randrange(6)
    if action == 0 and isinstance(here, dict):
        del here[key]
    elif action == 1 and isinstance(here, dict):
        here[rng.choice((*here, "x", "", "dynamic", "ignore", "bits", "\ud800"))] = here.pop(key)
    elif action == 2 and isinstance(here[key], int):
        here[key] += rng.choice((-8, -1, 1, 8, 2**32, 2**63))
    elif action == 3:
        there, other = rng.choice(places)
        if other in there if isinstance(there, dict) else other < len(there):
            here[key] = json.loads(json.dumps(there[other]))
    else:
        here[key] = rng.choice(_ODD)
    return content


def _changed_json(rng: random.Random, raw: bytes) -> bytes:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return raw
    return json.dumps(_at_random(rng, content)).encode()


def _changed_header(rng: random.Random, raw: bytes) -> bytes:
    """Return a shard whose header is other JSON, its length made right or left wrong."""
    length = int.from_bytes(raw[:8], "little")
    header = _changed_json(rng, raw[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + raw[8 + length :]


def _changed_tensor(rng: random.Random, raw: bytes) -> bytes:
    """Return a shard in which all sizes still agree, but one tensor has another shape, dtype, name or content."""
    length = int.from_bytes(raw[:8], "little")
    try:
        header, rest = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
        name, action = rng.choice(list(header)), rng.randrange(4)
        tensor = header[name]
        first, last = tensor["data_offsets"]
        if action == 0:
            tensor["shape"] = _reshaped(rng, tensor["shape"])
        elif action == 1:
            tensor["dtype"] = rng.choice(next(alike for alike in _ALIKE if tensor["dtype"] in alike))
        elif action == 2:
            local = rng.choice(list(header)).rpartition(".")[2]
            header[f"{name.rpartition('.')[0]}.{local}"] = header.pop(name)
        else:
            rest[first:last] = _overwritten(rng, bytes(rest[first:last]))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, StopIteration):
        return raw  # an earlier mutation has left no such header
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def _reshaped(rng: random.Random, shape: list[int]) -> list[int]:
    """Return another shape of as many entries."""
    turned = rng.sample(shape, len(shape))
    halves = [turned[0] // 2, *turned[1:-1], turned[-1] * 2] if len(shape) > 1 and turned[0] % 2 == 0 else turned
    return rng.choice((turned, halves, [math.prod(shape)], [*shape, 1], [1, *shape]))


def _overwritten(rng: random.Random, content: bytes) -> bytes:
    """Return the content of a tensor with a bit flipped, some bytes random, or all bytes the same."""
    at = rng.randrange(len(content))
    action = rng.randrange(3)
    if action == 0:
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    if action == 1:
        random_bytes = rng.randbytes(min(rng.randrange(1, 64), len(content) - at))
        return content[:at] + random_bytes + content[at + len(random_bytes) :]
    return bytes([rng.randrange(256)]) * len(content)


def _bytes(rng: random.Random, raw: bytes) -> bytes:
    """Return bytes with some flipped, cut off, taken out, doubled or added; more often at the start."""
    if not raw:
        return rng.randbytes(8)
    at = min(rng.randrange(len(raw)), rng.randrange(len(raw)))
    action = rng.randrange(7)
    if action == 0:
        return raw[:at]
    if action == 1:
        return raw[:at] + raw[at + rng.randrange(1, 64) :]
    if action == 2:
        return raw[:at] + rng.randbytes(rng.randrange(1, 64)) + raw[at:]
    if action == 3:
        return raw[:at] + raw[at : at + 200] * 2 + raw[at + 200 :]
    if action == 4:
        return rng.choice((b"\xff" * 8, struct.pack("<Q", 2**63), struct.pack("<Q", rng.randrange(2**40)))) + raw[8:]
    if action == 5:
        nested = rng.choice((b"[", b'{"a":', b"[[],")) * rng.choice((10, 2000, 200_000))
        return struct.pack("<Q", len(nested)) + nested if rng.randrange(2) else nested
    flipped = bytearray(raw)
    for _ in range(rng.randrange(1, 8)):
        flipped[rng.randrange(min(len(raw), at + 64))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _renamed(rng: random.Random, folder: Folder) -> None:
    """Remove, exchange, copy or rename a file."""
    name = rng.choice(list(folder))
    other = rng.choice([*folder, "x.safetensors", "model-00003-of-00003.safetensors", SINGLE, "quantize_config.json"])
    action = rng.randrange(4)
    if action == 0:
        folder.pop(name)
    elif action == 1 and other in folder:
        folder[name], folder[other] = folder[other], folder[name]
    elif action == 2:
        folder[other] = folder[name]
    else:
        folder[other] = folder.pop(name)


def mutated(number: int, sound: list[Folder]) -> Folder:
    """Return the folder of a case, its files changed."""
    rng = random.Random(number)
    folder = dict(rng.choice(sound))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not folder:
            break
        name = rng.choice(list(folder))
        if rng.randrange(12) == 0:
            _renamed(rng, folder)
        elif rng.randrange(4) == 0:
            folder[name] = _bytes(rng, folder[name])
        elif name.endswith(".json"):
            folder[name] = _changed_json(rng, folder[name])
        else:
            folder[name] = rng.choice((_changed_header, _changed_tensor))(rng, folder[name])
    return folder
