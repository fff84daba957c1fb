"""The run, typed: every setting with its unit, range and default beside it. YAML in, YAML out."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from eat_dist.errors import ConfigError


def _number(value: Any) -> Any:
    """Understand ``8/255`` and YAML's ``1e-3`` (a string to YAML 1.1) as numbers."""
    if isinstance(value, str):
        numerator, slash, denominator = value.partition("/")
        try:
            number = float(numerator) / float(denominator) if slash else float(value)
        except (ValueError, ZeroDivisionError):
            return value
        return number
    return value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class DataConfig(_Section):
    """What is trained and tested on, and how batches are drawn."""

    dataset: str = Field("digits", description="Name in DATASETS.")
    root: str | None = Field(None, description="Folder of the original archives; digits needs none.")
    image_size: int | None = Field(None, ge=1, description="Pixels, square; default: the dataset's own.")
    on_bad_image: Literal["error", "skip"] = Field("error", description="skip: leave it out, count it, report it.")
    batch_size: int = Field(60, ge=2, description="Images a member draws an iteration.")
    sampler: Literal["class_balanced", "shuffle"] = "class_balanced"
    images_per_class: int = Field(12, ge=2, description="Images of one class in a batch (class_balanced).")

    @model_validator(mode="after")
    def _two_classes_a_batch(self) -> DataConfig:
        if self.sampler != "class_balanced":
            return self
        if self.batch_size % self.images_per_class:
            lower = max(self.batch_size // self.images_per_class, 2) * self.images_per_class
            raise ValueError(
                f"batch_size must be a multiple of images_per_class; got {self.batch_size} and "
                f"{self.images_per_class}. Use {lower} or {lower + self.images_per_class}."
            )
        if self.batch_size < 2 * self.images_per_class:
            raise ValueError(
                f"a batch must hold at least two classes; batch_size {self.batch_size} with images_per_class "
                f"{self.images_per_class} holds one. Use batch_size {2 * self.images_per_class} or more."
            )
        return self


class ModelConfig(_Section):
    """One member's network. Input normalisation is part of the model, so ε always means pixels."""

    backbone: str = Field("convnet", description="Name in BACKBONES.")
    widths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, min_length=1)] = Field(
        (32, 64, 128), description="Channels of the convolutional blocks (convnet)."
    )
    embedding_dim: int = Field(64, ge=2, description="D.")
    mean: Number = Field(0.5, description="Subtracted from the pixels inside the model.")
    std: Number = Field(0.5, gt=0, description="Divides them then.")


class LossConfig(_Section):
    """The metric loss. Defaults are Proxy Anchor's (Kim et al. 2020, section 4.1)."""

    name: str = Field("proxy_anchor", description="Name in LOSSES.")
    alpha: Number = Field(32.0, gt=0, description="Scale of the similarities, α.")
    margin: Number = Field(0.1, ge=0, lt=1, description="Margin on cosine similarity, δ.")


class AttackConfig(_Section):
    """The attack that training defends against; evaluation takes its norm and ε unless told otherwise."""

    name: str = Field("pgd", description="Name in ATTACKS.")
    norm: Literal["linf", "l2"] = "linf"
    epsilon: Number = Field(0.2, ge=0, description="Radius of the ball in pixel units, images in [0, 1].")
    num_steps: int = Field(5, ge=1, description="Gradient steps, K.")
    step_size: Number | None = Field(None, gt=0, description="Default 2.5·ε/K (Madry et al. 2017).")
    random_start: bool = Field(True, description="Start at a uniform point of the ball.")

    @model_validator(mode="after")
    def _epsilon_in_reach(self) -> AttackConfig:
        if self.norm == "linf" and self.epsilon > 1:
            raise ValueError(
                f"epsilon is in units of images in [0, 1], so at most 1 in L∞; got {self.epsilon:g}. "
                f"Did you mean {self.epsilon:g}/255?"
            )
        return self


class DefenseConfig(_Section):
    """The training step. β, γ, λ and the rules are explained in docs/method.md."""

    name: str = Field("eat", description="Name in DEFENSES.")
    adversarial_share: Number = Field(0.75, ge=0, le=1, description="β: share of the own adversarial loss.")
    transfer_strength: Number = Field(0.5, ge=0, description="γ: weight of the transferred loss.")
    diversity_weight: Number = Field(0.0, ge=0, description="λ: weight of the diversity regulariser.")
    transfer_rule: str = Field("uniform", description="Name in TRANSFER_RULES.")
    temperature: Number = Field(1.0, gt=0, description="τ of the rule 'hardest'.")
    peers: int = Field(1, ge=1, description="k: adversarial batches received an iteration.")
    relay_steps: int | None = Field(None, ge=1, description="K₁ of the rule 'relay'; default: K // 2.")
    momentum: Number = Field(0.9, ge=0, lt=1, description="Of the moving averages the coordinator keeps.")


