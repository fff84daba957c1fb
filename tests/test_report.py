"""The report, without a browser: what is marked, merged, escaped, drawn and refused."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eat_dist.errors import ConfigError, EatError, StorageError
from eat_dist.report import write_report
from eat_dist.report.cells import marked
from eat_dist.report.content import Page, Table
from eat_dist.report.drawing import DASHES, MARKERS, PALETTE, look
from eat_dist.report.embedding_map import MOST_IMAGES, chosen, nearest_agree, plane
from eat_dist.report.groups import Value, disagreements, group_by_seed, worst
from eat_dist.report.page import make_page, render, verdict
from eat_dist.report.reading import Run, read_runs
from eat_dist.report.schema import Evaluation
from eat_dist.report.strip import amplified, data_uri
from eat_dist.report.tables import attacks, headline
from eat_dist.report.training import course
from eat_dist.report.wording import attack_name, number, percent, radius, split_attack
from eat_dist.storage import Folder
from evaluation_folders import (
    complete_run,
    evaluation,
    history,
    quick_evaluation,
    showcase,
    write_run,
)

# Without the parts that are drawn: it takes a second where a whole page takes ten.
BARE: dict[str, Any] = {"curves": [], "fractions_table": [], "ladder": []}
# With one drawing of each kind.
SHORT: dict[str, Any] = {
    "curves": [point for point in evaluation()["curves"] if point["objective"] == "displacement"][:2],
    "fractions_table": evaluation()["fractions_table"][:2],
}


def run_of(label: str, config: str = "", **changes: Any) -> Run:
    """A run as it is read, without files."""
    summary = Evaluation.model_validate(evaluation(**changes))
    return Run(label, summary, config, history(iterations=0), None)


def marks(table: Table, column: int) -> list[str | None]:
    """The marks of a column of numbers, the row headings not counted."""
    return [row.cells[column].mark for row in table.rows]


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


# What is marked


def test_the_best_of_a_column_is_marked_as_printed() -> None:
    """0.3012 and 0.2996 print as 30.1 and 30.0; 30.04 and 29.96 both print as 30.0 and are marked alike."""
    values = [[Value(30.12), Value(30.04)], [Value(29.96), Value(29.96)], [Value(10.0), Value(None)]]

    cells = marked(values, eligible=[True] * 3, mark="best", extremes=[max, max])

    assert [row[0].mark for row in cells] == ["best", None, None]
    # Both print 30.0: no difference to mark.
    assert [row[1].mark for row in cells] == [None, None, None]
    assert [row[1].text for row in cells] == ["30.0", "30.0", "–"]


def test_a_run_with_a_failed_check_is_never_the_best() -> None:
    broken = run_of("broken", strength=0.9, failing=("gradients",))
    runs = [broken, run_of("a", strength=0.3), run_of("b", strength=0.2)]

    table = headline(group_by_seed(runs), comparable=True)

    attacked_recall = 1
    assert marks(table, attacked_recall) == [None, "best", None]
    assert table.rows[0].heading == "✗ broken"
    assert "do not quote" in table.note
    # Were its checks to pass, it would be the best.
    runs[0] = run_of("broken", strength=0.9)
    assert marks(headline(group_by_seed(runs), comparable=True), attacked_recall) == ["best", None, None]


def test_runs_measured_differently_are_not_compared() -> None:
    runs = [run_of("a", strength=0.3, **BARE), run_of("b", strength=0.2, epsilon=0.2, **BARE)]

    table = headline(group_by_seed(runs), comparable=not disagreements(runs))
    page = make_page(runs)

    assert disagreements(runs) == ["ε"]
    assert {cell.mark for row in table.rows for cell in row.cells} == {None}
    assert "they differ in ε" in page.warnings[0]
    assert not make_page([runs[0], run_of("c", **BARE)]).warnings


def test_one_run_alone_is_not_the_best_of_anything() -> None:
    table = headline(group_by_seed([run_of("a")]), comparable=True)

    assert {cell.mark for row in table.rows for cell in row.cells} == {None}


def test_the_strongest_attack_is_the_lowest_figure_and_the_highest_success() -> None:
    """Of the helper's attacks on all images nearest_negative leaves least R@1, random_wrong_centroid least NMI."""
    table = attacks(run_of("a"))
    columns = [column.label for column in table.columns][1:]
    objectives = {
        name: [row.cells[0].text for row in table.rows if row.cells[columns.index(name)].mark == "strongest"]
        for name in ("R@1", "NMI", "success")
    }

    assert objectives == {
        "R@1": ["nearest negative"],
        "NMI": ["random wrong centroid"],
        "success": ["nearest negative"],
    }


def test_an_attack_on_a_sample_is_named_so_and_does_not_compete() -> None:
    weak = evaluation()
    weak["ensemble"]["attacked"]["square1000/nearest_negative"]["r_at_1"] = 0.0
    run = Run("a", Evaluation.model_validate(weak), "", history(iterations=0), None)

    row = next(row for row in attacks(run).rows if row.heading.startswith("Square"))

    assert row.heading == "Square-1000 (sample)"
    assert {cell.mark for cell in row.cells} == {None}


