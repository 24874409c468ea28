"""How much of its data a run has read, step by step."""

from dataclasses import dataclass

from pltmoe.checkpoint.manifest import Manifest
from pltmoe.config import RunConfig


@dataclass(frozen=True)
class Consumed:
    """Sequences and tokens read by all ranks after a step.

    Counted on from where a run was resumed: before that its batches may have been of another size
    (``checkpoint.accept_changes``).
    """

    sequences_per_step: int
    tokens_per_step: int
    step: int = 0
    """Where counting begins, with so many sequences and tokens:"""
    sequences: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, config: RunConfig, manifest: Manifest | None) -> "Consumed":
        """Return what a run reads that goes on from a checkpoint, or begins."""
        per_step = config.train.global_batch_size
        counted = (manifest.step, manifest.consumed_samples, manifest.tokens) if manifest else ()
        return cls(per_step, per_step * config.data.sequence_length, *counted)

    def sequences_after(self, step: int) -> int:
        """Return the sequences read when ``step`` steps have been taken."""
        return self.sequences + (step - self.step) * self.sequences_per_step

    def tokens_after(self, step: int) -> int:
        """Return the tokens read when ``step`` steps have been taken."""
        return self.tokens + (step - self.step) * self.tokens_per_step
