"""Checks that tell a robust model from a broken evaluation, each with a verdict (docs/evaluation.md).

After Athalye et al. 2018 (section 3.1, "identify obfuscated gradients") and Carlini et al. 2019 ("On evaluating
adversarial robustness", section 4), carried over to embeddings. A check that fails says nothing good: either the
attack does not work on this model, or the figures do not mean what they seem to. None is ever left out for failing.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from eat_dist.data.images import ImageSet
from eat_dist.evaluation.measure import NOT_ATTACKED
from eat_dist.evaluation.plan import ENSEMBLE, Part, Plan
from eat_dist.evaluation.sizes import ENOUGH_DRAWS

# Share of the images by which a weaker attack may beat a stronger one before it counts: random starts differ.
TOLERANCE = 0.02

# Share of the way from random noise to APGD that a stronger attack's mean value may lack.
VALUE_TOLERANCE = 0.02

# Of two embeddings of one image in batches of different sizes: rounding of float32.
ROUNDING = 1e-3

Measured = Mapping[Part, Mapping[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """One check.

    Attributes:
        name: Stable, for tables.
        claim: What should hold.
        passed: Whether it does.
        measured: What was found, in words.
        threshold: What it was compared with, in words.
    """

    name: str
    claim: str
    passed: bool
    measured: str
    threshold: str


def sanity_checks(
    plan: Plan, clean: Mapping[str, Mapping[str, Any]], measured: Measured, test: ImageSet, *, randomised: bool
) -> list[dict[str, Any]]:
    """All checks of a full evaluation, in a fixed order; JSON-ready :class:`Verdict`."""
    checks = dict(plan.checks)
    found = {name: measured[part] for name, part in checks.items()}
    ladder = {part.attack: measured[part] for part in plan.ladder}
    verdicts = [
        _zero_epsilon(found["zero_epsilon"], clean[ENSEMBLE]["retrieved"], randomised=randomised),
        _slopes(ladder["pgd"]),
        _rising_strength(ladder),
        _more_steps(ladder, found["few_steps"], ladder["pgd"], found["many_steps"]),
    ]
    if "unbounded" in found:
        verdicts.append(_unbounded(found["unbounded"], checks["unbounded"].epsilon))
    if "square" in ladder:
        verdicts.append(_black_box(ladder["square"], _white_box_bits(plan, measured)))
    verdicts += _transfer(plan, measured)
    verdicts += [
        _other_batch_size(ladder["pgd"], found["other_batch_size"], checks["other_batch_size"].batch_size),
        _better_than_chance(clean[ENSEMBLE]["figures"]["r_at_1"], test),
        _no_clusters_from_attack(plan, clean[ENSEMBLE]["figures"], measured),
        _averaged(randomised, plan.main[0].draws),
    ]
    return [asdict(verdict) for verdict in verdicts]


def defense_checks(plan: Plan, measured: Measured, *, randomised: bool, averaged: bool) -> list[dict[str, Any]]:
    """Those that every evaluation of a defense at inference ends with; JSON-ready :class:`Verdict`.

    Args:
        plan: With its non-adaptive parts.
        measured: All parts.
        randomised: Whether the defense draws random numbers.
        averaged: Whether to say that it is attacked in expectation, which the checks of ``full`` say already.
    """
    verdicts = [_averaged(randomised, plan.main[0].draws)] if averaged else []
    return [asdict(verdict) for verdict in (*verdicts, _adaptive(plan, measured))]


def _adaptive(plan: Plan, measured: Measured) -> Verdict:
    """The strongest of each: which objective is best against a defense differs."""
    adaptive, ignorant = (
        max(
            ((_success(measured[part]), part.objective) for part in parts),
            key=lambda found: -1.0 if found[0] is None else found[0],
        )
        for parts in zip(*plan.pairs, strict=True)
    )
    both = None if adaptive[0] is None or ignorant[0] is None else ignorant[0] - adaptive[0]
    return Verdict(
        "adaptive",
        "an attacker who knows the defense at inference is not weaker than one who does not",
        both is None or both <= TOLERANCE,
        f"strongest success {_percent(adaptive[0])} adaptive ({adaptive[1]}), {_percent(ignorant[0])} crafted on the "
        f"undefended network ({ignorant[1]})",
        f"at most {TOLERANCE:.0%} less",
    )


def _zero_epsilon(found: Mapping[str, Any], clean_bits: str, *, randomised: bool) -> Verdict:
    """Of a model that draws numbers of its own the images alone: two answers to one image differ."""
    on_target = found["targets"][ENSEMBLE]
    moved = on_target["figures"]["mean_displacement"]
    changed = _disagreeing(on_target["retrieved"], clean_bits)
    return Verdict(
        "zero_epsilon",
        "an attack of radius 0 changes nothing",
        on_target["figures"]["largest_perturbation"] == 0 and (randomised or (changed == 0 and moved <= ROUNDING)),
        f"{changed:.1%} of the queries judged differently, embeddings moved by {moved:.1e}",
        f"0 % and {ROUNDING:g}",
    )


def _slopes(found: Mapping[str, Any]) -> Verdict:
    share = found["finite_slopes"]
    return Verdict(
        "gradients",
        "gradients are finite and not zero",
        share > 0.99,
        f"{share:.1%} of the images",
        "more than 99 %",
    )


def _rising_strength(ladder: Mapping[str, Mapping[str, Any]]) -> Verdict:
    names = [name for name in ("random_noise", "fgsm", "pgd", "apgd") if name in ladder]
    values = [ladder[name]["mean_value"] for name in names]
    # Noise as strong as the gradient means that the gradient knows nothing.
    passed = values[0] < values[-1] and _rising(values, ladder)
    return Verdict(
        "rising_strength",
        "random noise, FGSM, PGD and APGD are of rising strength",
        passed,
        "mean values of the objective " + ", ".join(f"{value:.4f}" for value in values),
        f"each at least the one before − {VALUE_TOLERANCE:.0%} of the whole rise, the last above the first",
    )


def _rising(values: Sequence[float], ladder: Mapping[str, Mapping[str, Any]]) -> bool:
    """Up to a tolerance in units of what attacks gain on this model over noise."""
    gained = abs(ladder["apgd"]["mean_value"] - ladder["random_noise"]["mean_value"])
    return all(weaker <= stronger + VALUE_TOLERANCE * gained for weaker, stronger in itertools.pairwise(values))


def _more_steps(ladder: Mapping[str, Mapping[str, Any]], *found: Mapping[str, Any]) -> Verdict:
    values = [part["mean_value"] for part in found]
    return Verdict(
        "more_steps",
        "more steps are never weaker",
        _rising(values, ladder),
        "mean values of the objective at 5, 20 and 100 steps " + ", ".join(f"{value:.4f}" for value in values),
        f"each at least the one before − {VALUE_TOLERANCE:.0%} of what APGD gains over noise",
    )


def _unbounded(found: Mapping[str, Any], epsilon: float) -> Verdict:
    success = _success(found)
    return Verdict(
        "unbounded",
        "a large enough perturbation breaks every image",
        success is not None and success >= 0.95,
        f"success at ε = {epsilon:g}: {_percent(success)}",
        "at least 95 %",
    )


def _black_box(square: Mapping[str, Any], white_box_bits: Sequence[str]) -> Verdict:
    """Image by image, since a masked model may lose other images to either."""
    bits = square["targets"][ENSEMBLE]["retrieved"]
    attacked = [query for query, bit in enumerate(bits) if bit != NOT_ATTACKED]
    only_black = [
        query
        for query in attacked
        if bits[query] == "0" and all(white[query] in ("1", NOT_ATTACKED) for white in white_box_bits)
    ]
    share = len(only_black) / len(attacked)
    return Verdict(
        "black_box",
        "a black-box attack finds nothing that the white-box attacks miss",
        share <= TOLERANCE,
        f"{share:.1%} of the queries are lost to Square alone",
        f"at most {TOLERANCE:.0%}",
    )


def _white_box_bits(plan: Plan, measured: Measured) -> list[str]:
    """Of all white-box attacks at the same norm and ε, and clean: what is lost without attack is not Square's."""
    parts = [part for part in (*plan.main, *plan.ladder) if ENSEMBLE in part.targets and part.attack != "square"]
    return [measured[part]["targets"][ENSEMBLE]["retrieved"] for part in parts]


