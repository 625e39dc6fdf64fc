"""Figures of a server for Prometheus, read when it asks."""

from collections.abc import Iterable
from typing import Protocol

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from starlette.responses import Response


class Collector(Protocol):
    """What has figures."""

    def collect(self) -> Iterable[Metric]: ...


def metrics_page(collector: Collector) -> Response:
    """The figures as they are now, in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(collector)
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