def test_the_score_stands_beside_its_clean_recall(report: str) -> None:
    table = headline(group_by_seed([run_of("a"), run_of("b")]), comparable=True)

    assert [column.label for column in table.columns[-2:]] == ["clean R@1", "score"]
    assert [cell.text for cell in table.rows[0].cells[-2:]] == ["70.0", "30.0"]
    # In the table of its parts, too: every heading "ERS" follows one of "clean R@1".
    headings = re.findall(r'<th scope="col"[^>]*>([^<]*)</th>', report)
    assert [before for before, name in pairwise(headings) if name == "ERS"] == ["clean R@1"]


# Seeds


def test_runs_that_differ_in_their_seed_only_become_mean_and_deviation() -> None:
    """Clean R@1 0.70, 0.71, 0.72 for seeds 0, 1, 2: mean 71.0, deviation (n − 1) 1.0."""
    config = "name: {name}\nseed: {seed}\ndefense:\n  name: eat\n"
    runs = [run_of(f"eat-{seed}", config.format(name=f"n{seed}", seed=seed), seed=seed) for seed in range(3)]
    other = run_of("pgd_at-0", "seed: 0\ndefense:\n  name: pgd_at\n")

    groups = group_by_seed([*runs, other])
    cell = headline(groups, comparable=True).rows[0].cells[0]

    assert [group.label for group in groups] == ["eat (3 seeds)", "pgd_at-0"]
    assert (cell.text, cell.spread) == ("71.0", "1.0")


def test_two_runs_of_one_seed_are_no_sample_of_two() -> None:
    assert len(group_by_seed([run_of("a", "seed: 0"), run_of("b", "seed: 0")])) == 2
    assert len(group_by_seed([run_of("a", "seed: 0"), run_of("b", "seed: 1", seed=1)])) == 1


def test_foreign_models_are_never_put_together() -> None:
    """Their config does not say which weights they have."""
    target = {"kind": "module", "name": "x"}
    runs = [run_of(str(seed), "seed: 0", seed=seed, target=target) for seed in range(2)]

    assert len(group_by_seed(runs)) == 2


def test_the_worst_figure_carries_the_spread_of_its_own_attack() -> None:
    summary = evaluation()
    weakest = min(summary["ensemble"]["attacked"].values(), key=lambda figures: figures.get("nmi", 1.0))
    weakest["nmi_std"] = 0.031

    assert worst("nmi")(Evaluation.model_validate(summary)) == Value(weakest["nmi"], 0.031)
    # Of R@1 the worst is over queries, not over attacks: it has no spread.
    assert worst("r_at_1")(Evaluation.model_validate(summary)).std is None


# What is said


@pytest.mark.parametrize(
    ("changes", "outcome", "sentence"),
    [
        ({}, "pass", "✓ All 8 sanity checks passed: the figures may be quoted."),
        ({"failing": ("zero_epsilon", "ladder")}, "fail", "✗ 2 of 8 sanity checks failed: do not quote these figures."),
        ({"sanity": []}, "none", "○ No sanity checks were run (protocol full): read the attacked figures as upper "),
    ],
)
def test_the_verdict_says_whether_the_figures_may_be_quoted(
    changes: dict[str, Any], outcome: str, sentence: str
) -> None:
    said = verdict(run_of("a", strength=0.5, **changes))

    assert said.outcome == outcome
    assert said.sentence.startswith(sentence)
    # Clean R@1 0.70; half of it is left.
    assert said.figures[0] == ("R@1", "70.0", "35.0")


def test_failed_checks_come_first_and_are_not_folded_away(report: str) -> None:
    section = report[report.index('id="sanity"') :]
    failed, passed = section.index("✗ failed"), section.index("✓ passed")

    assert failed < passed
    assert failed < section.index("<details")
    assert "0.31 against 0.86" in section


def test_what_was_not_measured_is_said() -> None:
    quick = Run("q", Evaluation.model_validate(quick_evaluation()), "", history(iterations=0), None)

    html = render(make_page([quick]), figures_folder=None)

    for sentence in (
        "q (protocol quick): no strength ladder was measured.",
        "q (protocol quick): no curve against ε was measured.",
        "q (protocol quick): no transfer matrix was measured.",
        "q (protocol quick): no embeddings were kept.",
        "q (protocol quick): there are no training statistics.",
        "q (protocol quick): no sanity checks were run.",
    ):
        assert sentence in html
    assert "<svg" not in html
    # Nothing explains how to read what is not there.
    assert "t-SNE" not in html


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("apgd100x5/displacement@members", ("APGD-100\N{NO-BREAK SPACE}×5", "displacement", "summed members")),
        ("pgd20/nearest_negative@member_0", ("PGD-20", "nearest negative", "member 0")),
        ("cw/own_objective", ("CW", "own objective", "fused embedding")),
        ("strange/x@without_2", ("strange", "x", "all but member 2")),
    ],
)
def test_attacks_are_named_in_words(key: str, words: tuple[str, str, str]) -> None:
    assert split_attack(key) == words


