"""The sections of the report in their order, each a function of the entries to compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from eat_dist.report import bench_tables, tables
from eat_dist.report.content import Block, Fold, Heading, Listing, Plots, Section, Text
from eat_dist.report.curve_sections import curves, fraction_plots, training
from eat_dist.report.drawing import look
from eat_dist.report.embedding_map import MOST_IMAGES, embedding_map
from eat_dist.report.groups import Group, disagreements, runs_of
from eat_dist.report.parts import absent, legend
from eat_dist.report.plots import ladder_plot
from eat_dist.report.strip import AMPLIFIED, strips
from eat_dist.report.wording import attack_name, objective_name, slug, split_attack


def figures(groups: Sequence[Group]) -> Section:
    """Clean and attacked figures: all entries, then each run's attacks and members."""
    runs = runs_of(groups)
    blocks: list[Block] = [tables.headline(groups, comparable=not disagreements(runs))]
    for run in runs:
        parts: list[Block] = [tables.attacks(run)] if run.evaluation.ensemble.attacked else []
        parts += [tables.inference(run)] if run.evaluation.inference else []
        parts += [tables.members(run)] if run.evaluation.members else []
        if parts:
            blocks.append(Fold(f"{run.label}: every attack, every member", parts, open=len(runs) == 1))
    blocks += absent(groups, lambda run: bool(run.evaluation.members), "members were not measured alone")
    lead = (
        "“Attacked” is what is left under all attacks within this norm and ε: R@1 counts the queries that survive "
        "every one, the figures of clustering are each the smallest of any."
    )
    return Section("figures", "Clean and attacked", lead, blocks)


def strength(groups: Sequence[Group]) -> Section:
    """The ladder of attacks, other norms, attacked fractions."""
    runs = runs_of(groups)
    rungs = bench_tables.rungs_of(runs)
    plots = []
    for objective in dict.fromkeys(objective for _, objective in rungs):
        attacks = [attack for attack, against in rungs if against == objective]
        values = [
            (group.label, look(index), [group.value(bench_tables.rung(attack, objective)).mean for attack in attacks])
            for index, group in enumerate(groups)
            if any(run.evaluation.ladder for run in group.runs)
        ]
        caption = f"success on {objective_name(objective)}"
        names = [attack_name(attack) for attack in attacks]
        plots.append(ladder_plot(f"ladder-{slug(objective)}", names, values, caption=caption))
    blocks: list[Block] = []
    if plots:
        blocks += [Plots("Strength ladder", plots, legend(groups, place="ladder", line=False))]
        blocks += [Fold("The numbers of the ladder", [bench_tables.ladder(groups)])]
    blocks += absent(groups, lambda run: bool(run.evaluation.ladder), "no strength ladder was measured")
    if having := [run for run in runs if run.evaluation.norms]:
        blocks += [bench_tables.norms(having)]
    blocks += absent(groups, lambda run: bool(run.evaluation.norms), "no other norm was measured")
    if having := [run for run in runs if run.evaluation.fractions_table]:
        blocks += [
            fraction_plots(groups),
            Fold("The numbers of the attacked fractions", [bench_tables.fractions(having)]),
        ]
    lacks = "clustering was measured with every image attacked only"
    blocks += absent(groups, lambda run: bool(run.evaluation.fractions_table), lacks)
    lead = (
        "Noise ≤ FGSM ≤ PGD ≤ APGD, and no black box above the white box: otherwise gradients are masked, or an attack "
        "is broken."
    )
    return Section("strength", "Strength of the attacks", lead, blocks)


def transfer(groups: Sequence[Group]) -> Section:
    """Transfer matrices, a run each."""
    blocks: list[Block] = [bench_tables.transfer(run) for run in runs_of(groups) if run.evaluation.transfer]
    blocks += absent(groups, lambda run: run.evaluation.transfer is not None, "no transfer matrix was measured")
    lead = (
        "Share of the images crafted on one model (row) that fool another (column). Members with few weaknesses in "
        "common have pale cells beside the diagonal."
    )
    return Section("transfer", "Transfer between members", lead, blocks)


