"""A sweep's folder becomes a page and its figures: what is in the files, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from eat_dist.errors import ConfigError, EatError, StorageError
from eat_dist.report import write_report
from eat_dist.report.sweeps.page import make_sweep_page
from eat_dist.storage import Folder
from evaluation_folders import quick_evaluation, write_run
from sweep_folders import IDLE, PLANTED, SPACE, edited, sweep_of, write_sweep

# The page as a file


def test_a_sweep_folder_becomes_a_page_and_its_figures(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", trials=3, space={PLANTED: SPACE[PLANTED]})

    written_files = [write_report([folder], str(tmp_path / where / "r.html")) for where in ("first", "second")]

    html = Path(written_files[0].page).read_text(encoding="utf-8")
    assert html == Path(written_files[1].page).read_text(encoding="utf-8")
    assert "<h1>Sweep s</h1>" in html
    names = {path.name for path in (tmp_path / "first" / "r_figures").iterdir()}
    for name in ("parallel", "front", "course-attacked-nmi", "slice-attacked-nmi-defense-transfer-strength"):
        assert {f"{name}.svg", f"{name}.png"} <= names
    assert len(written_files[0].figures) == len(names)
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert "var(--scale-6)" in html
    # Without a script, a request or a date of its own.
    assert "<script" not in html
    assert not re.search(r'(?:src|href)="(?!#|data:)', html)


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    evil = "<script>$x$<"
    folder = write_sweep(
        tmp_path / "s",
        trials=2,
        failed=1,
        space={PLANTED: SPACE[PLANTED], f"a.{evil}": {"choice": [evil]}},
        objectives=[{"name": evil, "direction": "max"}],
        name=evil,
        command=evil,
        git=evil,
        base_config={"data": {"dataset": evil}},
    )
    edited(folder, 0, error=evil, run_folder=evil)

    html = Path(write_report([folder], str(tmp_path / "r.html")).page).read_text(encoding="utf-8")

    assert "<script" not in html
    assert html.count("&lt;script&gt;$x$&lt;") > 15


def test_progress_is_told_by_part(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []

    sweep = sweep_of(tmp_path, trials=1, failed=1)

    make_sweep_page(sweep, on_progress=lambda *progress: told.append(progress))

    assert told == [("importances", 0, 3), ("figures", 1, 3), ("page", 2, 3)]


# What is refused


def test_a_sweep_is_reported_alone(tmp_path: Path) -> None:
    sweep, run = write_sweep(tmp_path / "s", trials=1), write_run(tmp_path / "a", summary=quick_evaluation())
    other = write_sweep(tmp_path / "t", trials=1)

    for folders in ([sweep, run], [run, sweep], [sweep, other], [sweep, sweep]):
        with pytest.raises(ConfigError, match="one sweep alone"):
            write_report(folders, str(tmp_path / "r.html"))
    assert not (tmp_path / "r.html").exists()


def broken(path: Path, fault: str) -> Folder:
    folder = write_sweep(path, trials=2)
    sweep, rows = folder.read_json("sweep.json"), folder.read_json("trials.json")
    if fault in ("sweep.json", "trials.json"):
        folder.delete(fault)
    elif fault == "cut":
        folder.write("trials.json", b'[{"id": ')
    elif fault == "no trials":
        folder.write_json("trials.json", [])
    elif fault == "twice":
        folder.write_json("trials.json", [rows[0], rows[0]])
    elif fault == "schema":
        folder.write_json("sweep.json", sweep | {"schema": 2})
    elif fault == "objectives":
        folder.write_json("sweep.json", sweep | {"objectives": []})
    elif fault == "space":
        folder.write_json("sweep.json", sweep | {"space": sweep["space"] | {IDLE: {"normal": [0, 1]}}})
    elif fault == "log":
        folder.write_json("sweep.json", sweep | {"space": sweep["space"] | {IDLE: {"log_uniform": [0, 1]}}})
    elif fault == "status":
        edited(folder, 0, status="DONE")
    elif fault == "stranger":
        edited(folder, 1, settings={"data.batch_size": 3})
    elif fault == "word":
        edited(folder, 1, settings={PLANTED: "much"})
    return folder


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("sweep.json", "it lacks sweep.json; start the sweep again"),
        ("trials.json", "it lacks trials.json; start the sweep again"),
        ("cut", "not valid JSON"),
        ("no trials", "no trials yet"),
        ("twice", "two trials have the id t0000"),
        ("schema", "expected schema 1; got 2"),
        ("objectives", "objectives"),
        ("space", f"with a list for {IDLE}"),
        ("log", f"above 0 for {IDLE}"),
        ("status", "0.status"),
        ("stranger", "trial 1 sets data.batch_size, which sweep.json lacks"),
        ("word", f"two numbers for {PLANTED}"),
    ],
)
def test_a_damaged_sweep_is_one_line(tmp_path: Path, fault: str, says: str) -> None:
    folder = broken(tmp_path / "s", fault)

    with pytest.raises(StorageError) as raised:
        write_report([folder], str(tmp_path / "r.html"))

    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, EatError)
    assert not (tmp_path / "r.html").exists()
