"""Cameras into facelane: RTSP, files, devices, HTTP-MJPEG and folders of pictures.

Built on the SDK (``facelane``) as any customer would. ``facelane-bridge run`` is the
command; ``Bridge`` is the same from Python. ``docs/bridge.md`` describes both.
"""

from __future__ import annotations
