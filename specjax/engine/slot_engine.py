"""A batch of slots on a device: every executable there will ever be is made at the start."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from specjax import verify
from specjax.decoding import sampling as sample
from specjax.decoding import target as target_pass
from specjax.drafters.base import Chunk, Drafter
from specjax.engine import rows as requests
from specjax.engine import slots
from specjax.engine.engine import cache_slots
from specjax.engine.program import Bound, CommandBuffers
from specjax.engine.slots import Piece, Prompt
from specjax.engine.window import LogProbs
from specjax.errors import CapacityError, ConfigError
from specjax.models.llama import Llama

ACCEPTANCES = ("lossless", "typical")


@dataclass(frozen=True, kw_only=True)
class SlotOptions:
    """Sizes of the programs.

    Attributes:
        num_slots: requests that run together.
        max_model_len: most tokens of one text, prompt and output.
        widths: prompt tokens per `take_in`, ascending; each is an executable.
        max_steps: most steps per piece.
        acceptance: "lossless", or "typical" for the rows that sample.
        max_logprobs: log-probabilities per token that requests may ask for; None offers none at all.
        prompt_logprobs: offer those of prompts; another executable per width.
        max_stop_ids, max_biased: most stop ids and biased tokens of one request.
    """

    num_slots: int
    max_model_len: int
    widths: tuple[int, ...] = (32, 256)
    max_steps: int = 16
    acceptance: str = "lossless"
    max_logprobs: int | None = None
    prompt_logprobs: bool = False
    max_stop_ids: int = 32
    max_biased: int = 300


@dataclass(frozen=True, kw_only=True)
class SlotRequest:
    """One request as the programs take it.

    Attributes:
        input_ids: its prompt.
        max_new_tokens: its limit.
        seed, stream: of its random numbers.
        row: keyword arguments of `rows.row`.
    """

    input_ids: Sequence[int]
    max_new_tokens: int
    seed: int = 0
    stream: int = 0
    row: dict[str, Any]


class SlotEngine:
    """Owns the state of the slots; not safe for threads.

    Args:
        target: the model in its run-time form.
        drafter: see `specjax.drafters.base.Drafter`.
        options: sizes.
        command_buffers: see `engine.program.gpu_options`.
    Raises:
        ConfigError, CapacityError: options that do not fit the model.
    """

    def __init__(
        self,
        target: Llama,
        drafter: Drafter,
        options: SlotOptions,
        command_buffers: CommandBuffers = "loop",
    ):
        _check(target, options)
        self.options, self.num_compilations = options, 0
        vocab = target.config.vocab_size
        self._row_sizes = vocab, options.max_stop_ids, options.max_biased
        room = drafter.max_depth + 1 + target_pass.padded_nodes(drafter.scratch)
        self.capacity = cache_slots(options.max_model_len + max(room, options.widths[-1]))
        self.path_rows = drafter.max_depth + 1

        def bound(function, fixed=(), **names):
            return Bound(function, fixed, self._count, command_buffers=command_buffers, **names)

        model = (target, drafter)
        self._take_in = bound(slots.take_in, model, donate=("state",), static=("score",))
        self._decode = bound(slots.decode, model, donate=("state",), static=("acceptor", "greedy"))
        self._copy = bound(slots.copy_slot, donate=("state",))
        self._release = bound(slots.release, donate=("state",))
        sizes = ("batch", "capacity", "max_steps", "num_stop_ids", "num_biased", "num_logprobs")
        self._init = bound(slots.init_state, model, static=sizes)
        self.state = self._init(
            batch=options.num_slots,
            capacity=self.capacity,
            max_steps=options.max_steps,
            num_stop_ids=options.max_stop_ids,
            num_biased=options.max_biased,
            num_logprobs=options.max_logprobs,
        )

    def _count(self):
        self.num_compilations += 1

    def warm_up(self) -> None:
        """Makes every executable: nothing compiles afterwards, whatever is asked."""
        for score in (False, True)[: 1 + self.options.prompt_logprobs]:
            for width in self.options.widths:
                request = SlotRequest(input_ids=[0] * width, max_new_tokens=2, row={})
                self.take_in(0, request, 0, width, begins=True, score=score)
        for greedy in (True, False):
            jax.block_until_ready(self.decode(1, greedy).num_tokens)
        self.copy(0, self.options.num_slots - 1)
        self.release(range(self.options.num_slots))

    def take_in(
        self,
        slot: int,
        request: SlotRequest,
        begin: int,
        width: int,
        *,
        begins: bool,
        score: bool = False,
    ) -> LogProbs | None:
        """Dispatches one chunk of a prompt, from token `begin` on; see `slots.take_in`."""
        length = len(request.input_ids)
        part = np.zeros((1, width + 1), np.int32)
        found = request.input_ids[begin : begin + width + 1]
        part[0, : len(found)] = found
        key = np.asarray(sample.request_keys(request.seed, [request.stream]))[0]
        row = requests.row(*self._row_sizes, **request.row)
        self.state, scores = self._take_in(
            state=self.state,
            slot=np.int32(slot),
            chunk=Chunk(
                tokens=part[:, :-1],
                next_tokens=part[:, 1:],
                start=np.asarray([begin], np.int32),
                valid=np.asarray([min(width, length - begin)], np.int32),
                features=None,
            ),
            prompt=Prompt(
                row=row,
                key=key,
                length=np.int32(length),
                limit=np.int32(request.max_new_tokens),
                begins=np.bool_(begins),
            ),
            score=score,
        )
        return scores

    def decode(self, steps: int, greedy: bool) -> Piece:
        """Dispatches up to `steps` steps; the piece is on its way to the host when this returns."""
        rule = "lossless" if greedy else self.options.acceptance
        self.state, piece = self._decode(
            state=self.state,
            max_steps=np.int32(min(steps, self.options.max_steps)),
            acceptor=verify.acceptor(rule, greedy),
            greedy=greedy,
        )
        for leaf in jax.tree.leaves(piece):
            leaf.copy_to_host_async()
        return piece

    def wait(self) -> None:
        """Waits until all that was dispatched is done."""
        jax.block_until_ready(self.state.lengths)

    def copy(self, source: int, to: int) -> None:
        """See `slots.copy_slot`."""
        self.state = self._copy(state=self.state, source=np.int32(source), to=np.int32(to))

    def release(self, which: Iterable[int]) -> None:
        """See `slots.release`."""
        mask = np.zeros(self.options.num_slots, bool)
        mask[list(which)] = True
        self.state = self._release(state=self.state, mask=mask)


def _check(target: Llama, options: SlotOptions) -> None:
    positions = target.config.max_position_embeddings
    if options.max_model_len > positions:
        raise CapacityError(
            f"max_model_len={options.max_model_len}: the model's max_position_embeddings is {positions}; lower it"
        )
    if options.acceptance not in ACCEPTANCES:
        raise ConfigError(f"acceptance={options.acceptance!r}: slots take {', '.join(ACCEPTANCES)}")
    for name in ("num_slots", "max_model_len", "max_steps"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name}={getattr(options, name)}: at least 1 is needed")
    if not options.widths or list(options.widths) != sorted(set(options.widths)):
        raise ConfigError(f"widths={options.widths}: must ascend, and be at least one")
    if options.max_logprobs is None and options.prompt_logprobs:
        raise ConfigError("prompt_logprobs=True needs max_logprobs; set it to 0 or more")
