"""The registry of metrics, whose names configurations and logs use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torchmetrics import Metric

from psp_lightning.utils.registry import register

METRICS: dict[str, type[Metric]] = {}
MetricT = TypeVar("MetricT", bound=type[Metric])


def register_metric(name: str) -> Callable[[MetricT], MetricT]:
    """Return a class decorator that adds a `torchmetrics.Metric` to `METRICS` as `name`, its key in the log.

    Raises:
        UserError: another metric already has this name.
    """

    def decorate(cls: MetricT) -> MetricT:
        return register(METRICS, name, cls)

    return decorate
