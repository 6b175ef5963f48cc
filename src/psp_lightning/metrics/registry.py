"""Metrics by name, so that a configuration and a log can name them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torchmetrics import Metric

from psp_lightning.utils.registry import register

METRICS: dict[str, type[Metric]] = {}
MetricT = TypeVar("MetricT", bound=type[Metric])


def register_metric(name: str) -> Callable[[MetricT], MetricT]:
    """Class decorator: put a `torchmetrics.Metric` into `METRICS` under `name`, its key in the log.

    Raises:
        UserError: another metric has the name.
    """

    def decorate(cls: MetricT) -> MetricT:
        return register(METRICS, name, cls)

    return decorate
