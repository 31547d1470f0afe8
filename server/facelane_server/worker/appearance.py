"""A small signature of each face, so that the tracker sees when the face in a box changes.

It says whether two pictures in a row may show the same face, not who that is: of an aligned
chip the brightness of 16 x 16 fields, the fineness of its detail and its mean colour. Layout::

    256 int8    fields, row by row, less their mean, the largest at 127; all 0 = a flat chip
    1 uint8     detail: 16 x log2(1 + variance of the Laplacian of the middle)
    3 uint8     mean blue, green, red

``tracking.appearance`` compares them. Some 30 microseconds a face.
"""

from __future__ import annotations

import math
from typing import Final

import cv2
import numpy as np

from facelane_server import limits
from facelane_server.models.api import U8

FIELDS: Final = 16


def signatures(chips: U8) -> U8:
    """[N, size, size, 3] uint8 BGR to [N, limits.SIGNATURE_BYTES]."""
    found = np.zeros((len(chips), limits.SIGNATURE_BYTES), np.uint8)
    reliefs = np.empty((len(chips), FIELDS * FIELDS), np.float32)
    for chip, signature, relief in zip(chips, found, reliefs, strict=True):
        grey = cv2.cvtColor(chip, cv2.COLOR_BGR2GRAY)
        fields = cv2.resize(grey, (FIELDS, FIELDS), interpolation=cv2.INTER_AREA)
        relief[:] = fields.ravel()
        edge = len(grey) // 7
        laplacian = cv2.Laplacian(grey[edge:-edge, edge:-edge], cv2.CV_32F)
        _, deviation = cv2.meanStdDev(laplacian)
        signature[-4] = min(255.0, 16.0 * math.log2(1.0 + float(deviation[0, 0]) ** 2))
        signature[-3:] = cv2.mean(chip)[:3]
    reliefs -= reliefs.mean(1, keepdims=True)
    highest = np.abs(reliefs).max(1, keepdims=True, initial=0.0)
    there = highest[:, 0] >= 1.0
    scaled = np.rint(reliefs[there] * (127.0 / highest[there]))
    found[there, : FIELDS * FIELDS] = scaled.astype(np.int8).view(np.uint8)
    return found
