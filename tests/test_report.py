import csv
import io
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import onnx
import pytest
import torch
from dvclive import Live
from PIL import Image

from barlow import files, manifest, model, probe, report, shards, summary
from barlow.errors import UserError

HOSTILE = '<script>alert("1")</script>&\n,\u202e'
READABLE = HOSTILE.replace("\n", "\\n").replace("\u202e", "\\u202e")
CLASSES = ("bricks", "dots", "rings", "waves", HOSTILE)
SECTIONS = ["headline", "views", "curves", "correlation", "confusion", "neighbours", "data", "provenance"]


class Page(HTMLParser):
    """A page taken apart: the text of each section, each table cell's text, all tags with their attributes."""

    def __init__(self, html):
        super().__init__()
        self.text, self.cells, self.tags = dict.fromkeys(SECTIONS, ""), {name: [] for name in SECTIONS}, []
        self.section, self.in_cell = None, False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "section":
            self.section = dict(attributes)["id"]
        elif tag in ("td", "th"):
            self.cells[self.section].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.section:
            self.text[self.section] += data
        if self.in_cell:
            self.cells[self.section][-1] += data.strip() + " "

    def row(self, section, name):
        """Return the two cells after the one that says `name`."""
        cells = [cell.strip() for cell in self.cells[section]]
        return cells[cells.index(name) + 1 :][:2]


def samples(split, count, classes):
    for i in range(count):
        file = io.BytesIO()
        width, label = 24 + i % 3, i % len(classes) if classes else -1
        Image.effect_noise((width, 24), 50).save(file, "JPEG")
        yield shards.Sample(f"{split}{i:020x}", file.getvalue(), "jpg", label, 24, width)


