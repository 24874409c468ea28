"""Generating text: prompts in, tokens out, with static shapes.

A ``Session`` is a batch of a fixed size with its cache; on a GPU its step (all layers, all loops,
choosing the token) is one CUDA graph. The host only reads the chosen tokens, one step behind the
GPU, to see which texts have ended and to hand them out.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pltmoe.config import ModelConfig
from pltmoe.config.describe import describe_model
from pltmoe.errors import ConfigError, DataError, EngineError
from pltmoe.inference.cache import StaticCache
from pltmoe.inference.kernels import choose_kernels
from pltmoe.inference.model import Kernels, PLTDecoder
from pltmoe.inference.prefill import prefill
from pltmoe.inference.sampling import Plan, Sampler, SamplingOptions
from pltmoe.inference.weights import Weights, describe_folder, load_weights

logger = logging.getLogger(__name__)

CAPACITY_STEP = 64
"""Caches are this many slots, or a multiple: prompts of about one length share a CUDA graph."""
FP8_CAPABILITY = (8, 9)
MAX_BATCH = 64
"""Prompts that run together; more wait."""

GREEDY = SamplingOptions()
Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class NewToken:
    """One token of one text as it is made."""

    index: int
    """Which prompt."""
    token: int
    logprob: float | None
    reason: Reason | None
    """Why the text ends here: a stop token (not part of the text) or the length; else None."""


@dataclass
class Generation:
    """What was made of one prompt."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: Reason = "length"


