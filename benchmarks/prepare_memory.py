"""Seconds, images a second and memory of preparing shards from as many files as CUB-200-2011 has.

    python benchmarks/prepare_memory.py [--image-size 256] [--folder FOLDER]

11,788 JPEGs of 500 × 375 pixels (smooth noise and a disc, about 100 kB each) are made in CUB's layout and prepared by
the command in a process of its own. 16 of them are drawn; the others are copies with another comment, so that no two
files are the same. Needs 2.5 GB of disk.
"""

from __future__ import annotations

import argparse
import io
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

DIFFERENT = 16
# Images of each of the 200 classes: 5,864 of the first 100 classes, 5,924 of the others, as published.
PER_CLASS = [59] * 64 + [58] * 36 + [60] * 24 + [59] * 76


def photograph(seed: int) -> bytes:
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    image = coarse.resize((500, 375), Image.Resampling.BICUBIC)
    left, top = (int(value) for value in generator.integers(0, 250, 2))
    ImageDraw.Draw(image).ellipse(
        (left, top, left + 200, top + 120), fill=tuple(generator.integers(0, 256, 3).tolist())
    )
    noisy = np.asarray(image) + generator.normal(0, 10, (375, 500, 1))
    stream = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def with_comment(jpeg: bytes, text: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + jpeg[2:]


def make_cub(root: Path) -> int:
    """Write the layout; return the bytes of all images."""
    jpegs = [photograph(seed) for seed in range(DIFFERENT)]
    paths: list[str] = []
    labels: list[str] = []
    names: list[str] = []
    size = 0
    for label, count in enumerate(PER_CLASS, start=1):
        name = f"{label:03d}.Species_{label}"
        names.append(f"{label} {name}\n")
        (root / "images" / name).mkdir(parents=True)
        for number in range(1, count + 1):
            image = len(paths) + 1
            content = with_comment(jpegs[image % DIFFERENT], b"%06d" % image)
            path = f"{name}/Species_{label}_{number:04d}.jpg"
            (root / "images" / path).write_bytes(content)
            paths.append(f"{image} {path}\n")
            labels.append(f"{image} {label}\n")
            size += len(content)
    for file, lines in (("images.txt", paths), ("image_class_labels.txt", labels), ("classes.txt", names)):
        (root / file).write_text("".join(lines))
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image-size", type=int, help="scale down to this shorter side; default: original files")
    parser.add_argument("--folder", help="where the temporary files go")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root, out = Path(folder, "CUB_200_2011"), Path(folder, "shards")
        size = make_cub(root)
        print(f"{sum(PER_CLASS):,} images, {size / 1e6:,.0f} MB", flush=True)
        command = [sys.executable, "-m", "eat_dist", "data", "prepare", "--dataset", "cub200"]
        command += ["--root", str(root), "--out", str(out)]
        if arguments.image_size is not None:
            command += ["--image-size", str(arguments.image_size)]
        begin = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - begin
        stored = sum(path.stat().st_size for path in out.iterdir())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"{seconds:.0f} s, {sum(PER_CLASS) / seconds:.0f} images/s")
    print(f"{stored / 1e6:,.0f} MB stored, {peak / 1e6:,.0f} MB of memory at the highest")


if __name__ == "__main__":
    main()
