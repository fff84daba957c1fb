"""Embedding image files: which rows are written, and what stops before anything is computed."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from eat_dist.embedding import embed_files
from eat_dist.errors import DataError
from eat_dist.models import EmbeddingEnsemble, EnsembleSpec, save_ensemble
from eat_dist.storage import Folder
from model_forms import built, small


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as far as embedding reads it."""
    save_ensemble(
        tmp_path / "run/model", EmbeddingEnsemble([built(small())]), spec=EnsembleSpec(small(), (3, 12, 12), 1)
    )
    return tmp_path / "run"


def embed(run: Path, *paths: Path | str, batch_size: int = 256) -> tuple[list[str], torch.Tensor]:
    output = str(run / "embeddings.parquet")
    embed_files(
        Folder.at(run),
        [str(path) for path in paths],
        output=output,
        on_bad_image="error",
        device=torch.device("cpu"),
        batch_size=batch_size,
    )
    table = pq.read_table(output)
    return table["path"].to_pylist(), torch.tensor(table["embedding"].to_pylist())


@pytest.mark.parametrize("batch_size", [2, 256])
def test_every_image_that_is_given_has_its_row_also_the_second_time(run: Path, tmp_path: Path, batch_size: int) -> None:
    (tmp_path / "images").mkdir()
    first, second = (str(tmp_path / f"images/{name}.png") for name in "ab")
    for path, grey in ((first, 40), (second, 200)):
        Image.linear_gradient("L").resize((12, 12)).point([min(level, grey) for level in range(256)]).save(path)
    names, rows = embed(run, first, first, tmp_path / "images", batch_size=batch_size)
    assert names == [first, first, first, second]
    torch.testing.assert_close(rows[0].expand(3, -1), rows[:3])
    assert not torch.allclose(rows[0], rows[3], atol=1e-3)


def test_a_path_that_is_not_utf_8_is_named_before_anything_is_computed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(b"never decoded")
    Path(os.fsdecode(bytes(tmp_path / "images/gr") + b"\xfc\xdf.png")).write_bytes(b"")
    with pytest.raises(DataError, match=r"/images/gr\\udcfc\\udcdf\.png' is not UTF-8") as caught:
        embed(run, tmp_path / "images")
    str(caught.value).encode()  # it can be printed
    assert "\n" not in str(caught.value)