def write_stages(classes=CLASSES, test=60, epochs=14, labelled=True):
    """Write what the other stages would, through their writers."""
    rng = np.random.default_rng(0)
    known = list(classes) if labelled else []
    for split, count in {"pretrain": 20, "train": 10, "val": 10, "test": test}.items():
        tar = files.SHARDS / f"{split}-000000.tar"
        shards.write(tar, samples(split, count, known if split != "pretrain" else []))
    files.write_json(files.SHARDS / shards.CLASSES, known)

    validation = {"images": 104, "accepted": 100, "quarantined": 4, "quarantined_decodable": 3, "quarantined_width": 1}
    validation |= {f"accepted_{split}": 10 for split in manifest.SPLITS}
    for name, success, severity, observed in (("decodable", True, "critical", 0.971), ("drift", False, "warning", 0.2)):
        validation |= {f"{name}_success": success, f"{name}_severity": severity, f"{name}_observed": observed}
        validation |= {f"{name}_bound": 0.5, f"{name}_unexpected": 0}
    files.write_json(files.REPORTS / "validation.json", validation)
    with files.QUARANTINE.open("w", newline="") as file:
        csv.writer(file).writerows([["path", "reason"], ["a b/é.jpg", "not an image"], [f"{HOSTILE}.jpg", "width 8"]])

    live = Live(str(files.REPORTS / "pretrain"), save_dvc_exp=False, dvcyaml=None)
    for epoch in range(epochs):
        row = {
            "loss": 40 + 400 / (epoch + 1),
            "on_diagonal": 0.9 / (epoch + 1),
            "off_diagonal": 0.05 * np.exp(-((epoch - 2) ** 2) / 20) + 0.0062,
            "lr": float(0.3 * np.cos(epoch / max(epochs, 1) * np.pi / 2) ** 2) * (0.6 if epoch == 0 else 1),
            "std": 0.9,
            "samples_per_second": 412.3,
            "data_wait": 0.0123,
            "seconds": 17.5,
            "knn_val_top1": 61.3,
        }
        for name, value in row.items():
            live.log_metric(name, float(value))
        live.next_step()
    files.write_json(files.REPORTS / "pretrain.json", {**row, "epochs": epochs, "seconds": 17.5 * epochs})

    z = rng.normal(size=(200, 64))
    before = np.corrcoef(z.T + 2 * rng.normal(size=200))
    after = np.corrcoef(z.T) * 0.9
    matrices = {"before": torch.tensor(before).float(), "after": torch.tensor(after).float()}
    model.save_weights(files.CORRELATION, matrices, {})
    model.save_weights(files.ENCODER, {"w": torch.zeros(1)}, {"data": shards.digest(shards.tars("pretrain"))})

    labels = torch.arange(test) % len(classes)
    wrong = torch.tensor(rng.random(len(labels)) < 0.4, dtype=torch.bool)
    predictions = torch.where(wrong, (labels * 2 + 1) % len(classes), labels)
    features = torch.tensor(rng.normal(size=(len(labels), 64))).float() + 3 * torch.eye(64)[labels]
    tensors = {"features": features, "labels": labels if labelled else torch.full_like(labels, -1)}
    keys = [sample.key for sample in samples("test", len(labels), classes)]
    model.save_weights(files.FEATURES, tensors, {"keys": keys, "classes": known})
    with files.CONFUSION.open("w", newline="") as file:
        csv.writer(file).writerows([["actual", "predicted"]])
        if labelled:
            csv.writer(file).writerows([classes[a], classes[b]] for a, b in zip(labels, predictions, strict=True))
    metrics = {"classes": len(known), "train_images": 10, "val_images": 10, "test_images": len(labels) * labelled}
    for who, rank, tops in (("", 87.654, (58.76, 51.23)), ("random_", 9.876, (24.56, 16.78))):
        metrics |= {f"{who}effective_rank": rank, f"{who}feature_std": 0.71, f"{who}health_images": 1000}
        metrics |= {f"{who}alignment": 0.321, f"{who}uniformity": -2.345}
        if labelled:
            metrics |= {f"{who}linear_l2": 0.001}
            for name, top1 in zip(("linear", "knn"), tops, strict=True):
                low, high = probe.wilson_interval(top1, 1000)
                metrics |= {f"{who}{name}_top1": top1, f"{who}{name}_top1_low": low, f"{who}{name}_top1_high": high}
    files.write_json(files.REPORTS / "evaluate.json", metrics)

    figures = {"parity_cosine_min": 0.999999881, "latency_ms": 1.211, "images_per_second": 1259.6, "dim": 512}
    files.write_json(files.REPORTS / "export.json", figures)
    graph = onnx.helper.make_graph([], "encoder", [], [])
    exported = onnx.helper.make_model(graph)
    onnx.helper.set_model_props(exported, {"space": "0123456789abcdef", "classes": "[]"})
    files.ONNX.write_bytes(exported.SerializeToString())


@pytest.fixture(scope="module")
def project(tmp_path_factory, smoke):
    """A project folder after every stage and the report."""
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        write_stages()
        report.run(smoke)
    return root


@pytest.fixture
def copy(project, tmp_path, monkeypatch):
    """A copy of the project to change, as the working folder."""
    monkeypatch.chdir(shutil.copytree(project, tmp_path / "copy"))


@pytest.fixture
def page(project):
    return Page((project / summary.REPORT).read_text())


def render(params):
    report.run(params)
    return Page(summary.REPORT.read_text())


def test_every_section_has_a_heading_and_content(page):
    assert [attributes["id"] for tag, attributes in page.tags if tag == "section"] == SECTIONS
    assert sum(tag == "h2" for tag, _ in page.tags) == len(SECTIONS)
    assert min(len(text.split()) for text in page.text.values()) > 30
    assert {a["href"] for tag, a in page.tags if tag == "a"} == {f"#{name}" for name in SECTIONS[1:]}


def test_the_page_is_one_small_file_without_scripts(project, page):
    html = (project / summary.REPORT).read_text()
    assert len(html) < 2_000_000
    addresses = [a[key] for _, a in page.tags for key in ("src", "href", "srcset", "data", "action") if key in a]
    assert all(address.startswith(("data:image/", "#")) for address in addresses)
    assert not re.search(r"https?://|url\(|@import", html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}


