"""The run, typed: YAML in, YAML out, every fault in one message."""

from eat_dist.config.inference import InferenceConfig
from eat_dist.config.loading import (
    configured,
    dump_config,
    flat,
    load_config,
    override,
    parse_config,
    read_assignment,
)
from eat_dist.config.sections import (
    AttackConfig,
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    DefenseConfig,
    EnsembleConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    RunConfig,
    SplitConfig,
    TrackingConfig,
    TrainConfig,
    effective_step_size,
)
from eat_dist.config.yaml_files import parse_yaml, read_yaml

__all__ = [
    "AttackConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "DataConfig",
    "DefenseConfig",
    "EnsembleConfig",
    "EvaluationConfig",
    "InferenceConfig",
    "LossConfig",
    "ModelConfig",
    "OptimiserConfig",
    "RunConfig",
    "SplitConfig",
    "TrackingConfig",
    "TrainConfig",
    "configured",
    "dump_config",
    "effective_step_size",
    "flat",
    "load_config",
    "override",
    "parse_config",
    "parse_yaml",
    "read_assignment",
    "read_yaml",
]
