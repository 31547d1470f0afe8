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
    """[N, size, size, 3] uint8 BGR to [N, limits.SIGNATURE_BYTES]."""
    found = np.zeros((len(chips), limits.SIGNATURE_BYTES), np.uint8)
    for chip, signature in zip(chips, found, strict=True):
        grey = cv2.cvtColor(chip, cv2.COLOR_BGR2GRAY)
        fields = cv2.resize(grey, (FIELDS, FIELDS), interpolation=cv2.INTER_AREA)
        relief = fields.astype(np.float32).ravel()
        relief -= relief.mean()
        highest = float(np.abs(relief).max())
        if highest >= 1.0:
            signature[: FIELDS * FIELDS].view(np.int8)[:] = np.rint(relief * (127.0 / highest))
        edge = len(grey) // 7
        laplacian = cv2.Laplacian(grey[edge:-edge, edge:-edge], cv2.CV_32F)
        signature[-4] = min(255.0, 16.0 * np.log2(1.0 + float(laplacian.var())))
        signature[-3:] = cv2.mean(chip)[:3]
    return found