def _transfer(plan: Plan, measured: Measured) -> list[Verdict]:
    """Of the ensemble, or the single model, and of each member; nothing where nothing was crafted elsewhere."""
    if not plan.transfer:
        return []
    own = {part.source: part for part in plan.transfer if part.source.startswith("member_")}
    own[ENSEMBLE] = next(part for part in plan.ladder if part.attack == "pgd")  # on the same sample, as many steps
    worst, words = -1.0, ""
    for part in plan.transfer:
        for target in part.targets:
            # A member alone is no match for another; what is judged is the ensemble without the attacked one.
            everybody_else = ("other", f"without_{target.removeprefix('member_')}")
            if target != ENSEMBLE and part.source not in everybody_else:
                continue
            there, here = (measured[p]["targets"][target]["figures"]["success_rate"] for p in (part, own[target]))
            if there is not None and here is not None and there - here > worst:
                worst = there - here
                words = f"{target}: {_percent(there)} from {part.source}, {_percent(here)} from itself"
    return [
        Verdict(
            "transfer",
            "no attack from other models is stronger on the ensemble, or on a member, than its own",
            worst <= TOLERANCE,
            words or "no query is retrieved clean",
            f"at most {TOLERANCE:.0%} more",
        )
    ]


def _other_batch_size(first: Mapping[str, Any], second: Mapping[str, Any], batch_size: int | None) -> Verdict:
    one, other = (part["targets"][ENSEMBLE]["retrieved"] for part in (first, second))
    changed = _disagreeing(one, other)
    return Verdict(
        "batch_size",
        "the batch size changes nothing",
        changed <= TOLERANCE,
        f"{changed:.1%} of the queries judged differently in batches of {batch_size}",
        f"at most {TOLERANCE:.0%} (rounding)",
    )


