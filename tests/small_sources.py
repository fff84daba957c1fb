"""Small datasets for tests: files by ``role/class/name``, in memory."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from eat_dist.data.source import Item, Role, Source
from eat_dist.errors import DataError

TESTS = Path(__file__).resolve().parent


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(seed: int, *, height: int = 9, width: int = 12, mode: str = "RGB") -> Image.Image:
    """Coarse noise, so that scaling and JPEG leave something of it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def few_files(per_class: int = 3, *, roles: tuple[str, ...] = ("train", "test")) -> dict[str, bytes]:
    """Two classes a set; query and gallery have the same. No order is the sorted one."""
    classes = {"train": ("wasp", "ant"), "test": ("dog", "cat"), "query": ("dog", "cat"), "gallery": ("dog", "cat")}
    names = [f"{role}/{name}/{i}.png" for role in reversed(roles) for i in range(per_class) for name in classes[role]]
    return {name: encoded(picture(seed)) for seed, name in enumerate(names)}


def source_of(
    files: Mapping[str, bytes],
    *,
    dataset: str = "folder",
    channels: Literal[1, 3] = 3,
    inverted: bool = False,
    small: bool = False,
    read: Callable[[str], bytes] | None = None,
) -> Source:
    """A source whose items are in the order of ``files``; models see 6 × 6 of 8 pixels by default."""
    items = []
    for name in files:
        role: Role
        role, class_name, _ = name.split("/")  # type: ignore[assignment]
        items.append(Item(name, class_name, role))
    stamp = hashlib.sha256(repr([(name, hashlib.sha256(files[name]).digest()) for name in files]).encode()).hexdigest()
    return Source(dataset, tuple(items), read or files.__getitem__, stamp, channels, 6, 8, inverted, small)


def write_files(root: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def flip_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def unreadable(name: str) -> bytes:
    raise DataError(f"nothing is to be read, but '{name}' was")


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Run code that imports from here in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