def test_every_image_has_a_description(page, smoke):
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 3 * smoke.report.images + 2 + 7 * smoke.report.images
    assert all(picture["alt"] for picture in pictures)
    assert all(a["aria-label"] for tag, a in page.tags if tag == "svg")


def test_the_headline_says_what_evaluate_measured(project, page):
    metrics = files.read_json(project / "reports/evaluate.json")
    text = " ".join(page.text["headline"].split())
    for key in ("linear_top1", "random_linear_top1", "knn_top1", "random_knn_top1"):
        low, high = metrics[f"{key}_low"], metrics[f"{key}_high"]
        assert f"{metrics[key]:.1f} % {low:.1f} to {high:.1f}" in text
        assert {"class": "bar", "style": f"width:{metrics[key]}%"} in [a for _, a in page.tags]
    assert "do not overlap: pretraining, which used no label, made the difference" in text
    assert "chance, 1 of 5 classes: 20.0" in text
    assert page.row("headline", "effective rank") == ["87.65", "9.88"]
    assert page.row("headline", "uniformity") == ["−2.35", "−2.35"]


@pytest.mark.parametrize(("low", "high", "said"), [(50, 60, "intervals overlap"), (70, 80, "made the features worse")])
def test_a_bad_result_is_called_one(copy, smoke, low, high, said):
    path = files.REPORTS / "evaluate.json"
    metrics = files.read_json(path) | {"random_linear_top1_low": low, "random_linear_top1_high": high}
    files.write_json(path, metrics)
    assert said in render(smoke).text["headline"]


def test_without_labels_the_page_says_so(tmp_path, monkeypatch, smoke):
    monkeypatch.chdir(tmp_path)
    write_stages(labelled=False)
    page = render(smoke)
    assert "No accuracy" in page.text["headline"]
    assert "87.7" in page.text["headline"]
    assert "Nothing to show" in page.text["confusion"]
    assert "✓" not in page.text["neighbours"]
    assert "Nearest neighbours" in page.text["neighbours"]
    assert "Nothing to show" not in page.text["neighbours"]
    html = summary.REPORT.read_text()
    section = html.partition('<section id="neighbours">')[2].partition("</section>")[0]
    assert section.count("<figure><img") == 7 * smoke.report.images


def test_curves_and_pretraining_figures(project, page):
    metrics = files.read_json(project / "reports/pretrain.json")
    assert f"{metrics['loss']:.4g} at the end" in page.text["curves"]
    assert "412 images/s" in page.text["curves"]
    lines = [a["points"].split() for tag, a in page.tags if tag == "polyline"]
    assert [len(line) for line in lines] == [14] * 4


def test_a_run_of_one_step(tmp_path, monkeypatch, smoke):
    monkeypatch.chdir(tmp_path)
    write_stages(test=1, epochs=1)
    before = model.load_weights(files.CORRELATION)[0]["before"]
    model.save_weights(files.CORRELATION, {"before": before}, {})
    page = render(smoke)
    assert "1 epoch in" in page.text["curves"]
    assert "last step" not in page.text["correlation"]


def test_the_confusion_matrix_counts_the_predictions(project, page):
    with (project / files.CONFUSION).open(newline="") as file:
        counts = Counter((row["actual"], row["predicted"]) for row in csv.DictReader(file))
    totals = Counter(actual for actual, _ in counts.elements())
    cells = [cell.split() for cell in page.cells["confusion"]]
    body = cells[1 + len(CLASSES) :]  # below the header
    for i, actual in enumerate(CLASSES):
        row = body[i * (len(CLASSES) + 1) + 1 :][: len(CLASSES)]
        for predicted, cell in zip(CLASSES, row, strict=True):
            n = counts[actual, predicted]
            assert cell == ([f"{100 * n / totals[actual]:.0f}", str(n)] if n else ["0"])