@dataclass
class Timing:
    """Seconds of the wall clock and counts of a stream."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    """From the end of a prefill to its batch's last token, what the caller does included."""
    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    """Decode steps; the first token of a text comes from its prefill."""

    @property
    def ms_per_token(self) -> float:
        """Milliseconds of one decode step: a token of every sequence of the batch."""
        return 1e3 * self.decode_s / max(self.steps, 1)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all sequences per second, prompts included in the time."""
        return self.new_tokens / max(self.prefill_s + self.decode_s, 1e-9)


class Session:
    """A batch that decodes in step, with its cache.

    Args:
        decoder: the model.
        batch: sequences; fixed.
        capacity: slots of each; fixed.
        graph: make the step a CUDA graph; default: where ``uses_graph``.

    Raises:
        EngineError: more slots than the decoder has.
    """

    def __init__(self, decoder: PLTDecoder, batch: int, capacity: int, graph: bool | None = None):
        if capacity > decoder.max_slots:
            raise EngineError(
                f"a cache of {capacity} slots for a model that is set to {decoder.max_slots}: "
                "raise max_slots (--max-slots)"
            )
        weights = decoder.weights
        self.decoder, self.batch, self.capacity = decoder, batch, capacity
        self.cache = StaticCache(decoder.m, batch, capacity, weights.device, weights.dtype)
        self.sampler = Sampler(batch, decoder.m.vocab_size, weights.device)
        self.plan = self.sampler.set([SamplingOptions()] * batch)
        self.token_b = torch.zeros(batch, dtype=torch.int64, device=weights.device)
        self.logprob_b = torch.zeros(batch, device=weights.device)
        self._use_graph = uses_graph(decoder) if graph is None else graph
        self._graphs: dict[Plan, torch.cuda.CUDAGraph] = {}

    def set_options(self, options: Sequence[SamplingOptions], logprobs: bool = False) -> None:
        """Choose tokens this way from now on; record the step if it is a new one."""
        self.plan = self.sampler.set(options, logprobs)
        self.prepare()

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Start new texts: forget the old ones, read the prompts, choose the first tokens."""
        self.cache.reset()
        self._choose(prefill(self.decoder, self.cache, prompts))

    def pretend_filled(self, context: int, seed: int = 0) -> None:
        """Fill the cache with random numbers as if ``context`` slots had been read (measuring)."""
        generator = torch.Generator(self.token_b.device).manual_seed(seed)
        for x in self.cache.tensors():
            x.normal_(generator=generator)
        self.cache.lengths_b.fill_(context)

    def prepare(self) -> None:
        """Record the step if that is still to be done; else nothing."""
        if self._use_graph and self.plan not in self._graphs:
            self._graphs[self.plan] = self._capture()

    def step(self) -> None:
        """Decode ``token_b`` of every sequence and replace it by the next one."""
        if not self._use_graph:
            return self._step()
        self.prepare()
        self._graphs[self.plan].replay()

    @torch.no_grad()
    def _step(self) -> None:
        self._choose(self.decoder.step(self.token_b, self.cache))

    def _choose(self, logits_bv: Tensor) -> None:
        token_b, logprob_b = self.sampler.choose(logits_bv, self.cache.lengths_b, self.plan)
        self.token_b.copy_(token_b)
        if logprob_b is not None:
            self.logprob_b.copy_(logprob_b)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Record the step. Warming up runs it for real, so what it changes is put back.

        Keys and values it writes at the next slot are written again by the real step.
        """
        changed = [self.cache.lengths_b, self.cache.handed_on_bld, self.token_b, self.logprob_b]
        before = [x.clone() for x in changed]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
                for x, old in zip(changed, before, strict=True):
                    x.copy_(old)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph


def uses_graph(decoder: PLTDecoder) -> bool:
    """Whether a step can be a CUDA graph: on a GPU, with kernels that read nothing back."""
    return decoder.weights.device.type == "cuda" and decoder.kernels.capturable


class Engine:
    """A model that continues prompts (token ids; text is the caller's, see text.py)."""

    def __init__(
        self,
        weights: Weights,
        max_slots: int,
        stop_ids: Sequence[int] = (),
        kernels: Kernels | None = None,
        max_batch: int = MAX_BATCH,
        fuse: bool = False,
    ):
        if weights.device.type == "cuda":
            torch.cuda.set_device(weights.device)  # kernels, streams and graphs take the current
        kernels = kernels or choose_kernels(weights.device, weights.dtype)
        self.decoder = PLTDecoder(weights, max_slots, kernels, fuse)
        self.max_slots, self.stop_ids, self.max_batch = max_slots, tuple(stop_ids), max_batch
        self._session: Session | None = None
        logger.info("%s", self.describe())

    @classmethod
    def load(
        cls,
        folder: Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_slots: int | None = None,
        max_batch: int = MAX_BATCH,
        fp8: bool = False,
        fuse: bool = False,
    ) -> "Engine":
        """Load an exported folder.

        Args:
            folder: of tools/convert_to_hf.py.
            device: default: the GPU if there is one.
            dtype: default: as stored.
            max_slots: longest text; default: what the model was trained with.
            max_batch: prompts that run together.
            fp8: keep the experts' weights in FP8.
            fuse: compile what lies between the large kernels (see ``PLTDecoder``).

        Raises:
            ConversionError: the folder holds no such model.
            EngineError: FP8 on a device, or of a model, that has none.
        """
        about = describe_folder(folder)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if fp8:
            check_fp8(about.model, device)
        weights = load_weights(folder, device, dtype, fp8)
        slots = max_slots or about.max_slots
        return cls(weights, slots, about.stop_ids, max_batch=max_batch, fuse=fuse)

    def describe(self) -> str:
        """Return one line: what runs, where, and with which kernels."""
        weights = self.decoder.weights
        graph = "CUDA graph" if uses_graph(self.decoder) else "no CUDA graph"
        dtype = str(weights.dtype).removeprefix("torch.")
        fp8 = ", experts in FP8" if weights.layers[0].gate_up_scale_ef is not None else ""
        return (
            f"engine: {describe_model(weights.model)}; {dtype}{fp8} on {weights.device}, "
            f"{weights.num_bytes() / 2**30:.2f} GiB of weights; attention and experts: "
            f"{self.decoder.kernels.reason}; {graph}"
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: SamplingOptions | Sequence[SamplingOptions] = GREEDY,
        logprobs: bool = False,
    ) -> list[Generation]:
        """Continue every prompt; see :meth:`stream`."""
        out = [Generation() for _ in prompts]
        for new in self.stream(prompts, options, logprobs):
            if new.reason != "stop":
                out[new.index].tokens.append(new.token)
                out[new.index].logprobs += [] if new.logprob is None else [new.logprob]
            out[new.index].reason = new.reason or out[new.index].reason
        return out

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        options: SamplingOptions | Sequence[SamplingOptions] = GREEDY,
        logprobs: bool = False,
    ) -> "Stream":
        """Return an iterator over new tokens of all prompts, step by step.

        Args:
            prompts: token ids, not empty, of any lengths.
            options: one for all, or one each.
            logprobs: also return the model's log-probability of each token.

        Raises:
            DataError: a prompt that is empty, or too long together with what is asked for.
            ConfigError: not as many options as prompts.
        """
        if isinstance(options, SamplingOptions):
            options = [options] * len(prompts)
        if len(options) != len(prompts):
            raise ConfigError(f"sampling: {len(options)} options for {len(prompts)} prompts")
        for index, (prompt, wanted) in enumerate(zip(prompts, options, strict=True)):
            self._check(index, prompt, wanted)
        return Stream(_Run(self, prompts, options, logprobs))

    @contextmanager
    def session(self, batch: int, slots: int) -> Iterator[Session]:
        """Lend a session of ``batch`` sequences with room for ``slots``.

        It is the borrower's alone; the one that came back last is kept for the next.
        """
        capacity = min(-(-slots // CAPACITY_STEP) * CAPACITY_STEP, self.max_slots)
        session, self._session = self._session, None
        if session and not (session.batch == batch and slots <= session.capacity <= 4 * capacity):
            session = None  # its cache is free before the new one is made
        if session is None:
            session = Session(self.decoder, batch, capacity)
            mib = session.cache.num_bytes() / 2**20
            logger.info("cache: %.1f MiB for %d sequences of %d slots", mib, batch, capacity)
        try:
            yield session
        finally:
            self._session = session

    def _check(self, index: int, prompt: Sequence[int], options: SamplingOptions) -> None:
        if not prompt:
            raise DataError(f"prompt {index + 1} is empty: give at least one token")
        if max(prompt) >= self.decoder.m.vocab_size or min(prompt) < 0:
            raise DataError(
                f"prompt {index + 1} has a token outside of the model's vocabulary of "
                f"{self.decoder.m.vocab_size}: does the tokenizer belong to the model?"
            )
        slots = len(prompt) + options.max_new_tokens
        if slots > self.max_slots:
            raise DataError(
                f"prompt {index + 1} ({len(prompt)} tokens) and {options.max_new_tokens} new "
                f"tokens need {slots} slots, but the model is set to {self.max_slots}: shorten "
                "them, or raise --max-slots (more than it was trained with is at your own risk)"
            )


def check_fp8(m: ModelConfig, device: torch.device) -> None:
    """Refuse FP8 experts where there are no experts or the device cannot read FP8.

    Raises:
        EngineError: says which.
    """
    if not m.is_moe:
        raise EngineError("FP8 is for the weights of experts; this model is dense")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise EngineError(
            f"FP8 weights need a GPU of compute capability 8.9 or newer; this is {device}"
        )


class Stream(Iterator[NewToken]):
    """New tokens of all prompts as they are made; ``timing`` fills up on the way.

    One that is dropped before its end gives its cache back.
    """

    def __init__(self, run: "_Run"):
        self.timing = run.timing
        self._ended, self._tokens = run.ended, run.tokens()

    def __next__(self) -> NewToken:
        """Return the next token."""
        return next(self._tokens)

    def stop(self, index: int) -> None:
        """End one text (its caller has what it wanted, such as a stop string)."""
        self._ended.add(index)


class _Run:
    """What makes the tokens of a stream; does not know the stream, which may be dropped."""

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        options: Sequence[SamplingOptions],
        logprobs: bool,
    ):
        self.timing = Timing()
        self._engine, self._prompts, self._options = engine, prompts, options
        self._logprobs = logprobs
        self.ended: set[int] = set()
        self._made = [0] * len(prompts)

    def tokens(self) -> Iterator[NewToken]:
        for first in range(0, len(self._prompts), self._engine.max_batch):
            members = range(len(self._prompts))[first : first + self._engine.max_batch]
            yield from self._batch(list(members))

    def _batch(self, members: list[int]) -> Iterator[NewToken]:
        prompts = [self._prompts[i] for i in members]
        options = [self._options[i] for i in members]
        slots = max(len(p) + o.max_new_tokens for p, o in zip(prompts, options, strict=True))
        with self._engine.session(len(members), slots) as session:
            session.set_options(options, self._logprobs)
            started = time.perf_counter()
            session.begin(prompts)
            tokens, logprobs = _Outbox(session, self._logprobs).read()
            decoding = time.perf_counter()
            self.timing.prefill_s += decoding - started
            self.timing.prompt_tokens += sum(map(len, prompts))
            yield from self._hand_out(members, tokens, logprobs)
            before = self.timing.decode_s
            for tokens, logprobs in self._steps(session, members):
                self.timing.steps += 1
                self.timing.decode_s = before + time.perf_counter() - decoding
                yield from self._hand_out(members, tokens, logprobs)

    def _steps(
        self, session: Session, members: list[int]
    ) -> Iterator[tuple[list[int], list[float] | None]]:
        """Decode until every text has ended.

        On a GPU the next step runs while the caller looks at the tokens of this one.
        """
        ahead = 2 if session.token_b.is_cuda else 1
        left = max(self._options[i].max_new_tokens for i in members) - 1
        waiting: deque[_Outbox] = deque()
        while not self.ended.issuperset(members):
            while left > 0 and len(waiting) < ahead:
                session.step()
                waiting.append(_Outbox(session, self._logprobs))
                left -= 1
            yield waiting.popleft().read()

    def _hand_out(
        self, members: list[int], tokens: list[int], logprobs: list[float] | None
    ) -> Iterator[NewToken]:
        for row, index in enumerate(members):
            if index in self.ended:
                continue
            token, options = tokens[row], self._options[index]
            self._made[index] += 1
            self.timing.new_tokens += 1
            reason: Reason | None = None
            if token in options.stop_ids or token in self._engine.stop_ids:
                reason = "stop"
            elif self._made[index] == options.max_new_tokens:
                reason = "length"
            if reason is not None:
                self.ended.add(index)
            yield NewToken(index, token, None if logprobs is None else logprobs[row], reason)


class _Outbox:
    """The tokens of one step on their way to the host."""

    def __init__(self, session: Session, logprobs: bool):
        sources = [session.token_b, *([session.logprob_b] if logprobs else [])]
        self._event: torch.cuda.Event | None = None
        if not session.token_b.is_cuda:
            self._copies = [x.clone() for x in sources]
            return
        self._copies = [torch.empty_like(x, device="cpu", pin_memory=True) for x in sources]
        for copy, x in zip(self._copies, sources, strict=True):
            copy.copy_(x, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def read(self) -> tuple[list[int], list[float] | None]:
        """Wait for them."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies[0].tolist(), (
            self._copies[1].tolist() if len(self._copies) > 1 else None
        )
