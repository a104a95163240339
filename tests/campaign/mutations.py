"""Broken files made from good ones, from a seed: by bytes, by words, and by what a format means.

`mutate` knows formats by file names. What it makes is sometimes still good.
"""

from __future__ import annotations

import copy
import io
import json
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
import yaml
from safetensors.numpy import load, save

__all__ = ["mutate"]

TEXTS = (
    *("", " ", "x", "1", "-1", "0", "nan", "inf", "1e400", "1e38", "-1e308", "0x10", "1_000", "true", "none"),
    *(
        "a/b",
        "../../x",
        "/etc/passwd",
        "..",
        ".",
        "a\\b",
        "C:\\x",
        "a" * 300,
        "a" * 6000,
        "a b",
        "\t",
        "a\nb",
    ),
    *(
        "\x1b[31m",
        "\u202e",
        "\u0085",
        "\ufeff",
        "\ud800",
        "\0",
        "é",
        "日",
        "$_$",
        "$\\frac{1}{$",
        "=1+cmd|calc!A0",
    ),
    *("<script>", "a|b", "&lt;", "%s", "{}", "linear", "rbf", "train", "test"),
)
NUMBERS = (
    *(
        0,
        -1,
        1,
        2,
        3,
        7,
        255,
        1000,
        2**31,
        2**32,
        2**63,
        -(2**63),
        10**400,
        0.5,
        -0.0,
        1e-320,
        1e38,
        1e39,
        1e308,
    ),
    *(-1e308, math.nan, math.inf, -math.inf),
)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"a": 1}, [[1, 2, 3, 4]], [1, 2, 3, 4])
TOKENS = (
    *(
        b"1e400",
        b"9" * 5000,
        b"-",
        b"[" * 3000,
        b"{" * 900,
        b'{"a":' * 2000,
        b"]",
        b"}",
        b'"',
        b"'",
        b",",
        b":",
    ),
    *(
        b"&a [*a]",
        b"!!python/object/apply:os.system [x]",
        b"!!int x",
        b"!!binary x",
        b"<<: *a",
        b"---\n",
        b"\0",
    ),
    *(b"<!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]>", b"<![CDATA[", b"<!--", b"&b;", b"</object>"),
    *(
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\r",
        b"\n\n",
        b"\t",
        b" ",
        b"\x1b[2J",
        b"\\ud800",
        b"#",
    ),
)


def mutate(name: str, content: bytes, rng: Random) -> bytes:
    """Return what is made of the content of a file; its name tells the format."""
    suffix = Path(name).suffix
    structured = _BY_SUFFIX.get(suffix)
    text = suffix in _TEXT
    if structured is not None and rng.random() < 0.6:
        content = structured(content, rng)
        if rng.random() < 0.8:
            return content
    return _words(content, rng) if text and rng.random() < 0.6 else _bytes(content, rng)


