import csv
import dataclasses
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import stages
import torch
from stages import CLASSES, HOSTILE, READABLE

from barlow import report
from barlow.core import files, provenance, webdataset
from barlow.core.errors import UserError
from barlow.core.weights import load_weights, save_weights
from barlow.evaluation import features

SECTIONS = ["headline", "few-labels", "data", "views", "curves", "correlation", "map", "neighbours", "confusion"]
SECTIONS += ["classes", "claims", "training", "provenance"]


class Page(HTMLParser):
    """A parsed page: text and cells per section, all tags with their attributes, and the numbers with a `data-key`."""

    def __init__(self, html):
        super().__init__()
        self.text, self.cells, self.tags = dict.fromkeys(SECTIONS, ""), {name: [] for name in SECTIONS}, []
        self.figures = []
        self.section, self.in_cell, self.key = None, False, None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.key = dict(attributes).get("data-key")
        if tag == "section":
            self.section = dict(attributes)["id"]
        elif tag in ("td", "th"):
            self.cells[self.section].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.key:
            self.figures.append((self.section, self.key, float(re.match(r"[\d.]+", data)[0])))
            self.key = None
        if self.section:
            self.text[self.section] += data
        if self.in_cell:
            self.cells[self.section][-1] += data.strip() + " "

    def row(self, section, name):
        """Return the two cells after the one that says `name`."""
        cells = [cell.strip() for cell in self.cells[section]]
        return cells[cells.index(name) + 1 :][:2]


@pytest.fixture(scope="module")
def project(tmp_path_factory, smoke):
    """A project folder after every stage and the report."""
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        stages.write(claimed=smoke.ingest)
        report.run(smoke)
    return root


@pytest.fixture
def copy(project, tmp_path, monkeypatch):
    """A copy of the project to change, as the working folder."""
    monkeypatch.chdir(shutil.copytree(project, tmp_path / "copy"))


@pytest.fixture
def page(project):
    return Page((project / files.REPORT).read_text())


def accuracies(project):
    """Return every accuracy of the metrics, and its ends, by the dotted name in its JSON file."""
    found = {}

    def walk(value, name):
        if isinstance(value, dict):
            for key, part in value.items():
                walk(part, f"{name}.{key}" if name else key)
        elif name.endswith((".top1", ".low", ".high")) and not name.startswith("gains.") and ".knn_val." not in name:
            found[name] = value

    for name in ("evaluate", "finetune"):
        walk(files.read_json(project / f"reports/{name}.json"), "")
    return found


def render(params):
    report.run(params)
    return Page(files.REPORT.read_text())


def test_every_section_has_a_heading_and_content(page):
    assert [attributes["id"] for tag, attributes in page.tags if tag == "section"] == SECTIONS
    assert sum(tag == "h2" for tag, _ in page.tags) == len(SECTIONS)
    assert min(len(text.split()) for text in page.text.values()) > 30
    assert [a["href"] for tag, a in page.tags if tag == "a"] == [f"#{name}" for name in SECTIONS[1:]]


def test_the_page_is_one_small_file_without_scripts(project, page):
    html = (project / files.REPORT).read_text()
    assert len(html) < 2_000_000
    addresses = [a[key] for _, a in page.tags for key in ("src", "href", "srcset", "data", "action") if key in a]
    assert all(address.startswith(("data:image/", "#")) for address in addresses)
    assert not re.search(r"https?://|url\((?!data:image/)|@import", html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}


def test_every_image_has_a_description(page, smoke):
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) > 3 * smoke.report.images + 3 + 7 * smoke.report.images
    assert all(picture["alt"] for picture in pictures)
    drawings = [a for tag, a in page.tags if tag == "svg"]
    assert all(a.get("aria-label") or a.get("aria-hidden") for a in drawings)
    assert all(a["aria-label"] for tag, a in page.tags if tag == "input")


