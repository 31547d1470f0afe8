"""A small signature of each face, so that the tracker sees when the face in a box changes.

It says whether two pictures in a row may show the same face, not who that is: of an aligned
chip the brightness of 16 x 16 fields, the fineness of its detail and its mean colour. Layout::

    256 int8    fields, row by row, less their mean, the largest at 127; all 0 = a flat chip
    1 uint8     detail: 16 x log2(1 + variance of the Laplacian of the middle)
    3 uint8     mean blue, green, red

``tracking.appearance`` compares them. Some 30 microseconds a face.
"""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np

from facelane_server import limits
from facelane_server.models.api import U8

FIELDS: Final = 16


def signatures(chips: U8) -> U8:
    """[N, size, size, 3] uint8 BGR to [N, limits.SIGNATURE_BYTES].

    All chips at once, one below the other: every call of OpenCV lets go of the GIL, and waits for
    the threads that decode until it has it back.
    """
    count = len(chips)
    found = np.zeros((count, limits.SIGNATURE_BYTES), np.uint8)
    if not count:
        return found
    size = chips.shape[1]
    tall = chips.reshape(count * size, size, 3)
    grey = cv2.cvtColor(tall, cv2.COLOR_BGR2GRAY)
    fields = cv2.resize(grey, (FIELDS, FIELDS * count), interpolation=cv2.INTER_AREA)
    edge = size // 7
    # With a rim that mirrors what lies within, so that no chip's detail is of another one.
    middles = np.empty((count, size - 2 * edge + 2, size - 2 * edge + 2), np.uint8)
    middles[:, 1:-1, 1:-1] = grey.reshape(count, size, size)[:, edge:-edge, edge:-edge]
    middles[:, 0], middles[:, -1] = middles[:, 2], middles[:, -3]
    middles[:, :, 0], middles[:, :, -1] = middles[:, :, 2], middles[:, :, -3]
    side = middles.shape[1]
    laplacian = cv2.Laplacian(middles.reshape(count * side, side), cv2.CV_32F)
    inner = laplacian.reshape(count, side, side)[:, 1:-1, 1:-1].reshape(count, -1)
    squares = np.matmul(inner[:, None], inner[:, :, None])[:, 0, 0] / inner.shape[1]
    variances = squares - inner.mean(1) ** 2
    found[:, -4] = np.minimum(255.0, 16.0 * np.log2(1.0 + variances))
    found[:, -3:] = cv2.resize(tall, (1, count), interpolation=cv2.INTER_AREA)[:, 0]
    reliefs = fields.reshape(count, FIELDS * FIELDS).astype(np.float32)
    reliefs -= reliefs.mean(1, keepdims=True)
    highest = np.abs(reliefs).max(1, keepdims=True, initial=0.0)
    there = highest[:, 0] >= 1.0
    scaled = np.rint(reliefs[there] * (127.0 / highest[there]))
    found[there, : FIELDS * FIELDS] = scaled.astype(np.int8).view(np.uint8)
    return found