def test_many_classes_are_shown_as_a_picture(tmp_path, monkeypatch, smoke):
    monkeypatch.chdir(tmp_path)
    write_stages(classes=[f"class {i}" for i in range(30)])
    page = render(smoke)
    assert "Confusion matrix of 30 classes" in [a.get("alt") for _, a in page.tags]
    assert len(page.cells["confusion"]) < 30


def test_neighbours_are_the_most_similar_other_images(project, page, smoke):
    tensors = model.load_weights(project / files.FEATURES)[0]
    features, labels = tensors["features"].double().numpy(), tensors["labels"].numpy()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    captions = [a["title"] for tag, a in page.tags if tag == "figcaption" and "title" in a]
    marks = re.findall("[✓✗]", page.text["neighbours"])[2:]  # the first two explain the marks
    for query in range(smoke.report.images):
        i = [0, 1, 2, 4][query]  # spread over the 5 classes
        others = sorted((j for j in range(len(unit)) if j != i), key=lambda j: -unit[i] @ unit[j])[:6]
        wanted = [CLASSES[labels[j]] for j in (i, *others)]
        assert captions[7 * query :][:7] == [name.replace(HOSTILE, READABLE) for name in wanted]
        assert marks[6 * query :][:6] == ["✓" if labels[j] == labels[i] else "✗" for j in others]


def test_the_images_shown_are_spread_over_the_classes():
    labels = [0] * 50 + [1] * 3 + [2]
    assert sorted(labels[i] for i in report.spread(labels, 3)) == [0, 1, 2]
    assert Counter(labels[i] for i in report.spread(labels, 6)) == {0: 3, 1: 2, 2: 1}
    assert sorted(report.spread(labels, 99)) == list(range(54))


def test_data_shows_counts_checks_and_what_was_put_aside(page):
    text = page.text["data"]
    assert "Of 104 files found, 100 were accepted and 4 put aside" in text
    assert page.row("data", "pretrain") == ["10", "20"]
    assert page.row("data", "not decodable")[0] == "3"
    assert page.row("data", "drift") == ["0.2", "0.5"]
    assert "✗ warning" in text
    assert page.row("data", "a b/é.jpg")[0] == "not an image"


def test_names_from_outside_cannot_break_the_page(project, page):
    assert not any(tag == "script" for tag, _ in page.tags)
    assert "\u202e" not in (project / summary.REPORT).read_text()
    assert READABLE in page.text["confusion"]
    assert READABLE in page.text["neighbours"]
    assert READABLE + ".jpg" in page.text["data"]


def test_provenance_names_the_files_and_versions(project, page):
    text = page.text["provenance"]
    assert files.sha256(project / files.ONNX) in text
    assert shards.digest(shards.tars("pretrain", project / files.SHARDS)) in text
    assert "0123456789abcdef" in text
    assert "0.999999881" in text
    assert "epochs: 2" in text
    versions = report.packages()
    assert torch.__version__.startswith(versions["torch"])
    assert "pytest" not in versions


def test_the_revision_tells_a_changed_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report.revision() == "not in a git repository"
    (tmp_path / "params.yaml").write_text("a: 1")
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "m"]):
        subprocess.run(["git", *command], check=True)
    assert re.fullmatch("[0-9a-f]{40}", report.revision())
    (tmp_path / "params.yaml").write_text("a: 2")
    assert "uncommitted changes" in report.revision()


def test_the_same_run_gives_the_same_page(project, copy, smoke):
    report.run(smoke)
    assert summary.REPORT.read_bytes() == (project / summary.REPORT).read_bytes()


@pytest.mark.parametrize("path", report.INPUTS, ids=str)
def test_a_missing_input_is_named_with_its_stage(copy, smoke, path):
    path.unlink()
    with pytest.raises(UserError, match=f"{re.escape(str(path))} is missing; run `barlow {report.INPUTS[path]}`"):
        report.run(smoke)


def test_shards_of_another_run_are_noticed(copy, smoke):
    shards.write(files.SHARDS / "test-000000.tar", samples("fresh", 5, CLASSES))
    with pytest.raises(UserError, match="run `barlow evaluate` again"):
        report.run(smoke)
