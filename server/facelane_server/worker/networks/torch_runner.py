"""Networks run by torch: at once on a CPU, by CUDA graphs on a GPU.

On a GPU every model has its own stream. A batch is staged in pinned memory, copied,
replayed as the graph of the next larger bucket and copied back, all queued without
waiting; an event at its end is the one thing that is ever waited for. There are two
sets of staging buffers, so the next batch can be staged while one computes. Large
batches are copied on a second stream, beside the one before that computes; for small
ones that hop would cost more than it hides.

Graphs run in half precision and channels-last. Warm-up compares each with eager full
precision on the same device; where one disagrees all are captured again in full precision,
with a warning, and where those disagree as well the model runs eagerly.

A detector has graphs for several canvases, of the shapes that cameras have: a square one is
44 % padding under a picture of 16:9.

cuDNN's search for the fastest algorithm of every convolution takes seconds a batch size, most
of a worker's start. It is done for the two that matter: one picture, which somebody waits
for, and the full batch, which decides the throughput, both on the smallest canvas, which most
cameras fill. The others, and what is run only to compare with, take what cuDNN's heuristics
say.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from facelane_server.models.api import F32, U8, DeviceOptions
from facelane_server.models.canary import batch_buckets
from facelane_server.worker.device import settle_memory
from facelane_server.worker.journal import log_event
from facelane_server.worker.networks.architectures.folding import plain_affine
from facelane_server.worker.networks.architectures.packing import Packed, can_pack
from facelane_server.worker.networks.runner import Computed, Runner, Ticket
from facelane_server.worker.networks.serving import Served, check_pictures

if TYPE_CHECKING:
    from facelane_server.worker.decoding.device_pictures import DevicePictures
    from facelane_server.worker.networks.runner import Fill

STAGES: Final = 2
"""Batches under way at a time: one computes, the next is staged."""
OVERLAP_BYTES: Final = 512 * 1024
"""Inputs from here on are copied on a stream of their own: 10 microseconds of PCIe."""
AGREEMENT: Final = 0.999
_PACKED_AGREEMENT: Final = 0.99999
"""A score that is off by 0.0002; what packing does is a hundredth of that."""
_Way = tuple[tuple[int, int], ...]
"""Heights and widths of the inputs of a batch."""
_warm_up_lock = threading.Lock()
_CAPTURE_ROUNDS: Final = 3
"""Eager rounds before a capture: libraries choose their algorithms in the first ones."""


class CpuRunner(Runner):
    """Runs a batch when it is launched. Warm-up packs the network's convolutions; where that
    changes its answers, or cannot be, the network stays as it is."""

    def __init__(
        self,
        served: Served,
        *,
        warm_shapes: Sequence[tuple[int, int]],
        pictures: DevicePictures | None = None,
        canvases: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.pictures = pictures
        self.canvases = tuple(canvases)
        self._served = served.float()
        self._warm_shapes = list(warm_shapes)
        self._staged: tuple[U8, ...] = ()

    def stage(self, count: int, shapes: Sequence[tuple[int, int]]) -> tuple[U8, ...]:
        self._staged = tuple(np.empty((count, *shape, 3), np.uint8) for shape in shapes)
        return self._staged

    def launch(self) -> Ticket:
        with torch.inference_mode():
            return self._computed([torch.from_numpy(array) for array in self._staged])

    def run(self, count: int, shape: tuple[int, int], fill: Fill) -> Ticket:
        with torch.inference_mode():
            canvases = torch.empty((count, *shape, 3), dtype=torch.uint8)
            fill(canvases)
            return self._computed([canvases])

    def _computed(self, inputs: list[Tensor]) -> Ticket:
        return Computed(self._served.conclude(self._served(*inputs)).numpy())

    def warm_up(self) -> None:
        if can_pack():
            self._pack()
        for _ in range(2):
            for array in self.stage(1, self._warm_shapes):
                array[...] = 0
            self.launch()

    def _pack(self) -> None:
        served, pictures = self._served, check_pictures(self._warm_shapes, 1)
        with torch.inference_mode():
            reference = served(*pictures)
            packed = Packed(served.network, *(served.prepare(each) for each in pictures))
            agreement = served.agreement(reference, served(*pictures))
        if not agreement >= _PACKED_AGREEMENT:  # NaN is no agreement either
            packed.undo()
            log_event(
                "packed convolutions disagree with plain ones",
                level="warning",
                agreement=round(agreement, 7),
                needed=_PACKED_AGREEMENT,
            )


class _Stage:
    """One set of pinned buffers, and the batch that uses it.

    ``shapes``: of the inputs that come from the host. ``output``: values of the largest batch's.
    ``landed``: where inputs are copied to on the device while the batch before computes
    on the graphs' own; empty when the largest batch is small.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        batch_max: int,
        output: int,
        device: torch.device,
    ) -> None:
        self.inputs = [
            torch.zeros((batch_max, *shape, 3), dtype=torch.uint8, pin_memory=True)
            for shape in shapes
        ]
        self.output = torch.zeros(output, dtype=torch.float32, pin_memory=True)
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
    def __init__(self, stage: _Stage, shape: tuple[int, ...]) -> None:
        self._stage: _Stage | None = stage
        self._shape = shape
        self._output: F32 | None = None

    @property
    def is_ready(self) -> bool:
        return self._stage is None or bool(self._stage.done.query())  # type: ignore[no-untyped-call]

    def wait(self) -> F32:
        if self._stage is not None:
            self._stage.done.synchronize()
            values = self._stage.output[: math.prod(self._shape)]
            self._output = values.view(self._shape).numpy().copy()
            self._stage = None
        assert self._output is not None
        return self._output


