"""facelane server: a gRPC streaming video-analytics service for faces.

The front process (edge, lanes, pipeline, pools) never imports torch; only
:mod:`facelane_server.worker` does, in processes of its own.
"""

from __future__ import annotations

__version__ = "0.1.0"