def test_every_accuracy_on_the_page_is_that_of_the_metrics(project, page):
    metrics = accuracies(project)
    assert len(page.figures) > 60
    for _, key, shown in page.figures:
        assert shown == round(metrics[key], 1), key
    assert {key for section, key, _ in page.figures if section in ("headline", "few-labels")} == {*metrics}
    in_headline = {key for section, key, _ in page.figures if section == "headline"}
    assert in_headline == {key for key in metrics if "per class" not in key}


def test_the_headline_says_what_evaluate_measured(project, page):
    encoders = files.read_json(project / "reports/evaluate.json")["encoders"]
    text = " ".join(page.text["headline"].split())
    few = encoders["pretrained"]["few_labels"]["10 %"]["linear"]
    for accuracy in (encoders["pretrained"]["linear"], encoders["random"]["linear"], encoders["pixels"]["knn"], few):
        top1, low, high = (accuracy[key] for key in ("top1", "low", "high"))
        assert f"{top1:.1f} % {low:.1f} to {high:.1f}" in text
        assert {"class": "bar", "style": f"width:{top1}%"} in [a for _, a in page.tags]
    assert "Pretraining paid: on these images the encoder is better than the same network untrained and pixels." in text
    assert text.count("+9.1 points (+5.5 to +12.5)") == 4
    assert "What to try" not in text
    assert "chance, 1 of 5 classes: 20.0" in text
    assert page.row("headline", "effective rank") == ["87.65", "9.88"]
    assert page.row("headline", "correlation") == ["0.12", "0.12"]
    assert page.row("headline", "uniformity") == ["−2.35", "−2.35"]


def test_pretraining_that_did_not_pay_is_told_with_what_to_try(copy, smoke):
    path = files.REPORTS / "evaluate.json"
    metrics = files.read_json(path)
    metrics["gains"]["pixels"]["knn"] = {"points": -15.8, "low": -18.2, "high": -13.4}
    files.write_json(path, metrics)
    page = render(smoke)
    text = " ".join(page.text["headline"].split())
    assert "Pretraining did not pay everywhere: on these images the encoder is worse than pixels by kNN." in text
    assert "Worse than pixels by kNN: −15.8 points (−18.2 to −13.4)" in text
    tries = [text.index(word) for word in ("barlow recommend", "pretrain.epochs", "barlow tune", "views.size")]
    assert tries == sorted(tries)
    assert "`" not in text
    assert ("div", {"class": "told unpaid"}) in page.tags


def test_few_steps_and_few_val_images_are_noted(copy, smoke):
    text = render(smoke).text
    assert "Note: The linear probe's l2 was chosen on 10 labelled images of val." in text["headline"]
    assert "steps are few" not in text["headline"]
    assert "14 epochs, 1,526 steps in 245 s" in text["curves"]
    files.write_json(files.PRETRAINING, files.read_json(files.PRETRAINING) | {"steps": 14})
    assert "Note: 14 steps are few: " in render(smoke).text["headline"]


def test_an_encoder_of_any_name_has_its_bars_its_line_and_its_columns(copy, smoke):
    path = files.REPORTS / "evaluate.json"
    metrics = files.read_json(path)
    metrics["encoders"] |= {"v<1>": json.loads(json.dumps(metrics["encoders"]["random"]))}
    metrics["encoders"]["v<1>"]["health"]["effective_rank"] = 55.55
    metrics["gains"]["v<1>"] = metrics["gains"]["random"]
    files.write_json(path, metrics)
    page = render(smoke)
    keys = {key for section, key, _ in page.figures if section in ("headline", "few-labels") and "v<1>" in key}
    assert keys == {key for key in accuracies(files.Path()) if key.startswith("encoders.v<1>.")}
    assert page.row("headline", "effective rank") == ["87.65", "9.88"]
    assert "55.55" in page.cells["headline"][page.cells["headline"].index("9.88 ") + 1]
    assert [cell.strip() for cell in page.cells["few-labels"][:5]] == [
        "labels",
        "pretrained",
        "random",
        "pixels",
        "v<1>",
    ]
    assert sum(tag == "g" and a["class"] == "s6" for tag, a in page.tags) == 1
    assert "better than the same network untrained, pixels and v<1>." in " ".join(page.text["headline"].split())


