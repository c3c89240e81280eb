"""The operator's own metrics for Prometheus."""

from prometheus_client import Counter, Gauge, Histogram

RECONCILE_SECONDS = Histogram("bluewhale_reconcile_seconds", "Time of one reconcile.", ["kind"])
RECONCILE_ERRORS = Counter("bluewhale_reconcile_errors_total", "Reconciles that raised.", ["kind"])
CONFLICTS = Counter(
    "bluewhale_status_conflicts_total", "Status writes refused because the object had changed.", ["kind"]
)
JOBS = Gauge("bluewhale_jobs", "RLTrainingJobs by phase.", ["phase"])
STAGE_SECONDS = Histogram(
    "bluewhale_stage_seconds", "Time of a finished stage.", ["stage", "state"],
    buckets=(1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600),
)  # fmt: skip
RETRIES = Counter("bluewhale_stage_retries_total", "Stages tried again after a failure.", ["stage"])
QUEUE = Gauge("bluewhale_queue_length", "Objects waiting to be reconciled.")
