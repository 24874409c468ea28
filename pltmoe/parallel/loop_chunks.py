"""One loop through one model chunk of a stage: what Megatron's interleaved schedule calls a chunk.

All loop chunks of a rank run the layers of one ``PLTModel``, which alone is wrapped in DDP: a
wrapper for every chunk would point the shared weights at different gradient buffers.

    stage 0           stage 1           (one model chunk each, L = 2)
    embed
    layers, loop 1 -> layers, loop 1 -> finish_loop
    next_loop      <-----------------------+          shift, + E
    layers, loop 2 -> layers, loop 2 -> head -> loss
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from pltmoe.model.block import Lent
from pltmoe.model.plt import PLTModel
from pltmoe.parallel.shared_kv import Lending, on_backward


@dataclass(frozen=True)
class Event:
    """What a rank did, as it happened: to be compared with ``parallel/schedule.py``."""

    kind: str
    """F or B."""
    loop: int
    chunk: int
    micro_batch: int


class LoopChunk(MegatronModule):
    """A view of a stage's weights: its model chunk ``chunk`` in loop ``loop`` (from 1)."""

    def __init__(
        self,
        stage: PLTModel,
        loop: int,
        chunk: int,
        lending: Lending,
        record: Callable[[Event], None],
    ):
        super().__init__(stage.config)
        self.model_type = ModelType.encoder_or_decoder
        object.__setattr__(self, "_stage", stage)  # not a submodule: the stage owns the weights
        self._loop, self._chunk, self._lending, self._record = loop, chunk, lending, record
        self._loops, chunks = stage.plt.num_loops, stage.stage.chunks
        self.vp_stage = (loop - 1) * len(chunks) + chunk
        begin = sum(len(layers) for layers in chunks[:chunk])
        self._part = range(begin, begin + len(chunks[chunk]))
        self._has_input = not (stage.stage.is_first and chunk == 0 and loop == 1)
        self._enters = stage.stage.is_first and chunk == 0
        self._leaves = stage.stage.is_last and chunk == len(chunks) - 1
        self._input: Tensor | None = None
        self._next_micro_batch = 0

    def begin_step(self) -> None:
        """Count micro batches from 0 again."""
        self._next_micro_batch = 0

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take what the previous chunk has sent; Megatron's schedules call it."""
        self._input = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(
        self, tokens_bs: Tensor, position_bs: Tensor, labels_bs: Tensor, loss_tokens: Tensor
    ) -> Tensor:
        """Run the next micro batch; returns hidden states [s, b, d], or token losses [b, s]."""
        stage: PLTModel = self._stage  # type: ignore[assignment]
        number, self._next_micro_batch = self._next_micro_batch, self._next_micro_batch + 1
        self._note("F", number)
        key = (number, self._chunk)
        borrowed = self._lending.borrowed(key) if self._loop > 1 else []
        assert (self._input is not None) == self._has_input
        if not self._enters:
            hidden = self._input
        elif self._loop == 1:
            hidden = stage.embed(tokens_bs, position_bs)
        else:
            hidden = stage.next_loop(self._loop, borrowed[0], self._input, position_bs)  # type: ignore[arg-type]
        entered, self._input = hidden, None
        at = stage.pass_of(self._loop, tokens_bs, loss_tokens)
        lent = self._unpack(borrowed) if self._loop > 1 else None
        with get_fp8_context(stage.config):
            hidden, own = stage.layers.run(hidden, at, lent, self._part)  # type: ignore[arg-type]
        if self._leaves:
            stage.diagnostics.add_output(self._loop, hidden, number)
            last = self._loop == self._loops
            hidden = stage.head(hidden, labels_bs) if last else stage.finish_loop(hidden)
        lends = self._pack(entered, own) if self._loop == 1 < self._loops else []  # type: ignore[arg-type]
        return self._hand_on(hidden.contiguous(), key, lends)

    def _hand_on(self, output: Tensor, key: tuple[int, int], lends: list[Tensor]) -> Tensor:
        """Lend what later loops need, and release it after the last use."""
        if self._loop == 1 < self._loops:
            self._lending.lend(key, lends)
        if not torch.is_grad_enabled():
            if self._loop == self._loops > 1:
                self._lending.release(key)
            return output

        def hand_back() -> list[Tensor | None]:
            self._note("B", key[0])
            return self._lending.release(key) if self._loop == 1 < self._loops else []

        return on_backward(output, hand_back, lends)

    def _pack(self, entered: Tensor, own: list[Lent]) -> list[Tensor]:
        """Flatten what loop 1 lends: E where the loops come in, then each layer's parts."""
        tensors = [entered] if self._enters else []
        for layer in own:
            tensors += layer.key_value or ()
            tensors += () if layer.experts is None else (layer.experts,)
        return tensors

    def _unpack(self, borrowed: list[Tensor]) -> list[Lent]:
        """Undo ``_pack``."""
        stage: PLTModel = self._stage  # type: ignore[assignment]
        rest = iter(borrowed[1:] if self._enters else borrowed)
        return [
            Lent(
                (next(rest), next(rest)) if stage.plt.share_first_loop_kv else None,
                next(rest) if stage.plt.is_moe else None,
            )
            for _ in self._part
        ]

    def _note(self, kind: str, micro_batch: int) -> None:
        self._record(Event(kind, self._loop, self._chunk, micro_batch))
