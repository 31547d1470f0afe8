"""Kernels of our own on a card: compiled when a worker starts, by NVRTC, which comes with torch: in
the process, without a compiler, a file or a program of its own, none of which a worker's sandbox
would let it have.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

POINTER: Final = ctypes.c_void_p
INT: Final = ctypes.c_int
LONG: Final = ctypes.c_longlong
FLOAT: Final = ctypes.c_float


class Kernels:
    """Of one device, whose context is current. Raises RuntimeError where they cannot be compiled or
    loaded, ImportError where the library for it is not installed."""

    def __init__(
        self,
        source: Path,
        arguments: Mapping[str, Sequence[Any]],
        device: torch.device,
        flags: Sequence[str] = (),
    ) -> None:
        """``arguments``: of each kernel, their types. ``flags``: for the compiler."""
        self._device = device
        self._arguments = {name: tuple(types) for name, types in arguments.items()}
        self._driver: Any = importlib.import_module("cuda.bindings.driver")
        image = _compiled(source, torch.cuda.get_device_capability(device), flags)
        self._module = self._told(self._driver.cuModuleLoadData(image))
        self._functions = {
            name: self._told(self._driver.cuModuleGetFunction(self._module, name.encode()))
            for name in arguments
        }

    def launch(self, name: str, blocks: tuple[int, int], threads: int, *arguments: Any) -> None:
        """On torch's current stream; a tensor stands for where it lies, None for nowhere."""
        values = tuple(
            argument.data_ptr() if isinstance(argument, Tensor) else argument or 0
            for argument in arguments
        )
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self._told(
            self._driver.cuLaunchKernel(
                self._functions[name], *blocks, 1, threads, 1, 1, 0, stream,
                (values, self._arguments[name]), 0,
            )
        )  # fmt: skip

    def _told(self, answer: tuple[Any, ...]) -> Any:
        """What a call of the driver gave. Raises RuntimeError, in the words of torch's own."""
        if int(answer[0]):
            said = self._driver.cuGetErrorString(answer[0])[1]
            raise RuntimeError(f"CUDA error: {(said or b'unknown').decode()}")
        return answer[1] if len(answer) > 1 else None


def _compiled(source: Path, capability: tuple[int, int], more: Sequence[str]) -> bytes:
    """The kernels for a device. Raises RuntimeError."""
    nvrtc: Any = importlib.import_module("cuda.bindings.nvrtc")

    def told(answer: tuple[Any, ...]) -> Any:
        if int(answer[0]):
            raise RuntimeError(f"NVRTC: {answer[0].name}")
        return answer[1] if len(answer) > 1 else None

    program = told(nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, [], []))
    major, minor = capability
    flags = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", *more]
    told(nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags]))
    image = bytes(told(nvrtc.nvrtcGetCUBINSize(program)))
    told(nvrtc.nvrtcGetCUBIN(program, image))
    return image
