"""What Prometheus sees. One registry for each app, so that tests and processes don't share."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series nobody asks for

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "skrd4ad_requests_total",
            "HTTP requests answered.",
            ["method", "route", "status"],
            registry=registry,
        )
        self.stage_duration = Histogram(
            "skrd4ad_stage_duration_seconds",
            "Time of an inspection by stage: decode, queue, infer, render, total.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.queue_size = Gauge(
            "skrd4ad_queue_size", "Images waiting for the device.", registry=registry
        )
        self.in_progress = Gauge(
            "skrd4ad_inspections_in_progress",
            "Inspections accepted and not yet answered; the limit is SKRD4AD_MAX_QUEUE a model.",
            registry=registry,
        )
        self.batch_size = Histogram(
            "skrd4ad_batch_size",
            "Images in one run of the graph.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=registry,
        )
        self.image_score = Histogram(
            "skrd4ad_image_score",
            "Image scores of inspections.",
            ["model"],
            buckets=[i / 20 for i in range(1, 61)],  # a map sums three distances of at most 1
            registry=registry,
        )
        self.decisions = Counter(
            "skrd4ad_decisions_total",
            "Inspections by decision.",
            ["model", "decision"],
            registry=registry,
        )
        self.threshold = Gauge(
            "skrd4ad_threshold",
            "Threshold in force; NaN while a model has none. No profile: the model's own.",
            ["model", "profile"],
            registry=registry,
        )
        self.calibration_samples = Gauge(
            "skrd4ad_calibration_samples",
            "Normal images behind the threshold in force.",
            ["model", "profile"],
            registry=registry,
        )
        self.calibration_made = Gauge(
            "skrd4ad_calibration_made_timestamp_seconds",
            "When the calibration in force was made, in seconds since 1970.",
            ["model", "profile"],
            registry=registry,
        )
        self.drift_alarm = Gauge(
            "skrd4ad_drift_alarm",
            "1 from when images decided normal no longer score as the calibration's did.",
            ["model", "profile"],
            registry=registry,
        )
        self.drift_statistic = Gauge(
            "skrd4ad_drift_statistic",
            "Evidence of that: an alarm from 100,000 on.",
            ["model", "profile"],
            registry=registry,
        )
        self.drift_images = Gauge(
            "skrd4ad_drift_images",
            "Images that it was tested with.",
            ["model", "profile"],
            registry=registry,
        )
        self.database_up = Gauge(
            "skrd4ad_database_up",
            "1 while the database answers; inspection goes on while it doesn't.",
            registry=registry,
        )
        self.trace_pending = Gauge(
            "skrd4ad_trace_pending",
            "Inspections that are not recorded yet; grows while the database is slow or away.",
            registry=registry,
        )
        self.trace_written = Counter(
            "skrd4ad_trace_written_total", "Inspections recorded.", registry=registry
        )
        self.trace_dropped = Counter(
            "skrd4ad_trace_dropped_total",
            "Inspections that were never recorded: as too many were pending (full), or as the "
            "database refused their values (refused).",
            ["reason"],
            registry=registry,
        )
        self.archive_pending = Gauge(
            "skrd4ad_archive_pending_bytes", "Images that wait to be archived.", registry=registry
        )
        self.archive_written = Counter(
            "skrd4ad_archive_written_total", "Images archived.", registry=registry
        )
        self.archive_dropped = Counter(
            "skrd4ad_archive_dropped_total",
            "Images that were to be archived and were not: too many were pending (queue), the "
            "archive is as large as it may be (full), or writing failed (failed).",
            ["reason"],
            registry=registry,
        )
        self.archive_bytes = Gauge(
            "skrd4ad_archive_bytes", "Size of the archive when last looked at.", registry=registry
        )
        for reason in ("full", "refused"):  # there from the start, so that an alert sees it grow
            self.trace_dropped.labels(reason)
        for reason in ("queue", "full", "failed"):
            self.archive_dropped.labels(reason)
        self.model_info = Gauge(
            "skrd4ad_model_info",
            "Loaded models; always 1.",
            ["model", "version", "digest", "architecture", "backbone"],
            registry=registry,
        )
        self.model_active = Gauge(
            "skrd4ad_model_active",
            "Which version serves; always 1.",
            ["model", "version"],
            registry=registry,
        )
        self.model_load = Histogram(
            "skrd4ad_model_load_seconds",
            "Time from a bundle on disk to a model that is warm and checked.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.model_load_failures = Counter(
            "skrd4ad_model_load_failures_total",
            "Bundles that could not be loaded or failed their self-check.",
            registry=registry,
        )
        self.shadow_inspections = Counter(
            "skrd4ad_shadow_inspections_total",
            "Images that a shadow scored as well, by what became of the decision.",
            ["model", "outcome"],
            registry=registry,
        )
        self.shadow_score_difference = Histogram(
            "skrd4ad_shadow_score_difference",
            "How far the scores of shadow and active version are apart, each over its threshold.",
            ["model"],
            buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
            registry=registry,
        )
        self.shadow_p_value_difference = Histogram(
            "skrd4ad_shadow_p_value_difference",
            "How far the p-values of shadow and active version are apart.",
            ["model"],
            buckets=(0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1),
            registry=registry,
        )
        self.provider_info = Gauge(
            "skrd4ad_provider_info",
            "What the graphs run on, in which precision and in which sizes of batch; always 1.",
            ["provider", "precision", "batch_sizes"],
            registry=registry,
        )
