"""The run, typed: YAML in, YAML out, every fault in one message."""

from eat_dist.config.inference import InferenceConfig
from eat_dist.config.loading import dump_config, load_config, override, parse_config
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
    "dump_config",
    "effective_step_size",
    "load_config",
    "override",
    "parse_config",
]
