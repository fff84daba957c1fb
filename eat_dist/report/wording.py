"""Names and numbers as the page writes them."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import yaml

MISSING = "–"
SPARED = "†"
NORMS = {"linf": "L∞", "l2": "L2", "l0": "L0"}
OBJECTIVES = {
    "displacement": "displacement",
    "nearest_wrong_centroid": "nearest wrong centroid",
    "random_wrong_centroid": "random wrong centroid",
    "nearest_negative": "nearest negative",
    "proxy_anchor": "training loss (Proxy Anchor)",
    "proxy": "training loss (Proxy Anchor)",
}
HEADLINE = (
    ("clean/r_at_1", "clean R@1"),
    ("worst/r_at_1", "attacked R@1"),
    ("clean/nmi", "clean NMI"),
    ("worst/nmi", "attacked NMI"),
)
_ATTACKS = {
    "fgsm": "FGSM",
    "mi_fgsm": "MI-FGSM",
    "pgd": "PGD",
    "apgd": "APGD",
    "cw": "CW",
    "jsma": "JSMA",
    "square": "Square",
    "random_noise": "random noise",
}
FIGURES = {
    "r_at_1": "R@1",
    "r_at_2": "R@2",
    "r_at_4": "R@4",
    "r_at_8": "R@8",
    "r_at_10": "R@10",
    "r_at_20": "R@20",
    "r_at_30": "R@30",
    "map_at_r": "mAP@R",
    "r_at_1_all_attacked": "R@1, all attacked",
    "nmi": "NMI",
    "ami": "AMI",
    "f1": "F1",
    "success_rate": "success",
}
ERS_PARTS = {
    "ca_plus": "CA+",
    "ca_minus": "CA−",
    "qa_plus": "QA+",
    "qa_minus": "QA−",
    "tma": "TMA",
    "es_d": "ES:D",
    "es_r": "ES:R",
    "ltm": "LTM",
    "gtm": "GTM",
    "gtt": "GTT",
}


class AttackName(NamedTuple):
    """``apgd100x5/displacement@members`` in words."""

    attack: str
    objective: str
    surface: str


def attack_name(name: str) -> str:
    """``apgd100x5`` → ``APGD-100 ×5`` (steps, restarts); a name that is not known stays as it is."""
    for known in sorted(_ATTACKS, key=len, reverse=True):
        found = re.fullmatch(rf"{known}(\d*)(?:x(\d+))?", name)
        if found:
            steps, restarts = found.groups()
            words = _ATTACKS[known] + (f"-{steps}" if steps else "")
            return words + (f"\N{NO-BREAK SPACE}×{restarts}" if restarts and restarts != "1" else "")
    return name


def objective_name(name: str) -> str:
    """``nearest_negative`` → ``nearest negative``."""
    return OBJECTIVES.get(name, name.replace("_", " "))


def model_name(name: str) -> str:
    """``member_0`` → ``member 0``; ``without_0`` → ``all but member 0``."""
    without = re.fullmatch(r"without_(\d+)", name)
    return f"all but member {without[1]}" if without else {"other": "another model"}.get(name, name.replace("_", " "))


def split_attack(key: str) -> AttackName:
    """Take an attack's key apart, each part in words."""
    crafted, _, surface = key.partition("@")
    attack, _, objective = crafted.partition("/")
    where = {"": "fused embedding", "members": "summed members"}.get(surface, model_name(surface))
    return AttackName(attack_name(attack), objective_name(objective), where)


def percent(share: float | None, *, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage without its sign: 0.6957 → ``69.6``."""
    return number(None if share is None else 100 * share, digits=digits)


def number(value: float | None, *, digits: int = 1) -> str:
    """A number with fixed decimals and a true minus; ``–`` where there is none."""
    if value is None or not math.isfinite(value):
        return MISSING
    text = f"{value:.{digits}f}"
    # -0.04 rounds to "-0.0", which reads as if it were below zero.
    return text.lstrip("-") if not text.strip("-0.") else text.replace("-", "−")


def radius(epsilon: float, norm: str) -> str:
    """``0.1`` or, where it is a whole number of 255ths and no short decimal, ``8/255``."""
    if norm == "linf" and epsilon > 0 and abs(epsilon * 255 - round(epsilon * 255)) < 1e-6:
        return f"{round(epsilon * 255)}/255" if len(f"{epsilon:.6g}") > 4 else f"{epsilon:g}"
    return f"{epsilon:.4g}"


def joined(words: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def slug(text: str) -> str:
    """What a file or an anchor may be called."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "run"


def counted(count: int, noun: str) -> str:
    """``1 trial``, ``2 trials``."""
    return f"{count} {noun}{'s' * (count != 1)}"


def duration(seconds: float | None) -> str:
    """``48 s``, ``12 min``, ``3.4 h``."""
    if seconds is None:
        return MISSING
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def plain(value: Any) -> str:
    """A fact whatever its form: a text, a list of arguments, a mapping."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item not in (None, ""))
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def as_yaml(content: Any) -> str:
    """Settings as a config file has them."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
