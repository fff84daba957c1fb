"""The sections of a run, typed: every setting with its unit, range and default beside it."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from eat_dist.config.agreement import disagreements
from eat_dist.config.base import Number, PerChannel, Section, StoreUri
from eat_dist.config.inference import InferenceConfig


class DataConfig(Section):
    """What is trained and tested on, and how batches are drawn."""

    dataset: str = Field("digits", description="Name in DATASETS.")
    root: str | None = Field(None, description="Folder, URL or zip of the original files; digits needs none.")
    shards: str | None = Field(None, description="Prepared shards; default: made from root once, in the user's cache.")
    subset: bool = Field(False, description="The files are a part of the dataset: other counts are a warning.")
    image_size: int | None = Field(None, ge=1, le=8192, description="Pixels, square; default: the dataset's own.")
    resize: int | None = Field(
        None, ge=1, le=16384, description="Shorter side before the centre crop; default: the dataset's."
    )
    augmentation: Literal["none", "crop_flip"] = Field("none", description="Of training images.")
    on_bad_image: Literal["error", "skip"] = Field("error", description="skip: leave it out, count it, report it.")
    test_root: str | None = Field(None, description="Folder or zip of the test classes (dataset 'folder').")
    train_share: Number = Field(0.5, gt=0, lt=1, description="Share of the classes trained on ('folder', one root).")
    class_seed: int = Field(0, ge=0, description="Which classes those are ('folder', one root).")
    validation_share: Number = Field(0.0, ge=0, lt=1, description="Of the training classes: measured on, not trained.")
    validation_seed: int = Field(0, ge=0, description="Which training classes are held out.")
    cache: Literal["auto", "device", "none"] = Field("auto", description="Decoded images kept in memory.")
    workers: int | None = Field(None, ge=0, description="Decoding processes a member; default: by its CPUs.")
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


class ModelConfig(Section):
    """One member's network. Input normalisation is part of the model, so ε always means pixels."""

    backbone: str = Field("convnet", description="Name in BACKBONES.")
    widths: Annotated[tuple[Annotated[int, Field(ge=1, le=65536)], ...], Field(strict=False, min_length=1)] = Field(
        (32, 64, 128), description="Channels of the convolutional blocks (convnet)."
    )
    embedding_dim: int = Field(64, ge=2, le=65536, description="D.")
    weights: str = Field("none", min_length=1, description="Of the backbone: none, imagenet, or a file's path or URL.")
    mean: PerChannel | None = Field(None, description="Subtracted from the pixels; default: the backbone's own.")
    std: PerChannel | None = Field(None, description="Divides them then; default: the backbone's own.")
    freeze_batch_norm: bool = Field(False, description="BatchNorm keeps its statistics, weights and biases.")

    @field_validator("std")
    @classmethod
    def _std_is_positive(cls, std: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if std is not None and min(std) <= 0:
            raise ValueError(f"values must be greater than 0; got {list(std)}")
        return std


class LossConfig(Section):
    """The metric loss. An option left out takes the loss's own default; one the loss does not have is an error."""

    name: str = Field("proxy_anchor", description="Name in LOSSES.")
    alpha: Number | None = Field(None, gt=0, description="Scale of the similarities of positives, α.")
    beta: Number | None = Field(None, gt=0, description="Scale of the similarities of negatives, β.")
    gamma: Number | None = Field(None, gt=0, description="Entropy scale of the centres of one class, γ (soft_triple).")
    margin: Number | None = Field(None, ge=0, lt=2, description="Margin, δ.")
    positive_margin: Number | None = Field(None, ge=0, lt=2, description="Distance not charged (contrastive).")
    scale: Number | None = Field(None, gt=0, description="Scale of the softmax's logits.")
    angle: Number | None = Field(None, gt=0, lt=90, description="Degrees, α (angular).")
    centers_per_class: int | None = Field(None, ge=1, description="Proxies a class (soft_triple).")

    @field_validator("margin")
    @classmethod
    def _margin_on_its_scale(cls, margin: float | None, info: ValidationInfo) -> float | None:
        """Distances of unit vectors go up to 2; the other losses' margins are on cosine similarity."""
        if margin is not None and margin >= 1 and info.data.get("name") not in ("contrastive", "triplet"):
            raise ValueError(f"a margin on cosine similarity must be below 1; got {margin:g}")
        return margin


class AttackConfig(Section):
    """The attack that training defends against; evaluation takes its norm and ε unless told otherwise."""

    name: str = Field("pgd", description="Name in ATTACKS.")
    norm: Literal["linf", "l2", "l0"] = "linf"
    epsilon: Number = Field(0.2, ge=0, description="Radius in pixel units, images in [0, 1]; l0: share of the pixels.")
    num_steps: int = Field(5, ge=1, description="Gradient steps, K.")
    step_size: Number | None = Field(None, gt=0, description="Default 2.5·ε/K (Madry et al. 2017).")
    random_start: bool = Field(True, description="Start at a uniform point of the ball.")

    @model_validator(mode="after")
    def _epsilon_in_reach(self) -> AttackConfig:
        if self.norm == "l0" and self.epsilon > 1:
            raise ValueError(f"epsilon in l0 is the share of pixels that may change, at most 1; got {self.epsilon:g}")
        if self.norm == "linf" and self.epsilon > 1:
            raise ValueError(
                f"epsilon is in units of images in [0, 1], so at most 1 in L∞; got {self.epsilon:g}. "
                f"Did you mean {self.epsilon:g}/255?"
            )
        return self


class DefenseConfig(Section):
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
    kl_weight: Number | None = Field(None, ge=0, description="β: weight of the divergence (trades).")
    softmax_scale: Number | None = Field(None, gt=0, description="Similarities × this are logits (trades, adp).")
    mix_alpha: Number | None = Field(None, gt=0, description="α of λ ~ Beta(α, α) (mixup, manifold_mixup, iat).")
    entropy_weight: Number | None = Field(None, ge=0, description="α: weight of the ensemble's entropy (adp).")
    log_det_weight: Number | None = Field(None, ge=0, description="β: weight of the log-determinant (adp).")
    distil_epsilon: Number | None = Field(None, ge=0, description="ε of the distillation (dverge).")
    distil_steps: int | None = Field(None, ge=1, description="Steps of the distillation (dverge).")
    perturbed_role: Literal["anchor", "positive", "negative"] | None = Field(
        None, description="The role of a tuple that is attacked (robust_dml)."
    )
    triplet_margin: Number | None = Field(None, gt=0, lt=2, description="γ of the triplet loss (est, act, hm).")
    mining: Literal["random", "softhard", "semihard"] | None = Field(
        None, description="How triplets are chosen (est, act, hm)."
    )
    ics_weight: Number | None = Field(None, ge=0, description="λ of the intra-class structure; 0: off (hm).")


class SplitConfig(Section):
    """Which part of the training set each member sees (diversity)."""

    rule: Literal["all", "leave_one_out", "k_of_n", "disjoint", "bootstrap"] = "all"
    by: Literal["sample", "class"] = Field("sample", description="sample: within each class, all see all classes.")
    parts: int | None = Field(None, ge=2, description="N; default: the number of members.")
    parts_per_member: int | None = Field(None, ge=1, description="k of 'k_of_n'; default: N − 1.")


class EnsembleConfig(Section):
    """How many members, what each sees, and how their embeddings become one."""

    members: int = Field(3, ge=1, description="M.")
    split: SplitConfig = SplitConfig()
    fusion: Literal["concat"] = Field("concat", description="Concatenated member embeddings, scaled to length 1.")


class OptimiserConfig(Section):
    """AdamW, as in the Proxy Anchor recipe."""

    learning_rate: Number = Field(5e-4, gt=0, le=1e30)
    weight_decay: Number = Field(1e-4, ge=0)
    proxy_learning_rate_factor: Number = Field(
        100.0, gt=0, le=1e6, description="The proxies' learning rate is this × as high."
    )
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    step_epochs: int = Field(10, ge=1, description="Epochs between decays (step).")
    step_factor: Number = Field(0.5, gt=0, le=1, description="Factor of a decay (step).")
    clip_value: Number | None = Field(None, gt=0, description="Each gradient entry is clipped to ± this.")


class TrainConfig(Section):
    """How long, and in which arithmetic."""

    epochs: int = Field(15, ge=1, description="Of ⌈largest split / batch_size⌉ iterations.")
    warmup_epochs: int = Field(0, ge=0, description="First epochs that train head and proxies only.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Of attack and update; losses are always fp32.")
    channels_last: bool = Field(False, description="Memory format of images and convolutions.")
    compile: bool = Field(False, description="torch.compile the network.")
    micro_batch_size: int | None = Field(None, ge=1, description="Images whose activations are held at once; exact.")


Objectives = Literal["displacement", "nearest_wrong_centroid", "random_wrong_centroid", "nearest_negative", "proxy"]


class EvaluationConfig(Section):
    """What is measured when training has finished, and by ``eat-dist evaluate`` (docs/evaluation.md)."""

    protocol: Literal["none", "quick", "standard", "full"] = "quick"
    epsilon: Number | None = Field(None, ge=0, description="Default: attack.epsilon.")
    epsilons: Annotated[tuple[Number, ...], Field(strict=False, min_length=1)] | None = Field(
        None, description="Radii of the accuracy curves, rising; default: none, and 0, ε/4, ε/2, ε, 2ε in full."
    )
    fractions: Annotated[tuple[Number, ...], Field(strict=False, min_length=1)] | None = Field(
        None, description="Attacked shares of the clustered set; default: all of it, and 0.1, 0.5, 1 in full."
    )
    epsilon_l2: Number | None = Field(None, ge=0, description="Radius of L2 attacks; default: ε·√(C·H·W)/4 (full).")
    epsilon_l0: Number = Field(0.05, ge=0, le=1, description="Share of pixels that JSMA may change (full).")
    num_steps: int = Field(20, ge=1, description="PGD steps of the quick protocol.")
    apgd_steps: int | None = Field(None, ge=1, description="Default: 50 (standard), 100 (full).")
    restarts: int | None = Field(None, ge=1, description="Of APGD; default: 1 (standard), 5 (full).")
    square_queries: int | None = Field(None, ge=1, description="Default: 1000 (standard), 5000 (full).")
    eot_draws: int | None = Field(
        None, ge=1, description="Passes averaged a step; default: 1, and 20 for a randomised defense at inference."
    )
    objectives: Annotated[tuple[Objectives, ...], Field(strict=False, min_length=1)] = Field(
        ("nearest_wrong_centroid", "random_wrong_centroid", "nearest_negative"),
        description="What the quick protocol's attacker maximises; the others have their own list.",
    )
    members: bool = Field(True, description="Attack each member alone, too.")
    sample: int = Field(500, ge=1, description="Images of the attacks that are too slow for all of them.")
    ers_images: int | None = Field(None, ge=1, description="Images of the ten ERS attacks; default: the sample (full).")
    batch_size: int = Field(256, ge=1)
    kmeans_seeds: int | None = Field(None, ge=1, description="k-means runs averaged; default: 3, and 10 in full.")

    @model_validator(mode="after")
    def _rising(self) -> EvaluationConfig:
        for name, values, lowest in (("epsilons", self.epsilons, 0.0), ("fractions", self.fractions, 1e-9)):
            if values and (values[0] < lowest or any(a >= b for a, b in itertools.pairwise(values))):
                listed = ", ".join(f"{value:g}" for value in values)
                raise ValueError(f"{name} must rise from {'0' if not lowest else 'above 0'}; got {listed}")
        if self.fractions and self.fractions[-1] > 1:
            raise ValueError(f"fractions are shares of the test set, at most 1; got {self.fractions[-1]:g}")
        return self


class CheckpointConfig(Section):
    """How often the whole training state is saved."""

    every: int = Field(5, ge=1, description="Epochs between checkpoints; the last epoch always has one.")
    keep: int = Field(2, ge=1, description="Newest checkpoints that stay.")


class TrackingConfig(Section):
    """MLflow. MLFLOW_TRACKING_URI is respected; without it and without uri, a local sqlite file."""

    enabled: bool = True
    uri: StoreUri | None = Field(None, description="Overrides MLFLOW_TRACKING_URI; no passwords.")
    experiment: str = "eat_dist"
    register_as: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", description="Registered model that the ensemble is added to."
    )


