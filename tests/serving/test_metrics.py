import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from services import figure

from barlow.serving.metrics import BATCHES, SECONDS, Metrics


def test_answers_are_counted_by_path_and_status_and_timed_by_path():
    metrics, seconds = Metrics(), np.random.default_rng(0).exponential(0.1, 100)
    for i, each in enumerate(seconds):
        metrics.answered("/a" if i % 3 else "/b", 200 if i % 2 else 503, each)
    text = metrics.text()
    for path, numbers in {"/a": [i for i in range(100) if i % 3], "/b": range(0, 100, 3)}.items():
        for status, remainder in ((200, 1), (503, 0)):
            wanted = sum(i % 2 == remainder for i in numbers)
            assert figure(text, "barlow_requests_total", path=path, status=str(status)) == wanted
        mine = seconds[list(numbers)]
        assert figure(text, "barlow_seconds_count", path=path) == len(mine)
        assert figure(text, "barlow_seconds_sum", path=path) == pytest.approx(mine.sum())
        for bound in SECONDS:
            assert figure(text, "barlow_seconds_bucket", path=path, le=str(float(bound))) == (mine <= bound).sum()


def test_batches_are_counted_by_size():
    metrics = Metrics()
    for size in (1, 2, 2, 3, 64, 1000):
        metrics.batch.observe(size)
    counts = [figure(metrics.text(), "barlow_batch_size_bucket", le=str(float(bound))) for bound in BATCHES]
    assert counts == [1, 3, 4, 4, 4, 4, 5, 5]
    assert figure(metrics.text(), "barlow_batch_size_bucket", le="+Inf") == 6


def test_services_in_one_process_do_not_share_figures():
    one, two = Metrics(), Metrics()
    one.answered("/a", 200, 0.1)
    one.queue.set(3)
    assert figure(two.text(), "barlow_requests_total", path="/a", status="200") == 0
    assert figure(two.text(), "barlow_queue") == 0
    assert figure(one.text(), "barlow_queue") == 3


def test_every_figure_is_described_and_the_process_is_there_too():
    families = {family.name: family for family in text_string_to_metric_families(Metrics().text().decode())}
    ours = {name for name in families if name.startswith("barlow_") and not name.endswith("_created")}
    assert ours == {
        "barlow_requests", "barlow_seconds", "barlow_rejects", "barlow_batch_size", "barlow_queue_seconds",
        "barlow_queue", "barlow_reloads", "barlow_model_info", "barlow_index_items",
    }  # fmt: skip
    assert all(families[name].documentation for name in ours)
    (memory,) = families["process_resident_memory_bytes"].samples
    assert memory.value > 1e7
