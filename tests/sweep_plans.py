"""The plan of a small sweep, as tests change it, and the figures of one trial."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from eat_dist.config import load_config
from eat_dist.console import Console
from eat_dist.spaces import check_space, parse_space
from eat_dist.storage import Folder
from eat_dist.sweeps import SweepPlan
from eat_dist.sweeps.book import Ledger
from eat_dist.sweeps.plan import default_grace
from eat_dist.sweeps.record import Trial

SPACE = """
defense.transfer_rule: {choice: [none, hardest]}
defense.peers: {choice: [2], when: {defense.transfer_rule: hardest}}
defense.temperature: {log_uniform: [0.1, 10], when: {defense.transfer_rule: hardest}}
attack.num_steps: {integer: [1, 9]}
attack.epsilon: {uniform: [0.05, 0.3]}
model.widths: {choice: [[8, 16], [16, 32]]}
"""
FIGURES = {"clean/r_at_1": 0.9, "clean/nmi": 0.8, "worst/r_at_1": 0.4, "worst/nmi": 0.3}


def plan_of(space: str = SPACE, *assignments: str, **changes: Any) -> SweepPlan:
    base = load_config(None, ["tracking.enabled=false", *assignments])
    parsed = parse_space(yaml.safe_load(space), name="test", source="space")
    plan = SweepPlan(
        name="digits-test",
        base=base,
        space=check_space(parsed, base)[0],
        trials=6,
        search="optuna",
        scheduler="asha",
        objective="attacked_nmi",
        validation_share=0.4,
        seed=0,
        concurrent=None,
        grace_period=default_grace(base.train.epochs),
        reduction_factor=3,
    )
    return replace(plan, **changes)


def ledger_of(
    folder: Path, plan: SweepPlan, trials: list[Trial] | None = None, *, parent: Callable[[], str | None] = lambda: None
) -> Ledger:
    return Ledger(
        plan,
        Folder.at(folder),
        trials or [],
        config_of=lambda settings: plan.trial_config(settings, base=plan.base),
        parent_run_id=parent,
        console=Console(),
    )