def ers(groups: Sequence[Group]) -> Section:
    """Empirical robustness score."""
    having = [group for group in groups if any(run.evaluation.ers for run in group.runs)]
    blocks: list[Block] = [bench_tables.ers(having)] if having else []
    blocks += absent(groups, lambda run: run.evaluation.ers is not None, "no empirical robustness score was measured")
    lead = "Ten published attacks at ε = 8/255, for comparison with published tables; 100 is best."
    return Section("ers", "Empirical robustness score", lead, blocks)


def embeddings(groups: Sequence[Group]) -> Section:
    """Maps of clean and attacked embeddings, of one run an entry."""
    maps = [
        embedding_map(group.first.showcase, label=group.first.label, place=place, seed=group.first.evaluation.seed)
        for place, group in enumerate(groups)
        if group.first.showcase is not None
    ]
    blocks: list[Block] = [drawn for drawn in maps if drawn is not None]
    blocks += absent(groups, lambda run: run.showcase is not None, "no embeddings were kept")
    lead = (
        f"t-SNE of at most {MOST_IMAGES} images, clean and attacked laid out together and drawn in the same frame. The "
        "classes with most images have a colour and a shape, the others are grey dots. Distances mean little here; see "
        "what stays together."
    )
    return Section("map", "Embeddings, clean and attacked", lead, blocks)


def images(groups: Sequence[Group]) -> Section:
    """Attacked images and their neighbours, of one run an entry."""
    blocks: list[Block] = []
    for group in groups:
        shown = group.first.showcase
        if shown is not None and shown.names:
            attack, objective, _ = split_attack(shown.attack)
            blocks += [Heading(f"{group.first.label}: {attack} on {objective}"), *strips(shown)]
    blocks += absent(groups, lambda run: run.showcase is not None and bool(run.showcase.names), "no images were kept")
    lead = (
        f"The change is shown ×{AMPLIFIED} around grey. Neighbours with ✓ and a solid border are of the image's class, "
        "those with ✗ and a dashed border of another."
    )
    return Section("images", "Attacked images", lead, blocks)


def detector(groups: Sequence[Group]) -> Section:
    """Detection of attacked images."""
    having = [group for group in groups if any(run.evaluation.detector for run in group.runs)]
    blocks: list[Block] = [bench_tables.detector(having)] if having else []
    blocks += absent(groups, lambda run: run.evaluation.detector is not None, "no detector was measured")
    return Section("detector", "Detecting attacked images", "Can attacked images be told from clean ones?", blocks)


def sanity(groups: Sequence[Group]) -> Section:
    """Every sanity check, the failed ones first and never folded away."""
    runs = sorted(runs_of(groups), key=lambda run: not run.evaluation.failed)
    blocks: list[Block] = []
    for run in runs:
        if run.evaluation.sanity:
            table = bench_tables.sanity(run)
            folded = len(runs) > 1 and not run.evaluation.failed
            blocks.append(Fold(f"✓ {run.label}: all {len(run.evaluation.sanity)} passed", [table]) if folded else table)
    blocks += absent(groups, lambda run: bool(run.evaluation.sanity), "no sanity checks were run")
    lead = "Of the attacks, not of the model: they say whether the figures may be believed."
    return Section("sanity", "Sanity checks", lead, blocks)


def origin(groups: Sequence[Group]) -> Section:
    """The commands and configs."""
    blocks: list[Block] = []
    for run in runs_of(groups):
        about = run.evaluation
        weights = f", weights {about.target.weights_sha256[:16]}…" if about.target.weights_sha256 else ""
        made = f"{about.target.kind} {about.target.name}{weights}; eat_dist {about.eat_dist}, seed {about.seed}."
        parts: list[Block] = [Text(made)]
        parts += [Listing("Command", about.command)] if about.command else []
        parts += [Listing("config.yaml", run.config)] if run.config else []
        blocks.append(Fold(f"{run.label}: command and config", parts))
    return Section("origin", "What made these figures", "", blocks)


SECTIONS: tuple[Callable[[Sequence[Group]], Section], ...] = (
    figures,
    curves,
    strength,
    transfer,
    ers,
    embeddings,
    images,
    training,
    detector,
    sanity,
    origin,
)
