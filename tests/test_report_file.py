"""The report as a file: it needs nothing else, text stays text, the same runs give the same bytes; what is refused."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from eat_dist.errors import ConfigError, EatError, StorageError
from eat_dist.report import write_report
from eat_dist.report.groups import group_by_seed
from eat_dist.report.reading import read_runs
from eat_dist.report.tables import headline
from eat_dist.storage import Folder
from evaluation_folders import (
    BARE,
    SHORT,
    complete_run,
    evaluation,
    history,
    quick_evaluation,
    run_of,
    showcase,
    write_run,
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of two runs with every part, one with failed checks."""
    folder = tmp_path_factory.mktemp("report")
    natural = evaluation(strength=0.04, defense="natural", failing=("black_box",), **SHORT)
    # A few images: their maps take long.
    arrays = showcase(images=24, shown=2)
    runs = [
        write_run(folder / "eat-0", summary=evaluation(strength=0.45, **SHORT), trained=history(), arrays=arrays),
        write_run(folder / "natural-0", summary=natural, trained=history(adversarial=False), arrays=arrays),
    ]
    return Path(write_report(runs, str(folder / "report.html")).page).read_text(encoding="utf-8")


class Elements(HTMLParser):
    """All ids, and what links and images point at."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("href", "src", "xlink:href", "srcset", "action", "data"):
                self.targets.append(value or "")


def test_the_score_stands_beside_its_clean_recall(report: str) -> None:
    table = headline(group_by_seed([run_of("a"), run_of("b")]), comparable=True)

    assert [column.label for column in table.columns[-2:]] == ["clean R@1", "score"]
    assert [cell.text for cell in table.rows[0].cells[-2:]] == ["70.0", "30.0"]
    # In the table of its parts, too: every heading "ERS" follows one of "clean R@1".
    headings = re.findall(r'<th scope="col"[^>]*>([^<]*)</th>', report)
    assert [before for before, name in pairwise(headings) if name == "ERS"] == ["clean R@1"]


def test_failed_checks_come_first_and_are_not_folded_away(report: str) -> None:
    section = report[report.index('id="sanity"') :]
    failed, passed = section.index("✗ failed"), section.index("✓ passed")

    assert failed < passed
    assert failed < section.index("<details")
    assert "0.31 against 0.86" in section


def test_the_page_needs_nothing_but_itself(report: str) -> None:
    elements = Elements(report)

    assert "script" not in elements.tags
    assert not {"iframe", "object", "embed", "form", "video", "audio"} & set(elements.tags)
    assert elements.targets
    for target in elements.targets:
        assert target.startswith(("#", "data:"))
    assert "url(" not in re.sub(r"url\(#", "", report)
    assert "@import" not in report
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in report


def test_every_id_is_there_once_and_every_reference_leads_somewhere(report: str) -> None:
    elements = Elements(report)
    references = {target[1:] for target in elements.targets if target.startswith("#")}
    references |= set(re.findall(r"url\(#([^)]*)\)", report)) | set(re.findall(r'aria-labelledby="([^"]*)"', report))

    assert len(elements.ids) == len(set(elements.ids))
    assert references <= set(elements.ids)


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    """As the name of a folder, a model, an attack, an image and a class, and in command and config."""
    evil = "<script>alert(1)<"
    point = SHORT["curves"][1] | {"objective": evil}
    summary = evaluation(command=evil, target={"kind": evil, "name": evil}, dataset=evil, defense=evil)
    summary |= {"curves": [point], "fractions_table": []}
    summary["ensemble"]["attacked"][f"{evil}/{evil}"] = {"r_at_1": 0.1}
    summary["sanity"][0] |= {"claim": evil, "measured": evil}
    # Two runs, or there would be no legends.
    write_run(tmp_path / evil, summary=summary, config={"name": evil}, arrays=showcase(images=24, shown=1))
    about = tmp_path / evil / "evaluation/full/showcase.json"
    about.write_text(json.dumps({"attack": evil, "names": [evil], "classes": [evil] * 8}))
    beside = evaluation(**BARE) | {"ladder": summary["ladder"]}
    folders = [Folder.at(tmp_path / evil), write_run(tmp_path / "$\\frac$ & <b>", summary=beside)]

    html = Path(write_report(folders, str(tmp_path / "r.html"), title=evil).page).read_text(encoding="utf-8")

    assert "script" not in Elements(html).tags
    assert "b" not in Elements(html).tags
    assert html.count("&lt;script&gt;alert(1)&lt;") > 20
    # Legends of the files are drawn as they stand, not as mathematics.
    svg = (tmp_path / "r_figures" / "ladder-nearest-negative.svg").read_text(encoding="utf-8")
    assert "$\\frac$ &amp; &lt;b&gt;" in svg


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    arrays = showcase(images=24, shown=1)
    few = {"curves": [], "fractions_table": []}
    trained = history(adversarial=False)
    folder = write_run(tmp_path / "a", summary=evaluation(**few), trained=trained, arrays=arrays)

    written = [write_report([folder], str(tmp_path / where / "r.html")) for where in ("first", "second")]
    contents = [
        {path.relative_to(tmp_path / where): path.read_bytes() for path in (tmp_path / where).rglob("*.*")}
        for where in ("first", "second")
    ]

    assert contents[0] == contents[1]
    names = {str(name) for name in contents[0]}
    assert {"r.html", "r_figures/training-clean-loss.svg", "r_figures/training-clean-loss.png"} <= names
    assert len(written[0].figures) == len(names) - 1
    for name, content in contents[0].items():
        assert content.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".html": b"<!DOCTYPE html>"}[name.suffix])
    # Not because nothing enters: other figures give another page.
    lasting = contents[0][Path("r_figures/map-1-a-clean.svg")]
    assert lasting != contents[0][Path("r_figures/map-1-a-attacked.svg")]


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", summary=evaluation(**BARE) | {"ladder": evaluation()["ladder"]})
    (tmp_path / "out" / "r.html" / "in the way").mkdir(parents=True)

    with pytest.raises(StorageError):
        write_report([folder], str(tmp_path / "out" / "r.html"))

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["r.html"]


def test_the_strongest_protocol_of_a_folder_is_reported(tmp_path: Path) -> None:
    write_run(tmp_path / "a", summary=quick_evaluation())

    assert read_runs([Folder.at(tmp_path / "a")])[0].evaluation.protocol == "quick"
    write_run(tmp_path / "a", summary=evaluation())
    assert read_runs([Folder.at(tmp_path / "a")])[0].evaluation.protocol == "full"


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / parent / "eat-0") for parent in ("digits", "omniglot")]

    assert [run.label for run in read_runs(folders)] == ["digits/eat-0", "omniglot/eat-0"]
    assert read_runs(folders[:1])[0].label == "eat-0"


def test_progress_is_told_by_section(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", summary=quick_evaluation())
    told: list[tuple[str, int, int]] = []

    write_report([folder], str(tmp_path / "r.html"), on_progress=lambda *progress: told.append(progress))

    assert told[0] == ("figures", 0, 11)
    assert told[-1] == ("page", 11, 11)


# What is refused


def broken_folder(path: Path, fault: str) -> Folder:
    folder = complete_run(path, **BARE)
    summary = folder.read_json("evaluation/full/summary.json")
    if fault == "no evaluation":
        folder.delete("evaluation")
    elif fault == "old schema":
        folder.write_json("evaluation/full/summary.json", summary | {"schema": 3})
    elif fault == "not JSON":
        folder.write("evaluation/full/summary.json", b"{")
    elif fault == "no number":
        summary["ensemble"]["clean"]["r_at_1"] = "much"
        folder.write_json("evaluation/full/summary.json", summary)
    elif fault == "ragged matrix":
        summary["transfer"]["success_rate"][0] = [0.5]
        folder.write_json("evaluation/full/summary.json", summary)
    elif fault == "cut pictures":
        folder.write("evaluation/full/showcase.safetensors", b"\x08\x00")
    elif fault == "cut statistics":
        folder.write("statistics/00000000.parquet", b"PAR1")
    elif fault == "config":
        folder.write("config.yaml", b"a: [")
    return folder


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("no evaluation", "run 'eat-dist evaluate' first"),
        ("old schema", "expected schema 4; got 3"),
        ("not JSON", "not valid JSON"),
        ("no number", "ensemble.clean.r_at_1"),
        ("ragged matrix", "transfer"),
        ("cut pictures", "showcase.safetensors"),
        ("cut statistics", "statistics"),
        ("config", "config.yaml"),
    ],
)
def test_a_damaged_folder_is_one_line(tmp_path: Path, fault: str, says: str) -> None:
    folder = broken_folder(tmp_path / "a", fault)

    with pytest.raises(StorageError) as raised:
        write_report([folder], str(tmp_path / "r.html"))

    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "r.html").exists()


def test_what_was_asked_for_wrongly_is_one_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", summary=quick_evaluation())
    page = str(tmp_path / "r.html")
    asked: list[tuple[list[Folder], str, type[EatError], str]] = [
        ([], page, ConfigError, "got none"),
        ([folder, folder], page, ConfigError, "twice"),
        ([folder], str(tmp_path / "r.pdf"), ConfigError, "end in .html"),
        ([folder], str(tmp_path / ".html"), ConfigError, "end in .html"),
        ([Folder.at(tmp_path / "nowhere")], page, StorageError, "no such folder"),
    ]
    for folders, output, error, says in asked:
        with pytest.raises(error, match=re.escape(says)):
            write_report(folders, output)
