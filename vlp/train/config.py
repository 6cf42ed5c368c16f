"""How a model is trained, as a recipe says it."""

from __future__ import annotations

from pydantic import Field

from vlp.config import Config
from vlp.train.adversarial import AdversarialConfig
from vlp.train.lora import LoraConfig
from vlp.train.optim import OptimConfig
from vlp.train.step import Precision


class TrainConfig(Config):
    """How the model is trained. Durations are in samples, over all ranks."""

    samples: int = Field(1_000_000, ge=1)
    """Samples to train on, all passes over the data counted."""
    global_batch: int = Field(256, ge=1)
    """Samples of one optimizer step, over all ranks and accumulation."""
    micro_batch: int = Field(256, ge=1)
    """Largest batch that one rank runs at a time; the rest of its share is accumulated, exactly also for ITC."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    precision: Precision = "auto"
    """`auto`: bf16 autocast on CUDA, fp32 elsewhere."""
    compile: bool = False
    """torch.compile the encoders and the fusion (GPU)."""
    sample: dict[str, float] = Field(default_factory=dict)
    """Each step trains one of these, drawn by their ratios: an objective, or several joined by `+` (UNITER: `mlm: 12`,
    `itm+wra: 9`); empty = every step trains all objectives."""
    lora: LoraConfig | None = None
    """Train low-rank differences of the weights of parts in place of these (extra `lora`); none = the weights."""
    adversarial: AdversarialConfig | None = None
    """Noise on words or regions that raises the loss (VILLA); none = no noise."""
    seed: int = 0
    """Of initial weights, data order, masks and negatives."""
    save_every: int | None = Field(default=None, ge=1)
    """Samples between checkpoints; None = a twentieth of the run, at least 250,000. The end and a signal save too."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept, newest first."""
    log_every: int = Field(10, ge=1)
    """Steps between two records of the log."""

    @property
    def saved_every(self) -> int:
        """Samples between checkpoints: a machine that fails, or a loss that is not finite, costs no more than these."""
        return self.save_every or max(self.samples // 20, 250_000)
