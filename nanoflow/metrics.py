"""A Prometheus endpoint: what the run does at the moment, for whoever asks over HTTP.

Names follow Prometheus' conventions: base units (seconds, ratios), counters that end in ``_total``.
"""

import socket
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server

from nanoflow.errors import ConfigError
from nanoflow.recording import IterationRecord, RequestNumbers

__all__ = ["MetricsServer", "RunMetrics"]

LATENCY = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 600, 1800, 3600, 10800, 36000)
"""Bounds in seconds, up to ten hours: an offline request may wait for most of the run."""
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10)
ITERATION = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)


class RunMetrics:
    """The metrics of one run, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        requests = self._counter("requests", "Requests that have ended, by outcome.", "outcome")
        self._completed, self._errors = requests.labels("completed"), requests.labels("error")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of completed requests.")
        self._output_tokens = self._counter("output_tokens", "Output tokens made so far.")
        rows = self._counter("batch_rows", "Rows of all dense batches, by what they were.", "kind")
        self._rows = {kind: rows.labels(kind) for kind in ("decode", "prefill", "padding")}
        self._preemptions = self._counter("preemptions", "Times that a request gave up its KV pages for others.")
        self._running = self._gauge("running_sequences", "Sequences that hold KV pages.")
        self._waiting = self._gauge(
            "waiting_sequences",
            "Sequences in the engine that wait for admission; the rest of the input is not counted.",
        )
        self._kv_used = self._gauge("kv_cache_used_ratio", "Share of the KV cache's pages in use, 0 to 1.")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", LATENCY
        )
        self._per_token = self._histogram(
            "time_per_output_token_seconds", "From first to last token, over the tokens after the first.", PER_TOKEN
        )
        self._duration = self._histogram(
            "request_duration_seconds", "From a request's arrival to its last token.", LATENCY
        )
        self._iteration = self._histogram(
            "iteration_seconds", "Time that the executor spent on an iteration.", ITERATION
        )
        self._info = Info("nanoflow_run", "What runs.", registry=self.registry)

    def describe(self, **labels: str) -> None:
        """Say what runs: the labels of ``nanoflow_run_info``."""
        self._info.info(labels)

    def observe(self, record: IterationRecord) -> None:
        """Count an iteration; an observer of the engine."""
        self._rows["decode"].inc(record.decode_rows)
        self._rows["prefill"].inc(record.prefill_rows)
        self._rows["padding"].inc(record.padding_rows)
        self._output_tokens.inc(record.output_tokens)
        self._preemptions.inc(record.preemptions)
        self._running.set(record.running)
        self._waiting.set(record.waiting)
        self._kv_used.set(record.kv_pages / record.kv_capacity)
        self._iteration.observe(record.seconds)

    def request(self, numbers: RequestNumbers) -> None:
        """Count a finished request."""
        self._completed.inc()
        self._prompt_tokens.inc(numbers.prompt_tokens)
        self._first_token.observe(numbers.first_token)
        self._duration.observe(numbers.duration)
        if numbers.per_token is not None:
            self._per_token.observe(numbers.per_token)

    def error(self) -> None:
        """Count an error record."""
        self._errors.inc()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"nanoflow_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"nanoflow_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"nanoflow_{name}", text, buckets=buckets, registry=self.registry)


class MetricsServer:
    """Answers ``GET /metrics`` in a thread until it is closed.

    Args:
        host: address to listen on.
        port: TCP port; 0 takes a free one.

    Raises:
        ConfigError: the port is taken, or the address is not this machine's.
    """

    def __init__(self, metrics: RunMetrics, host: str, port: int) -> None:
        self._server: WSGIServer
        self._thread: Thread
        try:
            self._server, self._thread = start_http_server(port, host, metrics.registry)
        except socket.gaierror as error:
            raise ConfigError(
                f"metrics.host: {host} is no address: {error.strerror}; use 127.0.0.1, or 0.0.0.0 for the network"
            ) from None
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(
                f"metrics.port: cannot listen on {host} port {port}: {reason}; "
                "choose another with --metrics-port, or 0 for a free one"
            ) from None

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        host = host.decode() if isinstance(host, bytes) else host
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"

    def close(self) -> None:
        """Stop answering and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