def _better_than_chance(r_at_1: float, test: ImageSet) -> Verdict:
    counts = torch.bincount(test.labels, minlength=test.num_classes).double()
    chance = float((counts * (counts - 1)).sum() / (counts.sum() * (counts.sum() - 1)))
    return Verdict(
        "better_than_chance",
        "the clean model retrieves better than chance: a collapsed model is hard to move",
        r_at_1 > chance,
        f"clean R@1 {r_at_1:.3f}",
        f"above {chance:.3f}",
    )


def _no_clusters_from_attack(plan: Plan, clean: Mapping[str, Any], measured: Measured) -> Verdict:
    found = {
        part.key(ENSEMBLE): measured[part]["targets"][ENSEMBLE]["figures"]["nmi"]
        for part in plan.main
        if ENSEMBLE in part.targets
    }
    lowest = min(found, key=lambda name: found[name])
    return Verdict(
        "clusters_not_written",
        "the strongest attack on clusters lowers NMI: aiming at classes may write labels into images instead",
        found[lowest] <= clean["nmi"] + TOLERANCE,
        f"NMI {clean['nmi']:.3f} clean, {found[lowest]:.3f} under {lowest}",
        f"at most {TOLERANCE:g} above clean",
    )


def _averaged(randomised: bool, draws: int) -> Verdict:
    return Verdict(
        "randomness",
        "a model that draws random numbers is attacked in expectation over them",
        not randomised or draws >= ENOUGH_DRAWS,
        f"{draws} draw{'s' if draws > 1 else ''} a step of a randomised model" if randomised else "it draws none",
        f"{ENOUGH_DRAWS} draws or more",
    )


def _disagreeing(one: str, other: str) -> float:
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if NOT_ATTACKED not in (a, b)]
    return sum(a != b for a, b in pairs) / len(pairs)


def _success(found: Mapping[str, Any]) -> float | None:
    value: float | None = found["targets"][ENSEMBLE]["figures"]["success_rate"]
    return value


def _percent(share: float | None) -> str:
    return "none retrieved clean" if share is None else f"{share:.1%}"
