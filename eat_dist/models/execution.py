"""How an embedder computes while it trains: number format, memory format, compilation, activations held at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from eat_dist.config import TrainConfig
from eat_dist.errors import ConfigError

if TYPE_CHECKING:
    from eat_dist.models.embedder import Embedder

Network = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Execution:
    """The settings of one embedder; the defaults are float32, the whole batch at once.

    Attributes:
        bfloat16: Matrix products and convolutions in bfloat16 under autocast; parameters, their gradients and the
            image gradient stay float32. It needs no loss scaling: bfloat16 has float32's range.
        channels_last: Images in torch's channels-last memory format (the convolutions' weights are converted once).
        compiled: The backbone is compiled, so its first call may meet a compiler's fault.
        micro_batch_size: A larger batch is computed in parts of at most this size. Their activations are dropped after
            the forward pass and computed again in the backward pass (Chen et al. 2016, "Training deep nets with
            sublinear memory cost"), which takes about a third more time. The embeddings come back as one batch, so any
            loss sees all of it. Exact where BatchNorm is in evaluation mode or frozen; the configuration demands that.
    """

    bfloat16: bool = False
    channels_last: bool = False
    compiled: bool = False
    micro_batch_size: int | None = None

    def run(self, network: Network, images: torch.Tensor) -> torch.Tensor:
        """``network(images)``, [B, C, H, W] → [B, D].

        Raises:
            ConfigError: The compilation failed.
        """
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.micro_batch_size is None or len(images) <= self.micro_batch_size:
            return self._run_part(network, images)
        count = math.ceil(len(images) / self.micro_batch_size)  # of nearly equal size: few forms for a compiler to meet
        # No random layer in any backbone, so no generator state to keep. Where no gradient is recorded, checkpoint
        # only calls the function.
        parts = [
            checkpoint(self._run_part, network, part, use_reentrant=False, preserve_rng_state=False)
            for part in images.tensor_split(count)
        ]
        return torch.cat(parts)

    def _run_part(self, network: Network, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            if not self.compiled:
                return network(images)
            with _compile_faults_as_one_line():
                return network(images)


def apply_execution(embedder: Embedder, config: TrainConfig, device: torch.device) -> None:
    """Make an embedder compute as the configuration says, in place; names and values of its parameters stay.

    Compilation itself happens in the first forward pass, and again for each new form of input or mode.

    Args:
        embedder: Of one member.
        config: Precision, memory format, compilation, micro-batches.
        device: Where it will compute.

    Raises:
        ConfigError: bfloat16 on a GPU that does not have it.
    """
    bfloat16 = config.precision == "bf16"
    if bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"train.precision bf16 needs a GPU with bfloat16 (compute capability 8.0 or higher); got "
            f"{torch.cuda.get_device_name(device)}. Set train.precision to fp32."
        )
    if config.channels_last:
        embedder.to(memory_format=torch.channels_last)
    if config.compile:
        embedder.backbone.compile()
    embedder.execution = Execution(bfloat16, config.channels_last, config.compile, config.micro_batch_size)


@contextmanager
def _compile_faults_as_one_line() -> Iterator[None]:
    from torch._dynamo.exc import TorchDynamoException  # noqa: PLC0415  (takes a second; torch exports it nowhere else)

    try:
        yield
    except TorchDynamoException as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"torch.compile failed ({type(error).__name__}: {reason}); it needs a C++ compiler and, on GPUs, Triton. "
            f"Set train.compile to false."
        ) from error