class SplitConfig(_Section):
    """Which part of the training set each member sees (diversity)."""

    rule: Literal["all", "leave_one_out", "k_of_n", "disjoint", "bootstrap"] = "all"
    by: Literal["sample", "class"] = Field("sample", description="sample: within each class, all see all classes.")
    parts: int | None = Field(None, ge=2, description="N; default: the number of members.")
    parts_per_member: int | None = Field(None, ge=1, description="k of 'k_of_n'; default: N − 1.")


class EnsembleConfig(_Section):
    """How many members, what each sees, and how their embeddings become one."""

    members: int = Field(3, ge=1, description="M.")
    split: SplitConfig = SplitConfig()
    fusion: Literal["concat"] = Field("concat", description="Concatenated member embeddings, scaled to length 1.")


class OptimiserConfig(_Section):
    """AdamW, as in the Proxy Anchor recipe."""

    learning_rate: Number = Field(5e-4, gt=0)
    weight_decay: Number = Field(1e-4, ge=0)
    proxy_learning_rate_factor: Number = Field(100.0, gt=0, description="The proxies' learning rate is this × as high.")
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    step_epochs: int = Field(10, ge=1, description="Epochs between decays (step).")
    step_factor: Number = Field(0.5, gt=0, le=1, description="Factor of a decay (step).")


class TrainConfig(_Section):
    """How long."""

    epochs: int = Field(15, ge=1, description="Of ⌈largest split / batch_size⌉ iterations.")


class EvaluationConfig(_Section):
    """What is measured when training has finished (docs/evaluation.md)."""

    protocol: Literal["none", "quick"] = "quick"
    epsilon: Number | None = Field(None, ge=0, description="Default: attack.epsilon.")
    num_steps: int = Field(20, ge=1, description="PGD steps of the quick protocol.")
    objectives: Annotated[
        tuple[Literal["displacement", "nearest_wrong_centroid", "random_wrong_centroid"], ...],
        Field(strict=False, min_length=1),
    ] = Field(
        ("displacement", "nearest_wrong_centroid", "random_wrong_centroid"), description="What the attacker maximises."
    )
    members: bool = Field(True, description="Attack each member alone, too.")
    batch_size: int = Field(256, ge=1)
    kmeans_seeds: int = Field(3, ge=1, description="k-means runs averaged; 10 or more in a final table.")


class CheckpointConfig(_Section):
    """How often the whole training state is saved."""

    every: int = Field(5, ge=1, description="Epochs between checkpoints; the last epoch always has one.")
    keep: int = Field(2, ge=1, description="Newest checkpoints that stay.")


class TrackingConfig(_Section):
    """MLflow. MLFLOW_TRACKING_URI is respected; without it and without uri, a local sqlite file."""

    enabled: bool = True
    uri: str | None = Field(None, description="Overrides MLFLOW_TRACKING_URI.")
    experiment: str = "eat_dist"


class ClusterConfig(_Section):
    """Where the members run."""

    backend: Literal["ray", "local"] = Field("ray", description="local: all members in this process, without Ray.")
    address: str | None = Field(None, description="Ray cluster to join; default: RAY_ADDRESS or a new local one.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs where the cluster has them.")
    cpus_per_member: Number | None = Field(None, gt=0, description="Default: an equal share of the CPUs; none on GPUs.")
    gpus_per_member: Number = Field(1.0, gt=0, le=8, description="Fractions share a GPU, over gloo then.")
    threads_per_member: int | None = Field(None, ge=1, description="torch threads; default: the member's whole CPUs.")
    gather_timeout: Number = Field(300.0, gt=0, description="Seconds until a late member is an error.")
    max_restarts: int = Field(3, ge=0, description="Times Ray Train restarts the members after a death.")