class CudaRunner(Runner):
    """Runs batches of its own shapes on its own stream of one device.

    ``shapes``: height and width of each input; the network must take them all. ``canvases``
    instead: those of one input that is written on the device (``run``), the largest first. A
    runner is warmed up and used by one thread, beside others in the process. Before it is warmed
    up it computes eagerly in full precision.
    """

    def __init__(
        self,
        served: Served,
        *,
        shapes: Sequence[tuple[int, int]] = (),
        batch_max: int,
        options: DeviceOptions,
        canvases: Sequence[tuple[int, int]] = (),
        pictures: DevicePictures | None = None,
    ) -> None:
        self.canvases = tuple(canvases)
        self.pictures = pictures
        self._options = options
        self._device = torch.device(options.device)
        self._shapes = list(shapes)
        self._ways: list[_Way] = [(c,) for c in self.canvases] or [tuple(shapes)]
        """Shapes of all inputs of a batch, each way with graphs of its own."""
        self._batch_max = batch_max
        self._buckets = {way: batch_buckets(batch_max) for way in self._ways}
        # Most of a start goes to what cuDNN prepares for every shape. Few pictures need the
        # largest canvas; they do with every second size.
        if len(self._ways) > 1:
            self._buckets[self._ways[0]] = _every_second(batch_buckets(batch_max))
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
                torch.zeros(batch_max * height * width * 3, dtype=torch.uint8, device=self._device)
                for height, width in self._ways[0]
            ]
            """Of the largest batch; every way takes as much of them as it needs."""
        self._graphs: dict[tuple[_Way, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._stages: list[_Stage] = []
        self._next = 0
        self._count = 0

    @property
    def captured(self) -> tuple[int, ...]:
        """The batch buckets that run as graphs; empty when the model runs eagerly."""
        return tuple(sorted({count for _, count in self._graphs}))

    @property
    def is_half(self) -> bool:
        """Whether it runs in half precision."""
        return self._served.prepare.mean.dtype == torch.float16

    def warm_up(self) -> None:
        # One at a time in a process: a capture forbids other captures to synchronise.
        with (
            _warm_up_lock,
            torch.cuda.device(self._device),
            torch.cuda.stream(self._stream),
            torch.inference_mode(),
        ):
            references = {way: self._reference(way) for way in self._ways}
            exact = {k: v.to("cpu", copy=True) for k, v in self._served.state_dict().items()}
            if not (self._half and self._in_half(references)):
                self._served.float()
                self._served.load_state_dict(exact)
                if self._options.graphs:
                    self._captures(references, "CUDA graph in full precision")
            del exact
            self._stream.synchronize()
            torch.cuda.empty_cache()
        # One whole round over every bucket, so that no first time is left.
        for way in self._ways:
            for count in self._buckets[way]:
                if self.canvases:
                    self.run(count, way[0], lambda _: None).wait()
                else:
                    self.stage(count, self._shapes)
                    self.launch().wait()
        settle_memory(self._options)

    def stage(self, count: int, shapes: Sequence[tuple[int, int]]) -> tuple[U8, ...]:
        if (
            self.canvases
            or list(map(tuple, shapes)) != self._shapes
            or not 1 <= count <= self._batch_max
        ):
            raise ValueError("this runner takes batches of its own shapes and size only")
        self._count = count
        return tuple(buffer[:count].numpy() for buffer in self._claimed().inputs)

    def launch(self) -> Ticket:
        stage, count = self._stages[self._next], self._count
        with (
            torch.cuda.device(self._device),
            torch.cuda.stream(self._stream),
            torch.inference_mode(),
        ):
            sources = stage.inputs
            if stage.landed and count * self._item_bytes >= OVERLAP_BYTES:
                # The stage is free, so nothing reads ``landed`` any more.
                with torch.cuda.stream(self._copies):
                    for target, source in zip(stage.landed, stage.inputs, strict=True):
                        target[:count].copy_(source[:count], non_blocking=True)
                    stage.copied.record(self._copies)
                self._stream.wait_event(stage.copied)
                sources = stage.landed
            way = self._ways[0]
            for target, source in zip(self._input(way, count), sources, strict=True):
                target.copy_(source[:count], non_blocking=True)
            return self._computed(stage, way, count)

    def run(self, count: int, shape: tuple[int, int], fill: Fill) -> Ticket:
        if shape not in self.canvases or not 1 <= count <= self._batch_max:
            raise ValueError("this runner takes batches of its own canvases and size only")
        stage = self._claimed()
        with (
            torch.cuda.device(self._device),
            torch.cuda.stream(self._stream),
            torch.inference_mode(),
        ):
            fill(self._input((shape,), count)[0])
            return self._computed(stage, (shape,), count)

    def close(self) -> None:
        self._copies.synchronize()
        self._stream.synchronize()
        self._graphs.clear()
        self._stages.clear()

    def _claimed(self) -> _Stage:
        if not self._stages:
            with (
                torch.cuda.device(self._device),
                torch.cuda.stream(self._stream),
                torch.inference_mode(),
            ):
                output = max(self._concluded(way, self._batch_max).numel() for way in self._ways)
                self._stages = [
                    _Stage(self._shapes, self._batch_max, output, self._device)
                    for _ in range(STAGES)
                ]
        stage = self._stages[self._next]
        stage.claim()
        return stage

    def _input(self, way: _Way, count: int) -> list[Tensor]:
        """The network's inputs [count, height, width, 3] on the device."""
        return [
            flat[: count * height * width * 3].view(count, height, width, 3)
            for flat, (height, width) in zip(self._inputs, way, strict=True)
        ]

    def _computed(self, stage: _Stage, way: _Way, count: int) -> Ticket:
        """Queue the network, for the inputs that are queued, and the way back of its output."""
        self._next = (self._next + 1) % STAGES
        if self._graphs:
            bucket = next(size for size in self._buckets[way] if size >= count)
            graph, output = self._graphs[way, bucket]
            graph.replay()
        else:
            output = self._concluded(way, count)
        output = output[:count]
        room = stage.output[: output.numel()].view(output.shape)
        room.copy_(output, non_blocking=True)
        stage.done.record(self._stream)
        stage.ticket = _Launched(stage, tuple(output.shape))
        return stage.ticket

    def _eager(self, way: _Way, count: int) -> Tensor:
        output: Tensor = self._served(*self._input(way, count))
        return output

    def _concluded(self, way: _Way, count: int) -> Tensor:
        return self._served.conclude(self._eager(way, count))

    def _reference(self, way: _Way) -> Tensor:
        """What full precision answers to the check pictures, on the host."""
        self._fill(way)
        return self._eager(way, self._batch_max).cpu()

    def _fill(self, way: _Way) -> None:
        pictures = check_pictures(way, self._batch_max)
        for target, source in zip(self._input(way, self._batch_max), pictures, strict=True):
            target.copy_(source)

    def _in_half(self, references: dict[_Way, Tensor]) -> bool:
        """Whether the network is in half precision now, and right."""
        self._served.half()
        torch.cuda.empty_cache()
        for way, reference in references.items():
            self._fill(way)
            output = self._eager(way, self._batch_max)
            if not self._agrees(reference, output, "half precision"):
                return False
        return not self._options.graphs or self._captures(references, "CUDA graph")

    def _captures(self, references: dict[_Way, Tensor], what: str) -> bool:
        """Whether graphs for all buckets exist now, and are right."""
        pool = torch.cuda.graph_pool_handle()
        for way, reference in references.items():
            self._fill(way)
            # The largest first: the others then fit into its memory.
            for count in reversed(self._buckets[way]):
                graph = torch.cuda.CUDAGraph()
                wanted = way == self._ways[-1] and count in (1, self._batch_max)
                with _algorithm_search(wanted):
                    for _ in range(_CAPTURE_ROUNDS):
                        self._concluded(way, count)
                    self._stream.synchronize()
                    # Other threads of this process may use the device meanwhile.
                    with torch.cuda.graph(
                        graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
                    ):
                        raw = self._eager(way, count)
                        output = self._served.conclude(raw)
                self._graphs[way, count] = (graph, output)
                graph.replay()
                if not self._agrees(reference[:count], raw, what):
                    self._graphs.clear()
                    return False
        return True

    def _agrees(self, reference: Tensor, output: Tensor, what: str) -> bool:
        host = output.cpu()
        value = self._served.agreement(reference, host) if host.isfinite().all() else 0.0
        if value >= AGREEMENT:
            return True
        log_event(
            "model disagrees with full precision",
            level="warning",
            what=what,
            agreement=round(value, 5),
            needed=AGREEMENT,
        )
        return False


def _every_second(sizes: list[int]) -> list[int]:
    """From the last on, and the first."""
    return sorted({sizes[0], *sizes[::-2]})


@contextlib.contextmanager
def _algorithm_search(wanted: bool) -> Iterator[None]:
    """Whether cuDNN tries its algorithms out; for the process, so under ``_warm_up_lock``."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