class ClusterConfig(Section):
    """Where the members run."""

    backend: Literal["ray", "local"] = Field("ray", description="local: all members in this process, without Ray.")
    address: str | None = Field(None, description="Ray cluster to join; default: RAY_ADDRESS or a new local one.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs where the cluster has them.")
    cpus_per_member: Number | None = Field(None, gt=0, description="Default: an equal share of the CPUs; none on GPUs.")
    gpus_per_member: Number = Field(1.0, gt=0, le=8, description="Fractions share a GPU, over gloo then.")
    threads_per_member: int | None = Field(
        None, ge=1, le=4096, description="torch threads; default: the member's whole CPUs."
    )
    replicas_per_member: int = Field(1, ge=1, description="R: workers that train one member together.")
    placement: Literal["pack", "spread"] = Field("pack", description="Workers on few nodes, or on many.")
    gather_timeout: Number = Field(300.0, gt=0, le=1e6, description="Seconds until a late member is an error.")
    wait_for_nodes: Number | None = Field(
        None, ge=0, description="Seconds members wait for room; default: 1800, at the start if nodes may be launched."
    )
    max_restarts: int = Field(3, ge=0, description="Times Ray Train restarts the members after a death.")

    @field_validator("gpus_per_member")
    @classmethod
    def _whole_gpus_or_a_share(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(f"above one GPU it must be a whole number (Ray gives no GPU and a half); got {gpus:g}")
        return gpus


class RunConfig(Section):
    """One training run. The defaults are the digits run of configs/digits.yaml."""

    name: str = Field("digits", pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = Field(0, ge=0)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    attack: AttackConfig = AttackConfig()
    defense: DefenseConfig = DefenseConfig()
    inference: InferenceConfig = InferenceConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        faults = list(disagreements(self))
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def evaluation_epsilon(self) -> float:
        """The radius that is measured at: ``evaluation.epsilon``, else the training attack's."""
        return self.attack.epsilon if self.evaluation.epsilon is None else self.evaluation.epsilon

    @property
    def measured(self) -> EvaluationConfig:
        """What is measured: ``evaluation`` with that radius filled in, and without what its protocol does not read."""
        update: dict[str, Any] = {"epsilon": self.evaluation_epsilon}
        if self.evaluation.protocol != "quick":
            update |= {name: EvaluationConfig.model_fields[name].default for name in ("objectives", "num_steps")}
        return self.evaluation.model_copy(update=update)


def effective_step_size(attack: AttackConfig) -> float:
    """The step in pixel units: the configured one, else 2.5·ε/K (Madry et al. 2017, appendix)."""
    return attack.step_size if attack.step_size is not None else 2.5 * attack.epsilon / attack.num_steps
