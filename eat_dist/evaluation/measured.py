"""How figures were measured: what they may be compared with, and whether they may be quoted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_ALWAYS = ("protocol", "norm", "num_steps", "images", "classes", "images_sha256", "kmeans_seeds", "sample")
_IN_WORDS = {"num_steps": "steps", "epsilon": "ε", "images": "test images", "images_sha256": "test images"}


def evaluation_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's summary says of how its figures were measured, and whether to believe them."""
    named = (*_ALWAYS, "epsilon", "seed", "retrieval", "queries", "gallery")
    about = {name: results[name] for name in named if name in results}  # earlier ones have no sum of the images
    # What else counts in ``worst``: attacks at smaller radii, and those crafted on another model.
    about["epsilons"] = [epsilon for epsilon in results["epsilons"] if 0 < epsilon <= results["epsilon"]]
    about["transfer_from"] = results["transfer"] is not None and "other" in results["transfer"]["sources"]
    return about | {"failed_checks": failed_checks(results)}


def failed_checks(results: Mapping[str, Any]) -> list[str] | None:
    """Names of the sanity checks that failed; None where the protocol has none."""
    return [check["name"] for check in results["sanity"] if not check["passed"]] if results["sanity"] else None


def measurement(about: Mapping[str, Any], attacked: Iterable[str], *, seed: int | None) -> dict[str, str]:
    """The settings in which two measurements must agree if their figures are to be compared, as text.

    Args:
        about: As :func:`evaluation_of` gives it; what an older one lacks is left out.
        attacked: ``ATTACK/OBJECTIVE[@SURFACE]`` of the attacks on the ensemble.
        seed: The run's own; None for what was not trained here.

    Returns:
        ``protocol``, ``norm``, ``epsilon``, ``num_steps``, ``images``, ``classes``, ``images_sha256``,
        ``kmeans_seeds``, ``epsilons`` (of the curves, up to ε), ``sample``, ``transfer_from``; ``attacks`` (on the
        ensemble; through which of its members is not said, since a single network has none); and ``seed``, which is
        ``the run's`` where attacks and k-means drew from the seed that the run was trained with.
    """
    found = {name: about[name] for name in (*_ALWAYS, "epsilons", "transfer_from") if name in about}
    found["epsilon"] = f"{about['epsilon']:.6g}"
    found["attacks"] = ", ".join(sorted({key.partition("@")[0] for key in attacked}))
    if seed is not None and "seed" in about:
        found["seed"] = "the run's" if about["seed"] == seed else about["seed"]
    return {name: str(value) for name, value in found.items()}


def unlike(measured: Sequence[Mapping[str, str]]) -> list[str]:
    """In which settings, in words, measurements differ; what one of them does not say is no difference."""
    names = dict.fromkeys(name for settings in measured for name in settings)
    differ = [name for name in names if len({settings[name] for settings in measured if name in settings}) > 1]
    return list(dict.fromkeys(_IN_WORDS.get(name, name) for name in differ))
