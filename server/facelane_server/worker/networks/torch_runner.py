"""Networks run by torch: at once on a CPU, by CUDA graphs on a GPU.

On a GPU every model has its own stream. A batch is staged in pinned memory, copied,
replayed as the graph of the next larger bucket and copied back, all queued without
waiting; an event at its end is the one thing that is ever waited for. There are two
sets of staging buffers, so the next batch can be staged while one computes. Large
batches are copied on a second stream, beside the one before that computes; for small
ones that hop would cost more than it hides.

Graphs run in half precision and channels-last. Warm-up compares each with eager full
precision on the same device; one that disagrees is refused, and the model runs eagerly
in full precision, with a warning.

cuDNN's search for the fastest algorithm of every convolution takes a second or more a
batch size, most of a worker's start. It is done for the two that matter: one picture,
which somebody waits for, and the full batch, which decides the throughput. The others,
and what is run only to compare with, take what cuDNN's heuristics say.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from facelane_server.models.api import F32, U8, DeviceOptions
from facelane_server.worker.device import settle_memory
from facelane_server.worker.journal import log_event
from facelane_server.worker.networks.architectures.folding import plain_affine
from facelane_server.worker.networks.runner import Computed, Runner, Ticket, batch_buckets
from facelane_server.worker.networks.serving import Served, check_pictures

if TYPE_CHECKING:
    from facelane_server.worker.decoding.device_pictures import DevicePictures
    from facelane_server.worker.networks.runner import Placed

STAGES: Final = 2
"""Batches under way at a time: one computes, the next is staged."""
OVERLAP_BYTES: Final = 512 * 1024
"""Inputs from here on are copied on a stream of their own: 10 microseconds of PCIe."""
AGREEMENT: Final = 0.999
_warm_up_lock = threading.Lock()
_CAPTURE_ROUNDS: Final = 3
"""Eager rounds before a capture: libraries choose their algorithms in the first ones."""


class CpuRunner(Runner):
    """Runs a batch when it is launched."""

    def __init__(
        self,
        served: Served,
        *,
        warm_shapes: Sequence[tuple[int, int]],
        pictures: DevicePictures | None = None,
    ) -> None:
        self.pictures = pictures
        self._served = served.float()
        self._warm_shapes = list(warm_shapes)
        self._staged: tuple[U8, ...] = ()

    def stage(self, count: int, shapes: Sequence[tuple[int, int]]) -> tuple[U8, ...]:
        self._staged = tuple(np.empty((count, *shape, 3), np.uint8) for shape in shapes)
        return self._staged

    def launch(self, placed: Placed = ()) -> Ticket:
        with torch.inference_mode():
            inputs = [torch.from_numpy(array) for array in self._staged]
            for row, picture in placed:
                _put(inputs[0][row], picture)
            output = self._served.conclude(self._served(*inputs))
        return Computed(output.numpy())

    def warm_up(self) -> None:
        for _ in range(2):
            for array in self.stage(1, self._warm_shapes):
                array[...] = 0
            self.launch()


class _Stage:
    """One set of pinned buffers, and the batch that uses it.

    ``landed``: where inputs are copied to on the device while the batch before computes
    on the graphs' own; empty when the largest batch is small.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        batch_max: int,
        output: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self.inputs = [
            torch.zeros((batch_max, *shape, 3), dtype=torch.uint8, pin_memory=True)
            for shape in shapes
        ]
        self.output = torch.zeros((batch_max, *output), dtype=torch.float32, pin_memory=True)
        large = sum(buffer.nbytes for buffer in self.inputs) >= OVERLAP_BYTES
        self.landed = [torch.zeros_like(b, device=device) for b in self.inputs] if large else []
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.ticket: _Launched | None = None

    def claim(self) -> None:
        """Make the buffers free: a batch that still uses them is waited for."""
        if self.ticket is not None:
            self.ticket.wait()
            self.ticket = None


class _Launched(Ticket):
    def __init__(self, stage: _Stage, count: int) -> None:
        self._stage: _Stage | None = stage
        self._count = count
        self._output: F32 | None = None

    def wait(self) -> F32:
        if self._stage is not None:
            self._stage.done.synchronize()
            self._output = self._stage.output[: self._count].numpy().copy()
            self._stage = None
        assert self._output is not None
        return self._output


