"""Embedding image files with a trained run: files in, Parquet out."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from eat_dist.attacks import seeded
from eat_dist.data.decode import decode_image
from eat_dist.data.transforms import InferenceForm
from eat_dist.errors import DataError
from eat_dist.evaluation.embed import embed_batch
from eat_dist.models.ensemble import EnsembleSpec, load_ensemble, load_spec
from eat_dist.seeding import generator
from eat_dist.storage import Folder


def embed_files(
    run_folder: Folder,
    paths: Sequence[str],
    *,
    output: str,
    on_bad_image: Literal["error", "skip"],
    device: torch.device,
    batch_size: int = 256,
) -> tuple[int, tuple[str, ...]]:
    """Write one row an image: ``path`` and ``embedding`` (float32, length 1, M·D numbers).

    A file that is given twice, also as one of a folder, has two rows. The same files in the same order give the same
    embeddings, also behind a randomised defense at inference.

    Args:
        run_folder: A finished run.
        paths: Image files; a folder stands for all files in it.
        output: Parquet file to write, a path or URL.
        on_bad_image: What an undecodable image does.
        device: Where to compute.
        batch_size: Images of a forward pass.

    Returns:
        (Images embedded, paths of the skipped ones).

    Raises:
        DataError: No image, one that cannot be decoded (``error``), or a path that is not UTF-8.
        StorageError: The run or the output folder cannot be used.
    """
    model = run_folder.child("model")
    spec = load_spec(model)
    ensemble = load_ensemble(model).to(device)
    files = _files(paths)
    names: list[str] = []
    skipped: list[str] = []
    embeddings: list[torch.Tensor] = []
    for first in range(0, len(files), batch_size):
        images = _decode(files[first : first + batch_size], spec, skipped, on_bad_image=on_bad_image)
        if images:
            names += [path for path, _ in images]
            batch = torch.stack([image for _, image in images]).to(device).float() / 255
            with seeded(generator(0, "embed", first), device):  # for a randomised defense at inference
                embeddings.append(embed_batch(ensemble, batch))
    if not names:
        raise DataError(f"none of the {len(files)} images could be decoded, e.g. '{skipped[0]}'")
    embedded = torch.cat(embeddings)
    column = pa.FixedSizeListArray.from_arrays(pa.array(embedded.flatten().numpy()), embedded.shape[1])
    buffer = io.BytesIO()
    pq.write_table(pa.table({"path": names, "embedding": column}), buffer)
    folder, name = Folder.of_file(output)
    folder.write(name, buffer.getvalue())
    return len(names), tuple(skipped)


def _decode(
    files: Sequence[str], spec: EnsembleSpec, skipped: list[str], *, on_bad_image: Literal["error", "skip"]
) -> list[tuple[str, torch.Tensor]]:
    """Paths and images, as the ensemble sees them, [C, H, W] uint8; bad ones are appended to ``skipped``."""
    channels, size, _ = spec.image_shape
    form = InferenceForm(spec.resize or size, size)
    images = []
    for path in files:
        try:
            image = form(decode_image(Path(path).read_bytes(), name=path, channels=3 if channels == 3 else 1))
        except (DataError, OSError) as error:
            if on_bad_image == "error":
                raise DataError(f"{error}. Replace it, or give --skip-bad-images.") from error
            skipped.append(path)
        else:
            images.append((path, 255 - image if spec.inverted else image))
    return images


def _files(paths: Sequence[str]) -> list[str]:
    """The image files that are meant, checked for what would be found out only when all is computed."""
    files: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(str(file) for file in path.rglob("*") if file.is_file())
        elif path.is_file():
            files.append(str(path))
        else:
            raise DataError(f"there is no image '{path}'")
    if not files:
        raise DataError(f"no files in {', '.join(paths)}")
    for file in files:
        try:
            file.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the path {file!r} is not UTF-8, which Parquet's strings are; rename the file") from error
    return files
