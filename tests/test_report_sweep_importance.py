"""Which settings mattered in a sweep: a planted one is found, noise is not, and too little is not analysed."""

from __future__ import annotations

from pathlib import Path

import pytest

from eat_dist.report.content import Text
from eat_dist.report.sweeps import sections
from eat_dist.report.sweeps.importance import FEWEST_TRIALS, analyse, analyses, common_epoch
from eat_dist.report.sweeps.ranking import finished
from eat_dist.report.sweeps.reading import read_sweep
from sweep_folders import CONDITIONAL, IDLE, PLANTED, SPACE, edited, sweep_of, write_sweep


def test_a_planted_setting_is_found_and_an_idle_one_is_not(tmp_path: Path) -> None:
    found = analyse(sweep := sweep_of(tmp_path, trials=20, seed=1), finished(sweep), sweep.objectives[0]).found
    by_key = {entry.parameter.key: entry for entry in found}

    assert found[0].parameter.key == PLANTED
    assert found[0].share > 0.5
    assert found[0].matters
    assert not by_key[IDLE].matters
    assert set(by_key) == set(SPACE)


def test_scores_that_are_noise_make_nothing_important(tmp_path: Path) -> None:
    """The negative control: the forest still gives most to some setting, but no more than to shuffled scores."""
    sweep = sweep_of(tmp_path, trials=20, seed=3, effect=0.0)

    found = analyse(sweep, finished(sweep), sweep.objectives[0]).found

    assert max(entry.share for entry in found) > 0.2
    assert not any(entry.matters for entry in found)


def test_pruned_trials_count_only_where_all_were_measured(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, trials=26, pruned=12, failed=2)

    at_the_end, early = analyses(sweep)

    assert (at_the_end.epoch, at_the_end.trials) == (None, 12)
    assert (early.epoch, early.trials) == (2, 24)
    assert early.found[0].parameter.key == PLANTED
    assert common_epoch(sweep_of(tmp_path, trials=4)) is None


def test_too_few_trials_are_not_analysed(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, trials=FEWEST_TRIALS - 1)

    (found,) = analyses(sweep)
    section = sections.importance([found], [])

    assert found.found == ()
    said = " ".join(block.text for block in section.blocks if isinstance(block, Text))
    assert f"{FEWEST_TRIALS - 1} of at least {FEWEST_TRIALS} trials" in said
    assert section.empty


def test_equal_scores_are_not_analysed(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", trials=FEWEST_TRIALS)
    for number in range(FEWEST_TRIALS):
        edited(folder, number, results=[{"epoch": 1, "objectives": {"attacked_nmi": 0.5}}])

    (found,) = analyses(read_sweep(folder))

    assert found.left_out == ("too little to analyse: all scores are equal",)


def test_a_conditional_setting_is_judged_among_the_trials_it_applies_to(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, space=CONDITIONAL, trials=24)
    applying = [trial for trial in sweep.trials if "defense.relay_steps" in trial.settings]

    (found,) = analyses(sweep)

    by_key = {entry.parameter.key: entry for entry in found.found}
    assert FEWEST_TRIALS <= len(applying) < 24
    assert by_key["defense.relay_steps"].trials == len(applying)
    assert by_key[PLANTED].trials == 24
    assert found.found[0].parameter.key == PLANTED


def test_a_conditional_setting_that_applied_to_few_is_left_out_with_a_word(tmp_path: Path) -> None:
    space = {key: CONDITIONAL[key] for key in ("defense.transfer_rule", "defense.relay_steps")}
    (found,) = analyses(sweep_of(tmp_path, space={PLANTED: {"choice": [0.5]}} | space, trials=12))

    assert [sentence.split(" to ")[0] for sentence in found.left_out] == [
        f"{PLANTED} had one value in all of these trials",
        "defense.relay_steps applied",
    ]


def test_importances_leave_optunas_settings_as_they_were(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import optuna

    before = optuna.logging.get_verbosity()

    analyses(sweep_of(tmp_path, trials=FEWEST_TRIALS))

    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr().err == ""