class RunConfig(_Section):
    """One training run. The defaults are the digits run of configs/digits.yaml."""

    name: str = Field("digits", pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = Field(0, ge=0)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    attack: AttackConfig = AttackConfig()
    defense: DefenseConfig = DefenseConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        faults = list(_disagreements(self))
        if faults:
            raise ValueError("; ".join(faults))
        return self


def _disagreements(config: RunConfig) -> Iterable[str]:
    members, defense, split = config.ensemble.members, config.defense, config.ensemble.split
    if defense.name == "eat" and members > 1:
        if defense.peers > members - 1:
            yield f"defense.peers must be at most members − 1 = {members - 1}; got {defense.peers}"
        if defense.transfer_rule == "relay":
            steps = 1 if config.attack.name == "fgsm" else config.attack.num_steps
            if steps < 2:
                yield (
                    f"the rule 'relay' shares the attack's steps, so attack.num_steps must be at least 2 (and fgsm has "
                    f"one); got {config.attack.name} with {config.attack.num_steps}"
                )
            elif defense.relay_steps is not None and defense.relay_steps >= config.attack.num_steps:
                yield (
                    f"defense.relay_steps must leave steps to the receiver: below attack.num_steps = "
                    f"{config.attack.num_steps}; got {defense.relay_steps}"
                )
            if defense.peers != 1:
                yield f"the rule 'relay' hands each batch to one peer, so defense.peers must be 1; got {defense.peers}"
        if defense.diversity_weight > 0 and defense.transfer_rule in ("none", "relay", "joint"):
            yield (
                f"defense.diversity_weight compares members on transferred batches, which the rule "
                f"'{defense.transfer_rule}' has none of; set it to 0 or choose uniform, hardest or class_risk"
            )
        if defense.transfer_rule == "joint" and config.cluster.backend != "local":
            yield (
                "the rule 'joint' needs every member's input gradient at each attack step, so it runs in one process: "
                "set cluster.backend to local, or choose another defense.transfer_rule"
            )
    parts = split.parts or max(members, 2)
    if split.rule == "disjoint" and parts < members:
        yield f"ensemble.split.rule 'disjoint' needs at least as many parts as members; got {parts} and {members}"
    if split.parts_per_member is not None and split.parts_per_member > parts:
        yield f"ensemble.split.parts_per_member must be at most parts = {parts}; got {split.parts_per_member}"


def parse_config(values: Any, *, source: str = "config") -> RunConfig:
    """Check a nested mapping and fill in the defaults.

    Raises:
        ConfigError: One message with every fault: unknown keys (with the nearest known one) and bad values.
    """
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected a mapping of sections (data:, model:, …), got {type(values).__name__}")
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        faults = [_fault(detail) for detail in error.errors()]
        # Sections are compared only when each is valid, so compare them with the faulty values at their defaults.
        try:
            RunConfig.model_validate(_without(values, [detail["loc"] for detail in error.errors()]))
        except ValidationError as more:
            faults += [fault for detail in more.errors() if (fault := _fault(detail)) not in faults]
        raise ConfigError(f"{source}: " + "; ".join(faults)) from error


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file (default: all defaults) and apply ``section.key=value`` overrides.

    Raises:
        ConfigError: The file is missing, is not YAML, or the result is not a valid config.
    """
    source = "config" if path is None else str(path)
    values: Any = {}
    if path is not None:
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError(f"cannot read the config '{path}': {error.strerror or error}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"'{path}' is not YAML: {_one_line(error)}") from error
    if isinstance(values, dict):
        for override in overrides:
            _apply(values, override)
    return parse_config(values, source=source)


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML that :func:`load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def override(config: RunConfig, *assignments: str) -> RunConfig:
    """A copy of ``config`` with ``section.key=value`` assignments applied and everything checked again."""
    values = config.model_dump(mode="json")
    for assignment in assignments:
        _apply(values, assignment)
    return parse_config(values)


def _apply(values: dict[str, Any], assignment: str) -> None:
    path, equals, text = assignment.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"--set takes section.key=value, e.g. attack.epsilon=8/255; got '{assignment}'")
    *sections, key = path.strip().split(".")
    target = values
    for section in sections:
        inner = target.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {assignment}: '{section}' is a value, not a section")
        target = inner
    try:
        target[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {assignment}: the value is not YAML: {_one_line(error)}") from error


def _without(values: dict[str, Any], locations: Sequence[Sequence[int | str]]) -> dict[str, Any]:
    """A copy of nested settings without those at the given locations (all of it where a location is the root)."""
    if any(not location for location in locations):
        return {}
    kept: dict[str, Any] = {}
    for key, value in values.items():
        inner = [location[1:] for location in locations if location[0] == key]
        if isinstance(value, dict) and all(inner):
            kept[key] = _without(value, inner)
        elif not inner:
            kept[key] = value
    return kept


def _fault(detail: Any) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    given = detail.get("input")
    if detail["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(path.split(".")[-1], _known_keys(detail["loc"][:-1]), n=1)
        return f"unknown key '{path}'" + (f" (did you mean '{nearest[0]}'?)" if nearest else "")
    if detail["type"] == "value_error":
        message = str(detail["ctx"]["error"])
        return f"{path}: {message}" if path else message
    wanted = detail["msg"][0].lower() + detail["msg"][1:]
    shown = f"; got {given!r}" if not isinstance(given, (dict, BaseModel)) else "; got a section"
    return f"{path}: {wanted}{shown}"


def _known_keys(location: Sequence[int | str]) -> list[str]:
    model: Any = RunConfig
    for part in location:
        model = model.model_fields[str(part)].annotation
    return list(model.model_fields)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def effective_step_size(attack: AttackConfig) -> float:
    """The step in pixel units: the configured one, else 2.5·ε/K (Madry et al. 2017, appendix)."""
    return attack.step_size if attack.step_size is not None else 2.5 * attack.epsilon / attack.num_steps


def is_finite(value: float | None) -> bool:
    """Whether a logged number is there and finite."""
    return value is not None and math.isfinite(value)
