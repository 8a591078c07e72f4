"""What one observer has measured, as another one sees it: the choice of ranges may change without measuring again."""

from __future__ import annotations

from dataclasses import replace

from ..errors import FP8MeasurementError
from .observer import Context, observer_class
from .store import Measurements


def observed_by(measurements: Measurements, observer: str, context: Context) -> Measurements:
    """The same measurements with another observer, whose statistics they hold; tensors are shared.

    Args:
        measurements: by any observer.
        observer: the other's name.
        context: what it is told.

    Raises:
        FP8MeasurementError: it needs statistics that were not kept.
    """
    wanted, kept = observer_class(observer), observer_class(measurements.observer)
    lacking = [key for key, declared in wanted.STATISTICS.items() if kept.STATISTICS.get(key) != declared]
    if lacking:
        raise FP8MeasurementError(
            f"made by the observer {kept.name!r}, which keeps no {', '.join(lacking)}, but observer={observer!r} needs "
            f"that: set observer={kept.name!r}, or measure again"
        )
    seen = replace(measurements, observer=observer, context=context, tensors={})
    for (module, kind), known in measurements.tensors.items():
        statistics = {key: value for key, value in known.statistics().items() if key in wanted.STATISTICS}
        seen.add(module, kind, wanted(**statistics))
    return seen
