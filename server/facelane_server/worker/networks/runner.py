"""What runs a network: host arrays in, one host array out, batches under way in between.

The three task models are written against this, so that they are the same over torch on
a CPU, CUDA graphs and ONNX Runtime.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from facelane_server.models.api import F32, U8

if TYPE_CHECKING:
    from torch import Tensor

    from facelane_server.worker.decoding.device_pictures import DevicePictures

    Fill = Callable[[Tensor], None]


class Ticket(ABC):
    """A launched batch."""

    @property
    def is_ready(self) -> bool:
        """Whether ``wait`` has nothing to wait for."""
        return True

    @abstractmethod
    def wait(self) -> F32:
        """The output [n, ...], float32 on the host. May be called again."""


class Computed(Ticket):
    """A batch that was computed when it was launched."""

    def __init__(self, output: F32) -> None:
        self._output = output

    def wait(self) -> F32:
        return self._output


class Runner(ABC):
    """Used by one thread: ``stage``, fill the arrays, ``launch``; and so on. Or ``run``.

    ``canvases``: heights and widths of the one input that it takes, the largest first (empty =
    any). ``pictures``: what brings pictures to the device that the runner runs on, to be
    put on canvases there by ``run``; None = it takes host arrays, by ``stage`` and ``launch``.
    """

    canvases: tuple[tuple[int, int], ...] = ()
    pictures: DevicePictures | None = None

    @abstractmethod
    def stage(self, count: int, shapes: Sequence[tuple[int, int]]) -> tuple[U8, ...]:
        """Arrays [count, height, width, 3], one for each input of the network, to be
        filled before ``launch``; their content is undefined."""

    @abstractmethod
    def launch(self) -> Ticket:
        """Run what was staged."""

    def run(self, count: int, shape: tuple[int, int], fill: Fill) -> Ticket:
        """A batch that is on the device already: ``fill`` queues on the current stream what
        writes the input, uint8 [count, height, width, 3]."""
        raise NotImplementedError("this runner takes host arrays")

    @abstractmethod
    def warm_up(self) -> None:
        """Make every later ``launch`` as fast as the next."""

    def close(self) -> None:  # noqa: B027 - optional
        """Free what is held outside of Python's own memory."""