class CudaRunner(Runner):
    """Runs batches of one shape on its own stream of one device. What is staged stays in its
    buffer until it is overwritten.

    ``shapes``: height and width of each input; the network must take them all. A runner
    is warmed up and used by one thread, beside others in the process.
    """

    def __init__(
        self,
        served: Served,
        *,
        shapes: Sequence[tuple[int, int]],
        batch_max: int,
        options: DeviceOptions,
        fixed_side: int = 0,
        pictures: DevicePictures | None = None,
    ) -> None:
        self.fixed_side = fixed_side
        self.pictures = pictures
        self.keeps_content = True
        self._options = options
        self._device = torch.device(options.device)
        self._shapes = list(shapes)
        self._batch_max = batch_max
        buckets = batch_buckets(batch_max)
        self._bucket = {n: min(b for b in buckets if b >= n) for n in range(1, batch_max + 1)}
        self._half = options.precision != "fp32"
        self._stream = torch.cuda.Stream(  # type: ignore[no-untyped-call]
            self._device, priority=options.stream_priority
        )
        self._copies = torch.cuda.Stream(  # type: ignore[no-untyped-call]
            self._device, priority=options.stream_priority
        )
        self._item_bytes = sum(height * width * 3 for height, width in shapes)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._served = plain_affine(served.float()).to(self._device)
            self._inputs = [
                torch.zeros((batch_max, *shape, 3), dtype=torch.uint8, device=self._device)
                for shape in shapes
            ]
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._stages: list[_Stage] = []
        self._next = 0
        self._count = 0

    @property
    def captured(self) -> tuple[int, ...]:
        """The batch buckets that run as graphs; empty when the model runs eagerly."""
        return tuple(sorted(self._graphs))

    def warm_up(self) -> None:
        # One at a time in a process: a capture forbids other captures to synchronise.
        with (
            _warm_up_lock,
            torch.cuda.device(self._device),
            torch.cuda.stream(self._stream),
            torch.inference_mode(),
        ):
            self._fill_inputs()
            reference = self._eager(self._batch_max).cpu()
            exact = {k: v.to("cpu", copy=True) for k, v in self._served.state_dict().items()}
            if self._half:
                self._served.half()
                torch.cuda.empty_cache()
            if not self._agrees(reference, self._eager(self._batch_max), "half precision"):
                self._back_to_exact(exact)
            elif self._options.graphs:
                self._capture(reference, exact)
            del exact
            output = tuple(self._concluded(1).shape[1:])
            self._stages = [
                _Stage(self._shapes, self._batch_max, output, self._device) for _ in range(STAGES)
            ]
            self._stream.synchronize()
            torch.cuda.empty_cache()
        # One whole round over every bucket, so that no first time is left.
        for count in batch_buckets(self._batch_max):
            self.stage(count, self._shapes)
            self.launch().wait()
        settle_memory(self._options)

    def stage(self, count: int, shapes: Sequence[tuple[int, int]]) -> tuple[U8, ...]:
        if list(map(tuple, shapes)) != self._shapes or not 1 <= count <= self._batch_max:
            raise ValueError("this runner takes batches of its own shapes and size only")
        stage = self._stages[self._next]
        stage.claim()
        self._count = count
        return tuple(buffer[:count].numpy() for buffer in stage.inputs)

    def launch(self, placed: Placed = ()) -> Ticket:
        stage, count = self._stages[self._next], self._count
        self._next = (self._next + 1) % STAGES
        with (
            torch.cuda.device(self._device),
            torch.cuda.stream(self._stream),
            torch.inference_mode(),
        ):
            sources = stage.inputs
            staged = count if len(placed) < count else 0
            if staged and stage.landed and count * self._item_bytes >= OVERLAP_BYTES:
                # The stage is free, so nothing reads ``landed`` any more.
                with torch.cuda.stream(self._copies):
                    for target, source in zip(stage.landed, stage.inputs, strict=True):
                        target[:count].copy_(source[:count], non_blocking=True)
                    stage.copied.record(self._copies)
                self._stream.wait_event(stage.copied)
                sources = stage.landed
            for target, source in zip(self._inputs, sources, strict=True):
                target[:staged].copy_(source[:staged], non_blocking=True)
            if placed:
                assert self.pictures is not None
                self._stream.wait_stream(self.pictures.stream)
                for row, picture in placed:
                    # It may be dropped before this has run.
                    picture.record_stream(self._stream)
                    _put(self._inputs[0][row], picture)
            if self._graphs:
                graph, output = self._graphs[self._bucket[count]]
                graph.replay()
            else:
                output = self._concluded(count)
            stage.output[:count].copy_(output[:count], non_blocking=True)
            stage.done.record(self._stream)
        stage.ticket = _Launched(stage, count)
        return stage.ticket

    def close(self) -> None:
        self._copies.synchronize()
        self._stream.synchronize()
        self._graphs.clear()
        self._stages.clear()

    def _eager(self, count: int) -> Tensor:
        output: Tensor = self._served(*(buffer[:count] for buffer in self._inputs))
        return output

    def _concluded(self, count: int) -> Tensor:
        return self._served.conclude(self._eager(count))

    def _fill_inputs(self) -> None:
        pictures = check_pictures(self._shapes, self._batch_max)
        for target, source in zip(self._inputs, pictures, strict=True):
            target.copy_(source)

    def _capture(self, reference: Tensor, exact: dict[str, Tensor]) -> None:
        pool = torch.cuda.graph_pool_handle()
        # The largest first: the others then fit into its memory.
        for count in reversed(batch_buckets(self._batch_max)):
            graph = torch.cuda.CUDAGraph()
            with _algorithm_search(count in (1, self._batch_max)):
                for _ in range(_CAPTURE_ROUNDS):
                    self._concluded(count)
                self._stream.synchronize()
                # Other threads of this process may use the device meanwhile.
                with torch.cuda.graph(
                    graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    raw = self._eager(count)
                    output = self._served.conclude(raw)
            self._graphs[count] = (graph, output)
            graph.replay()
            if not self._agrees(reference[:count], raw, "CUDA graph"):
                self._graphs.clear()
                self._back_to_exact(exact)
                return

    def _agrees(self, reference: Tensor, output: Tensor, what: str) -> bool:
        host = output.cpu()
        value = self._served.agreement(reference, host) if host.isfinite().all() else 0.0
        if value >= AGREEMENT:
            return True
        log_event(
            "model disagrees with full precision and runs eagerly in it",
            level="warning",
            what=what,
            agreement=round(value, 5),
            needed=AGREEMENT,
        )
        return False

    def _back_to_exact(self, exact: dict[str, Tensor]) -> None:
        self._served.float()
        self._served.load_state_dict(exact)


def _put(canvas: Tensor, picture: Tensor) -> None:
    """A picture at the top left of a canvas [H, W, 3], the rest black."""
    height, width = picture.shape[:2]
    canvas.zero_()
    canvas[:height, :width].copy_(picture, non_blocking=True)


@contextlib.contextmanager
def _algorithm_search(wanted: bool) -> Iterator[None]:
    """Whether cuDNN tries its algorithms out; for the process, so under ``_warm_up_lock``."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
