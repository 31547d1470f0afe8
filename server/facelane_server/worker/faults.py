"""What an error ends: an item, a job, or the worker.

A broken picture ends its item; an unforeseen error its job; running out of device memory
its job (retryable), and the worker when it repeats; a sticky device error the worker at
once, because its context is lost. Pure: the loop does what is said here.
"""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from facelane_server.domain import FacelaneError, Reason
from facelane_server.ipc.messages import Fatal, InferFailed
from facelane_server.worker import exit_codes
from facelane_server.worker.journal import brief, log_event, log_exception

_OOM_LIMIT: Final = 3
_OOM_WINDOW_S: Final = 60.0
_ERROR_LIMIT: Final = 3
"""Jobs in a row that end in an unforeseen error; then the process is not to be trusted."""


class Fault(enum.Enum):
    """What an exception during inference means for the worker."""

    OUT_OF_MEMORY = "out_of_memory"
    """The job may be retried; the cache was emptied or should be."""
    POISONED = "poisoned"
    """The CUDA context is lost: every further call fails. The process must end."""
    ORDINARY = "ordinary"
    """A bug or bad input; the context is sound."""


# A sticky error corrupts the context. CUDA's own strings, lower case, as they appear
# in the messages of torch, cuBLAS, cuDNN and ONNX Runtime.
_STICKY: Final = (
    "illegal memory access",
    "illegal address",
    "misaligned address",
    "illegal instruction",
    "invalid program counter",
    "device-side assert",
    "hardware stack error",
    "launch failure",
    "launch failed",
    "launch timed out",
    "uncorrectable",
    "ecc error",
    "nvlink",
    "gpu is lost",
    "device unavailable",
    "contained",  # "Uncontained ECC error", "contained memory error"
    "context is destroyed",
    "mps server",
    "mps client",
    "execution_failed",
    "internal_error",
    "unknown error",
)
_MEMORY: Final = ("out of memory", "alloc_failed", "failed to allocate")
# The host's: of the kernel, torch, OpenCV and C++.
_HOST_MEMORY: Final = (
    "cannot allocate memory",
    "can't allocate memory",
    "insufficient memory",
    "bad_alloc",
    "can't start new thread",
)
_CUDA: Final = ("cuda", "cublas", "cudnn", "nvrtc", "nvml")


def classify(error: BaseException) -> Fault:
    """What ``error``, or an error that it was raised from, means for the worker."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, MemoryError) or type(current).__name__ == "OutOfMemoryError":
            return Fault.OUT_OF_MEMORY
        text = str(current).lower()
        if any(words in text for words in _HOST_MEMORY):
            return Fault.OUT_OF_MEMORY
        cuda = type(current).__name__ == "AcceleratorError" or any(word in text for word in _CUDA)
        if cuda and any(word in text for word in _MEMORY):
            return Fault.OUT_OF_MEMORY
        if cuda and any(word in text for word in _STICKY):
            return Fault.POISONED
        current = current.__cause__ or current.__context__
    return Fault.ORDINARY


class Quit(Exception):  # noqa: N818 - ends the loop, is no error by itself
    """Leave the loop with this exit code; ``fatal`` goes to the server first. ``at_once``:
    without cleaning up, which would touch a lost context."""

    def __init__(self, code: int, fatal: Fatal | None = None, *, at_once: bool = False) -> None:
        super().__init__(code)
        self.code = code
        self.fatal = fatal
        self.at_once = at_once


_ENDS: Final = {
    Fault.POISONED: (exit_codes.DEVICE_POISONED, "DEVICE_POISONED"),
    Fault.OUT_OF_MEMORY: (exit_codes.OUT_OF_MEMORY, "OUT_OF_MEMORY"),
}


def ending(
    error: BaseException,
    message: str = "",
    otherwise: tuple[int, str] = (exit_codes.INTERNAL, "INTERNAL"),
) -> Quit:
    """How a worker ends over ``error``, outside of any job; logged but for a lost device, with its
    traceback where nobody could foresee it."""
    fault = classify(error)
    code, reason = _ENDS.get(fault, otherwise)
    if fault is Fault.OUT_OF_MEMORY:
        log_event("worker has no memory left", level="error", error=type(error).__name__)
        return Quit(code, Fatal(reason, message or type(error).__name__))
    if fault is not Fault.POISONED:
        log_exception("worker cannot go on", error)
    return Quit(code, Fatal(reason, message or brief(error)))


class JobFaults:
    """Counts what goes wrong in jobs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ooms: deque[float] = deque(maxlen=_OOM_LIMIT)
        self._errors = 0

    def succeeded(self) -> None:
        self._errors = 0

    def failed(self, job_id: int, error: Exception) -> tuple[InferFailed | None, Quit | None]:
        """The answer to the job, if there is to be one, and how the worker ends, if it does."""
        fault = classify(error)
        if fault is Fault.POISONED:
            # Every call on this context fails from now on, cleaning up included.
            code, reason = _ENDS[fault]
            return None, Quit(code, Fatal(reason, brief(error)), at_once=True)
        if fault is Fault.OUT_OF_MEMORY:
            return self._out_of_memory(job_id)
        if isinstance(error, FacelaneError):
            return InferFailed(job_id, error.reason, error.message, error.retryable), None
        log_exception("job failed", error)
        self._errors += 1
        answer = InferFailed(
            job_id,
            Reason.INTERNAL,
            f"the model raised {type(error).__name__}; the server's log has the traceback",
        )
        if self._errors < _ERROR_LIMIT:
            return answer, None
        return answer, Quit(
            exit_codes.INTERNAL, Fatal("INTERNAL", f"{self._errors} jobs failed in a row")
        )

    def _out_of_memory(self, job_id: int) -> tuple[InferFailed, Quit | None]:
        answer = InferFailed(
            job_id,
            Reason.OUT_OF_MEMORY,
            "the device ran out of memory; lower batch_max or max_side, or give the pool more "
            "memory_mib",
            retryable=True,
        )
        now = self._clock()
        self._ooms.append(now)
        if len(self._ooms) < _OOM_LIMIT or now - self._ooms[0] > _OOM_WINDOW_S:
            return answer, None
        code, reason = _ENDS[Fault.OUT_OF_MEMORY]
        return answer, Quit(code, Fatal(reason, f"{_OOM_LIMIT} times in {_OOM_WINDOW_S:.0f} s"))