def _bytes(content: bytes, rng: Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        n = len(data)
        at = rng.randrange(n) if n else 0
        end = min(n, at + rng.choice((1, 2, 4, 16, 200)))
        way = rng.randrange(8)
        if way == 0 and n:
            data[at] ^= 1 << rng.randrange(8)
        elif way == 1 and n:
            data[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif way == 2:
            del data[at:end]
        elif way == 3:
            data[at:at] = data[at:end] * rng.choice((1, 2, 50))
        elif way == 4 and rng.random() < 0.3:
            del data[at:]
        elif way == 5 and rng.random() < 0.3:
            data[at:] = bytes(n - at)
        elif way == 6:
            data[at:end] = rng.randbytes(end - at)
        elif n >= 4:
            number = rng.choice((0, 1, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 13377))
            at = min(at, n - 4)
            data[at : at + 4] = struct.pack(rng.choice("<>") + "I", number)
    return bytes(data)


def _words(content: bytes, rng: Random) -> bytes:
    lines = content.split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(lines))
        words = lines[at].split(b" ")
        k = rng.randrange(len(words))
        way = rng.randrange(8)
        if way == 0:
            words[k] = _encoded(rng.choice(TEXTS))
        elif way == 1:
            words[k] = str(_number(rng)).encode()
        elif way == 2:
            del words[k]
        elif way == 3:
            words.insert(k, rng.choice(words))
        elif way == 4:
            words[k] = rng.choice(TOKENS)
        elif way == 5:
            words = rng.choice(lines).split(b" ")
        elif way == 6:
            words += words * rng.choice((1, 3))
        else:
            place = rng.randrange(len(words[k]) + 1)
            words[k] = words[k][:place] + rng.choice(TOKENS) + words[k][place:]
        lines[at] = b" ".join(words)
    return b"\n".join(lines)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _number(rng: Random) -> Any:
    return rng.choice(NUMBERS) if rng.random() < 0.7 else rng.uniform(-1000, 1000)


def _value(rng: Random) -> Any:
    way = rng.random()
    return _number(rng) if way < 0.4 else rng.choice(TEXTS) if way < 0.7 else rng.choice(OTHERS)


def _tree(value: Any, rng: Random) -> Any:
    """Change one place of nested dictionaries and lists."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        way = rng.random()
        if way < 0.7:
            return {**value, key: _tree(value[key], rng)}
        if way < 0.85:
            return {k: v for k, v in value.items() if k != key}
        return {(rng.choice(TEXTS) if k == key else k): v for k, v in value.items()}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        way = rng.random()
        if way < 0.7:
            return [*value[:at], _tree(value[at], rng), *value[at + 1 :]]
        if way < 0.8:
            return value[:at] + value[at + 1 :]
        return [*value, value[at]] if way < 0.95 else [value]
    return _value(rng)


def _json(content: bytes, rng: Random) -> bytes:
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _tree(value, rng)
    return json.dumps(value, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")


def _json_lines(content: bytes, rng: Random) -> bytes:
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = _json(lines[at], rng)
    return b"\n".join(lines) + b"\n"


def _yaml(content: bytes, rng: Random) -> bytes:
    value = yaml.safe_load(content)
    for _ in range(rng.choice((1, 1, 2))):
        value = _tree(value, rng)
    if rng.random() < 0.1:
        bomb = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 8))
        return b"a0: &a0 x\n" + bomb.encode() + content
    try:
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    except ValueError:  # a number of too many digits
        return content


def _toml(content: bytes, rng: Random) -> bytes:
    lines = content.decode().splitlines()
    at = rng.randrange(len(lines))
    key, equals, _ = lines[at].partition("=")
    if equals:
        value = _value(rng)
        text = json.dumps(value, ensure_ascii=False) if value is not None else "none"
        lines[at] = f"{key}= {text.replace('NaN', 'nan').replace('Infinity', 'inf')}"
    return _encoded("\n".join(lines) + "\n")


def _xml(content: bytes, rng: Random) -> bytes:
    root = ElementTree.fromstring(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        elements = list(root.iter())
        one = rng.choice(elements)
        way = rng.randrange(6)
        if way < 3:
            one.text = str(_number(rng)) if rng.random() < 0.6 else rng.choice(TEXTS)
        elif way == 3 and len(one):
            one.remove(rng.choice(list(one)))
        elif way == 4:
            one.append(copy.deepcopy(rng.choice(elements[1:])))
        else:
            one.tag = rng.choice(
                ("object", "bndbox", "name", "annotation", "part", "size", "polygon", "robndbox")
            )
    if rng.random() < 0.05:
        levels = rng.choice((100, 20000))
        return b"<annotation>" + b"<object>" * levels + b"</object>" * levels + b"</annotation>"
    return ElementTree.tostring(root, encoding="unicode").encode("utf-8", "surrogatepass")


def _array(array: np.ndarray[Any, Any], rng: Random) -> np.ndarray[Any, Any]:
    way = rng.randrange(8)
    if way == 0 and array.size and array.dtype.kind == "f":
        changed = array.copy()
        changed.flat[rng.randrange(array.size)] = rng.choice((np.nan, np.inf, -np.inf, 1e38, 0))
        return changed
    if way == 1:
        return array.reshape(-1)
    if way == 2:
        return array[None]
    if way == 3:
        return array[: rng.randrange(len(array) + 1)] if array.ndim else array
    if way == 4:
        return np.ascontiguousarray(array.T)
    if way == 5:
        with np.errstate(all="ignore"):
            return array.astype(rng.choice((np.float64, np.float16, np.int64, np.uint8, np.bool_)))
    if way == 6:
        return np.zeros((0, *array.shape[1:]), array.dtype)
    return np.full_like(array, rng.choice((0, 1, 100)))


def _arrays(arrays: dict[str, np.ndarray[Any, Any]], rng: Random) -> dict[str, np.ndarray[Any, Any]]:
    name = rng.choice(list(arrays))
    way = rng.random()
    if way < 0.8:
        return {**arrays, name: _array(arrays[name], rng)}
    if way < 0.9:
        return {k: v for k, v in arrays.items() if k != name}
    return {(f"{k}.x" if k == name else k): v for k, v in arrays.items()}


def _safetensors(content: bytes, rng: Random) -> bytes:
    if rng.random() < 0.6:
        (n,) = struct.unpack("<Q", content[:8])
        metadata = json.loads(content[8 : 8 + n]).get("__metadata__")
        arrays = {k: np.ascontiguousarray(v) for k, v in _arrays(load(content), rng).items()}
        if metadata and rng.random() < 0.2:
            metadata = {k: str(_value(rng)).encode("utf-8", "replace").decode() for k in metadata}
        return save(arrays, metadata)
    (n,) = struct.unpack("<Q", content[:8])
    header = _json(content[8 : 8 + n], rng)
    size = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**31, 2**63, len(header) + 1))
    return struct.pack("<Q", size) + header + content[8 + n :]


def _npz(content: bytes, rng: Random) -> bytes:
    with np.load(io.BytesIO(content)) as stored:
        arrays = {name: stored[name] for name in stored.files}
    stream = io.BytesIO()
    np.savez(stream, **_arrays(arrays, rng))
    return stream.getvalue()


def _npy(content: bytes, rng: Random) -> bytes:
    """Another header or another array, with the tail that follows the array as it was."""
    stream = io.BytesIO(content)
    array = np.load(stream)
    tail = content[stream.tell() :]
    changed = io.BytesIO()
    np.save(changed, _array(array, rng))
    return changed.getvalue() + tail


def _pth(content: bytes, rng: Random) -> bytes:
    state = {k: v.numpy() for k, v in torch.load(io.BytesIO(content), weights_only=True).items()}
    changed: Any = {k: torch.from_numpy(np.array(v)) for k, v in _arrays(state, rng).items()}
    way = rng.random()
    if way < 0.1:
        changed = [changed, {"model": changed}, {"a": changed, "b": changed}, 5, "x", None][rng.randrange(6)]
    stream = io.BytesIO()
    torch.save(changed, stream, _use_new_zipfile_serialization=rng.random() < 0.5)
    return stream.getvalue()


def _png(content: bytes, rng: Random) -> bytes:
    """Change a chunk and its checksum with it."""
    chunks, at = [], 8
    while at + 8 <= len(content):
        (n,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + n]))
        at += 12 + n
    k = rng.randrange(len(chunks))
    kind, body = chunks[k]
    way = rng.randrange(4)
    if way == 0:
        chunks[k] = kind, _bytes(body, rng)
    elif way == 1:
        chunks.insert(k, chunks[k])
    elif way == 2:
        del chunks[k]
    else:
        chunks[k] = rng.choice((b"IHDR", b"PLTE", b"IDAT", b"tRNS", b"eXIf", b"acTL", b"fcTL", b"iCCP")), body
    made = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    return content[:8] + b"".join(made)


_TEXT = frozenset({".json", ".jsonl", ".xml", ".yaml", ".toml", ".txt", ".ppm"})
_BY_SUFFIX: dict[str, Callable[[bytes, Random], bytes]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".yaml": _yaml,
    ".toml": _toml,
    ".xml": _xml,
    ".safetensors": _safetensors,
    ".checkpoint": _safetensors,
    ".npz": _npz,
    ".npy": _npy,
    ".pth": _pth,
    ".png": _png,
}