def test_without_baselines_the_page_says_so(copy, smoke):
    path = files.REPORTS / "evaluate.json"
    metrics = files.read_json(path)
    files.write_json(path, metrics | {"encoders": {"pretrained": metrics["encoders"]["pretrained"]}, "gains": {}})
    page = render(smoke)
    assert "extract.baselines" in page.text["headline"]
    assert "same network untrained" not in page.text["headline"]
    assert page.row("headline", "effective rank") == ["87.65", ""]
    assert {key for _, key, _ in page.figures if key.startswith(("encoders.random", "encoders.pixels"))} == set()


def test_without_labels_the_page_says_so(tmp_path, monkeypatch, smoke):
    monkeypatch.chdir(tmp_path)
    stages.write(labelled=False)
    page = render(smoke)
    assert "No accuracy" in page.text["headline"]
    assert "87.7" in page.text["headline"]
    assert page.figures == []
    for section in ("few-labels", "confusion", "classes"):
        assert "Nothing to show" in page.text[section]
    assert "✓" not in page.text["neighbours"]
    html = files.REPORT.read_text()
    section = html.partition('<section id="neighbours">')[2].partition("</section>")[0]
    assert section.count('<img class="pixels"') == 7 * smoke.report.images
    assert sum(tag == "input" for tag, _ in page.tags) == 60
    assert "make claims" in page.text["claims"]


@pytest.mark.parametrize("images", [0, 1, 2, 5])
def test_hardly_any_test_images(tmp_path, monkeypatch, smoke, images):
    monkeypatch.chdir(tmp_path)
    stages.write(test=images, epochs=1, labelled=False)
    page = render(smoke)
    assert ("Nothing to show" in page.text["neighbours"]) == (images < 2)
    assert ("Nothing to show" in page.text["map"]) == (images < 4)


def test_curves_and_pretraining_figures(project, page):
    metrics = files.read_json(project / "reports/pretrain.json")
    assert f"{metrics['loss']:.4g} at the end" in page.text["curves"]
    assert "412 images/s" in page.text["training"]
    assert "47 at the last" in page.text["training"]  # the weights' norm
    lines = [a["points"].split() for tag, a in page.tags if tag == "polyline"]
    assert sum(len(line) == 14 for line in lines) == len(report.CURVES)


def test_a_supervised_network_that_is_ahead_is_told_at_once(copy, smoke):
    path = files.REPORTS / "finetune.json"
    for top1, ahead in {50.0: False, 99.0: True}.items():
        metrics = files.read_json(path)
        metrics["supervised"]["network"]["accuracy"] = {"top1": top1, "low": top1 - 1, "high": top1 + 1}
        files.write_json(path, metrics)
        assert (f"supervised network of the same shape is ahead, at {top1}" in render(smoke).text["headline"]) == ahead


def test_a_run_of_one_step(tmp_path, monkeypatch, smoke):
    monkeypatch.chdir(tmp_path)
    stages.write(test=1, epochs=1)
    before = load_weights(files.CORRELATION)[0]["before"]
    save_weights(files.CORRELATION, {"before": before}, {})
    page = render(smoke)
    assert "1 epoch, 109 steps in" in page.text["curves"]
    assert "last step" not in page.text["correlation"]
    assert "middle of the run" not in page.text["correlation"]


def test_a_single_class_and_an_empty_quarantine(tmp_path, monkeypatch, smoke):
    monkeypatch.chdir(tmp_path)
    stages.write(classes=["all"])
    stages.table(files.QUARANTINE, ["path", "reason"], [])
    page = render(smoke)
    assert "No file was quarantined" in page.text["data"]
    assert "The probe made no mistake" in page.text["confusion"]


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