def test_numbers_are_written_as_a_reader_expects() -> None:
    assert [number(-0.04), number(-1.26), number(float("nan")), number(None)] == ["0.0", "−1.3", "–", "–"]
    assert percent(0.6957) == "69.6"
    assert [radius(8 / 255, "linf"), radius(0.1, "linf"), radius(1.0, "l2")] == ["8/255", "0.1", "1"]
    assert attack_name("pgd20x1") == "PGD-20"


# Drawings and pictures


def test_thirty_series_look_different() -> None:
    looks = [look(index) for index in range(30)]

    assert len(set(looks)) == 30
    # Neighbours differ in each of colour, dash and marker.
    for one, other in pairwise(looks):
        assert all(mine != theirs for mine, theirs in zip(one, other, strict=True))
    assert len(PALETTE) == len(MARKERS) != len(DASHES)


def test_the_amplified_change_is_grey_where_nothing_changed() -> None:
    """0.5 + 10·(0, 0.02, −0.02, 0.2) = 0.5, 0.7, 0.3 and 2.5, cut to 1."""
    clean = np.full((1, 1, 4), 0.5)
    change = np.array([[[0.0, 0.02, -0.02, 0.2]]])

    np.testing.assert_allclose(amplified(clean, clean + change), [[[0.5, 0.7, 0.3, 1.0]]])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_picture_keeps_its_pixels(channels: int, mode: str) -> None:
    image = np.linspace(0, 1, channels * 6).reshape(channels, 2, 3)

    content = base64.b64decode(data_uri(image, most=10).removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(content)) as picture:
        assert (picture.mode, picture.size) == (mode, (3, 2))
        np.testing.assert_array_equal(
            np.asarray(picture).reshape(2, 3, channels), np.rint(255 * image).transpose(1, 2, 0)
        )


def test_a_course_is_the_mean_of_members_and_their_range() -> None:
    """Clean loss 13 − 6·i/30 + 0.2·member over 30 iterations, a stretch each: the first is 13, 13.2 and 13.4."""
    went = course([history(iterations=30)], "clean_loss")

    assert went is not None
    assert went.x[0] == 0.5
    np.testing.assert_allclose([went.mean[0], went.low[0], went.high[0]], [13.2, 13.0, 13.4], rtol=1e-6)
    # 120 iterations are drawn in 60 stretches of two: the first is over iterations 0 and 1.
    longer = course([history(iterations=120, members=1)], "clean_loss")
    assert longer is not None
    assert len(longer.x) == 60
    np.testing.assert_allclose(longer.mean[0], 13 - 6 * 0.5 / 120, rtol=1e-6)


def test_what_was_never_measured_has_no_course() -> None:
    assert course([history(adversarial=False)], "fooled_rate") is None
    assert course([history(iterations=0)], "clean_loss") is None


def test_a_map_lays_both_out_in_one_frame_and_again_the_same() -> None:
    arrays = showcase()
    clean, attacked = (arrays[f"{which}_embeddings"] for which in ("clean", "attacked"))

    first, again = plane(clean, attacked, seed=0), plane(clean, attacked, seed=0)

    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    # In one frame an image that the attack did not move stays where it was.
    same, unmoved = plane(clean, clean, seed=0)
    spread = np.ptp(same, axis=0).max()
    assert np.abs(same - unmoved).max() < 0.02 * spread
    assert nearest_agree(first[0], arrays["labels"]) > 0.9
    assert nearest_agree(first[1], arrays["labels"]) < 0.5


def test_nearest_agree_counts_the_points_beside_one_of_their_class() -> None:
    """On a line at 0, 1, 5, 6 with labels 0, 0, 1, 0: the first two agree, the last two do not."""
    points = np.array([[0.0, 0], [1, 0], [5, 0], [6, 0]])

    assert nearest_agree(points, np.array([0, 0, 1, 0])) == 0.5


def test_a_sampled_map_keeps_the_named_classes_whole() -> None:
    labels = np.arange(3 * MOST_IMAGES) % 100

    rows = chosen(labels, [3, 7], seed=0)

    assert len(rows) == len(set(rows.tolist())) == MOST_IMAGES
    assert (np.diff(rows) > 0).all()
    assert np.isin(labels[rows], [3, 7]).sum() == np.isin(labels, [3, 7]).sum()


# The page as a file


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
        folder.write_json("evaluation/full/summary.json", summary | {"schema": 2})
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
        ("old schema", "expected schema 3; got 2"),
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


def test_a_page_lists_its_drawings_in_folds_too() -> None:
    page = make_page([run_of("a", **BARE | {"curves": SHORT["curves"]})])

    assert isinstance(page, Page)
    names = [plot.name for plot in page.plots()]
    assert len(names) == len(set(names))
    assert "curve-r-at-1-displacement" in names


def test_a_cell_without_a_spread_says_nothing_of_one() -> None:
    html = render(make_page([run_of("a", **BARE)]), figures_folder=None)

    assert '<td class="number">70.0</td>' in html
    assert '76.0<span class="spread"> ±0.4</span>' in html
