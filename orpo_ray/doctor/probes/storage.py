"""A file written to the storage, read back and deleted."""

import os
import time

from orpo_ray.doctor.facts import Asked, RoundTrip
from orpo_ray.doctor.marker import holds, round_trip
from orpo_ray.doctor.probes.disks import name_of
from orpo_ray.errors import OrpoRayError

_BYTES = 2**16


def look(asked: Asked) -> RoundTrip | None:
    """The round trip to the storage; None if none is named."""
    if not asked.storage:
        return None
    content = os.urandom(_BYTES)
    began = time.monotonic()
    try:
        problem = "" if round_trip(asked.storage, content) == content else "other bytes came back"
        sees = holds(asked.storage, asked.marker) if asked.marker else None
    except OrpoRayError as error:
        return RoundTrip(place=asked.storage, problem=str(error))
    except OSError as error:
        where = error.filename or asked.storage
        return RoundTrip(
            place=asked.storage,
            problem=f"{where}: {error.strerror or error}",
            error=name_of(error),
        )
    return RoundTrip(
        place=asked.storage, seconds=time.monotonic() - began, problem=problem, sees_marker=sees
    )