def test_many_classes_are_shown_as_a_picture_and_by_their_ends(tmp_path, monkeypatch, smoke):
    monkeypatch.chdir(tmp_path)
    stages.write(classes=[f"class {i}" for i in range(1000)], test=300)
    page = render(smoke)
    assert "Confusion matrix of 1000 classes" in [a.get("alt") for _, a in page.tags]
    assert "The 15 best of 300 classes" in page.text["classes"]
    assert len(page.cells["confusion"]) == 0
    assert len(page.cells["classes"]) == 2 * 5 * 16
    assert "too many for a key" in page.text["map"]
    assert "The 20 classes with the fewest images, of 1000" in page.text["data"]


def test_neighbours_are_the_most_similar_other_images(project, page, smoke, monkeypatch):
    monkeypatch.chdir(project)
    test = features.load("pretrained", "test")
    vectors, labels = test.features.double().numpy(), test.labels.numpy()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    shares = {}
    for i in range(len(unit)):
        others = sorted((j for j in range(len(unit)) if j != i), key=lambda j: -unit[i] @ unit[j])[:6]
        shares[i] = ((labels[others] == labels[i]).sum(), sorted(CLASSES[labels[j]] for j in others))
    captions = [a["title"] for tag, a in page.tags if tag == "figcaption" and a.get("title") in map(printed, CLASSES)]
    counts = [int(n) for n in re.findall(r"(\d) of 6", page.text["neighbours"])]
    assert len(counts) == smoke.report.images
    most, least = (sorted((share for share, _ in shares.values()), reverse=up) for up in (True, False))
    half = smoke.report.images // 2
    assert counts[0] == most[0]
    assert counts[half] == least[0]
    for row, count in enumerate(counts):
        query, *shown = captions[7 * row :][:7]
        assert shown.count(query) == count
        assert (count, sorted(shown)) in [(share, sorted(map(printed, names))) for share, names in shares.values()]


def printed(name):
    return name.replace(HOSTILE, READABLE)


def test_data_shows_counts_checks_and_the_quarantine(page):
    text = page.text["data"]
    assert "Of 104 files found, 100 were accepted and 4 quarantined" in text
    assert page.row("data", "pretrain") == ["10", "20"]
    assert page.row("data", "not decodable")[0] == "3"
    assert page.row("data", "drift") == ["0.2", "0.5"]
    assert "✗ warning" in text


def test_names_from_outside_cannot_break_the_page(project, page):
    assert not any(tag == "script" for tag, _ in page.tags)
    assert "\u202e" not in (project / files.REPORT).read_text()
    assert READABLE in page.text["confusion"]
    assert READABLE in page.text["neighbours"]
    assert READABLE + ".jpg" in page.text["data"]


def test_provenance_names_the_files_and_versions(project, page):
    text = page.text["provenance"]
    assert files.sha256(project / files.ONNX) in text
    assert webdataset.digest(webdataset.tars("pretrain", project / files.SHARDS)) in text
    assert "0123456789abcdef" in text
    assert "0.999999881" in text
    assert "epochs: 2" in text


def test_a_quarantined_file_is_shown_if_something_of_it_can_be_seen(page):
    names = [a["alt"] for tag, a in page.tags if tag == "img" and a["alt"].startswith("What can be seen")]
    assert names == [f"What can be seen of {READABLE}.jpg"]
    assert "not an image" in page.text["data"]
    assert page.text["data"].count("nothing") == 1


