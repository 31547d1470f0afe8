"""What the client speaks in: frozen values, free of protobuf and gRPC.

Coordinates are pixels of the picture as it was sent, origin at the top left, x to the
right, y down. Durations are seconds. Wall-clock times are timezone-aware UTC datetimes.
A value that a newer server sends and this client does not know becomes the member that
promises least (``UNSPECIFIED``, ``NOT_EVALUATED``, ``UNDECIDED``), never a match.
"""

from __future__ import annotations

from facelane.types.faces import *  # noqa: F403 - the rooms of one house
from facelane.types.pictures import *  # noqa: F403
from facelane.types.server import *  # noqa: F403
from facelane.types.streams import *  # noqa: F403
from facelane.types.views import *  # noqa: F403
from facelane.types.zones import *  # noqa: F403
