from barlow.evaluation import tables

METRICS = {
    f"{prefix}{name}": value
    for prefix in ("", "random_")
    for name, value in {
        "linear_top1": 70.12,
        "linear_top1_low": 67.2,
        "linear_top1_high": 72.9,
        "knn_top1": 60.0,
        "knn_top1_low": 57.0,
        "knn_top1_high": 63.0,
        "effective_rank": 31.3,
        "alignment": 0.2,
        "uniformity": -2.5,
    }.items()
}


def test_the_table_shows_the_figures():
    table = tables.table(METRICS | {"random_linear_top1": 28.6})
    assert "70.1 (67.2 to 72.9)" in table
    assert "28.6 (67.2 to 72.9)" in table
    assert "31.30" in table


def test_rows_are_in_the_order_of_the_labels_they_need():
    few = {"labels_1": 4, "labels_10": 40, "share_10": 12, "share_0.5": 5, "share_1e-05": 3}
    metrics = METRICS | {f"{name}_images": count for name, count in few.items()}
    metrics |= {f"{prefix}{name}_top1": 1.0 for name in few for prefix in ("", "random_")}
    metrics |= {"finetuned_share_10_top1": 2.0, "scratch_share_10_top1": 3.0, "supervised_top1": 4.0}
    assert [text for _, text in tables.rows(metrics)] == [
        "linear probe",
        "weighted kNN",
        "1e-05 % of labels",
        "1 label a class",
        "0.5 % of labels",
        "10 % of labels",
        "10 labels a class",
        "fine-tuned, 10 % of labels",
        "supervised, all labels",
    ]


def test_each_figure_is_in_its_column():
    metrics = METRICS | {"share_10_images": 12}
    for i, name in enumerate(
        ("finetuned_share_10_top1", "scratch_share_10_top1", "supervised_top1", "pixels_knn_top1")
    ):
        metrics |= {name: 90.0 + i, f"{name}_low": 1.0, f"{name}_high": 99.0}
    lines = {line[:26].strip(): line[26:] for line in tables.table(metrics).splitlines()}
    assert lines["fine-tuned, 10 % of labels"].split()[0::4] == ["90.0", "91.0"]
    assert lines["supervised, all labels"].strip() == "92.0 (1.0 to 99.0)"
    assert lines["weighted kNN"].split()[0::4] == ["60.0", "60.0", "93.0"]


def test_the_table_has_a_column_an_encoder():
    lines = tables.columns({"challenger": {"a_top1": 50.0, "a_top1_low": 40.0, "a_top1_high": 60.0}, "v1": {"b": 1.5}})
    assert lines.splitlines() == [
        "| | challenger | v1 |",
        "|---|---|---|",
        "| a_top1 | 50 (40.0 to 60.0) |  |",
        "| b |  | 1.5 |",
    ]


def test_without_labels_health_alone_is_shown():
    table = tables.table({name: value for name, value in METRICS.items() if "top1" not in name})
    assert "no labels" in table
    assert "effective rank" in table


def test_without_baselines_their_columns_are_empty():
    lines = tables.table(
        {name: value for name, value in METRICS.items() if not name.startswith("random_")}
    ).splitlines()
    assert [line[26:].split() for line in lines[1:]] == [
        ["70.1", "(67.2", "to", "72.9)"],
        ["60.0", "(57.0", "to", "63.0)"],
        ["31.30"],
        ["0.20"],
        ["-2.50"],
    ]