def test_claims_are_told_with_their_verdict_and_every_run(page):
    text = " ".join(page.text["claims"].split())
    for verdict in ("✓ Shown here", "○ Not shown here", "✗ Contradicted here"):
        assert verdict in text
    assert "0123abcd" in text
    assert "61.2 57.0 to 65.5" in text
    assert "all runs failed" in text
    assert text.count("At most 2 points less.") == 3
    assert page.row("claims", "64") == ["63.0", "failed"]
    assert page.row("claims", "128") == ["failed", "–"]


def test_the_same_run_gives_the_same_page(project, copy, smoke):
    report.run(smoke)
    assert files.REPORT.read_bytes() == (project / files.REPORT).read_bytes()


@pytest.mark.parametrize("path", report.INPUTS, ids=str)
def test_a_missing_input_is_named_with_its_stage(copy, smoke, path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=f"{re.escape(str(path))} is missing; run `barlow {report.INPUTS[path]}`"):
        report.run(smoke)


def test_shards_of_another_run_are_noticed(copy, smoke):
    webdataset.write(files.SHARDS / "test-000000.tar", stages.samples("fresh", 5, CLASSES))
    with pytest.raises(UserError, match="run `barlow extract` again"):
        report.run(smoke)


def test_what_is_known_of_the_encoder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_weights(files.ENCODER, {"w": torch.zeros(1)}, {"data": "digest", "steps": 872, "version": "1.2"})
    stages.export()
    files.write_json(files.REPORTS / "pretrain.json", {"hardware": "8 x GPU", "processes": 8})
    facts = report.facts()
    assert facts["Encoder"]["training images, SHA-256"] == "digest"
    assert facts["Encoder"]["training: steps"] == "872"
    assert facts["Encoder"]["training: hardware"] == "8 x GPU"
    assert facts["models/encoder.onnx"]["SHA-256"] == files.sha256(files.ONNX)
    assert facts["models/encoder.onnx"]["space"] == "0123456789abcdef"
    assert "classes" not in facts["models/encoder.onnx"]
    assert facts["This page"]["hardware"] == provenance.hardware()


def test_claims_are_shown_with_the_data_they_were_tested_on_alone(tmp_path, monkeypatch, smoke):
    monkeypatch.chdir(tmp_path)
    ingest = smoke.ingest
    assert report.claims(ingest) == {"claims": [], "elsewhere": None}
    files.write_json(files.CLAIMS, stages.claims(ingest))
    assert report.claims(ingest)["claims"]
    more = dataclasses.replace(ingest, synthetic=dataclasses.replace(ingest.synthetic, unlabelled=401))
    assert report.claims(more) == {"claims": [], "elsewhere": "synthetic"}
    photos = dataclasses.replace(ingest, source="photos")
    assert report.claims(photos) == {"claims": [], "elsewhere": "synthetic"}
    files.write_json(files.CLAIMS, stages.claims(photos))
    assert report.claims(dataclasses.replace(more, source="photos"))["claims"]  # nothing of these is drawn
    points = {"claims": [{"points": [{"mean": 1.0, "low": 0, "high": 2, "runs": [{"linear_top1": 1}]}]}]}
    data = {"data": stages.claims(ingest)["data"]}
    for document in (data | points, data | {"claims": [{}]}, data | {"claims": 1}, points | {"data": "synthetic"}, {}):
        files.write_json(files.CLAIMS, document)
        with pytest.raises(
            UserError, match=r"reports/claims\.json is damaged or of an older version; run `barlow claims`"
        ):
            report.claims(ingest)


def test_claims_of_other_data_are_named_and_how_to_test_them_here(copy, smoke, change):
    for values, remedy in (
        ({"source": "/data/photos"}, "set its data to /data/photos, and run make claims PRESET=mine"),
        ({"val_fraction": 0.1}, "synthetic with other settings of ingest. make claims tests the claims here"),
    ):
        page = render(change(smoke, "ingest", **values))
        text = " ".join(page.text["claims"].split())
        assert "Not tested on these images: reports/claims.json is of other data, synthetic" in text
        assert remedy in text
        assert "Contradicted" not in text
