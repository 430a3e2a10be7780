"""What README.md and docs/ show is run as it stands, but for the port, and what they name exists."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from services import encoded, start
from test_architecture import FLOORS

from barlow import cli
from barlow.advice.recipe import MINUTES, SYNTHETIC
from barlow.evaluation import tables
from barlow.evaluation.figures import Evaluation, FineTuning, build

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
DOCUMENTS = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "flows/README.md"))]
DOCUMENTS += [ROOT / name for name in ("benchmarks/RESULTS.md", "data/README.md", "models/README.md")]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
MAP = (ROOT / "docs/how-it-works.md").read_text()
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(language, pages=PAGES):
    """Return the fenced blocks of a language on these pages."""
    return [block for page in pages for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.S)]


def code(path):
    """Return a document's fenced blocks and code spans, one per line."""
    text = path.read_text()
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return "\n".join([*re.findall(r"```\w*\n(.*?)```", text, flags=re.S), *(" ".join(span.split()) for span in spans)])


@pytest.fixture(scope="module")
def service(tmp_path_factory, indexed):
    """A service as after `make serve`, and a folder with a.jpg and b.png."""
    folder = tmp_path_factory.mktemp("readme")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    (folder / "a.jpg").write_bytes(encoded(pixels, "JPEG"))
    (folder / "b.png").write_bytes(encoded(pixels))
    with start(indexed / "models/encoder.onnx", cwd=indexed) as service:
        yield service, folder


def test_curl(service):
    running, folder = service
    lines = [line for block in blocks("bash", [ROOT / "docs/serving.md"]) for line in block.splitlines()]
    assert len(lines) == 5
    assert set("".join(blocks("bash", [ROOT / "README.md"])).splitlines()) <= set(lines)
    results = []
    for line in lines:
        command = "set -e; " + line.replace("127.0.0.1:8000", f"127.0.0.1:{running.port}").replace(
            "curl", "curl -sSf", 1
        )
        done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, (line, done.stderr)
        results.append(done.stdout)
    embedded, classified, searched, encoded_alike, metrics = results
    assert [result["name"] for result in json.loads(embedded)["results"]] == ["a.jpg", "b.png"]
    assert len(json.loads(classified)["results"][0]["probabilities"]) == 3
    assert len(json.loads(searched)["results"][0]["neighbours"]) == 5
    first = json.loads(embedded)["results"][0]["embedding"]
    assert json.loads(encoded_alike)["results"][0]["embedding"] == pytest.approx(first, rel=1e-5)
    assert 'barlow_requests_total{path="/v1/embed",status="200"} 2.0' in metrics


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the client's own dependencies
def test_python_against_the_service_and_the_encoder(service, monkeypatch, indexed):
    from barlow.encoder.encoder import Encoder

    running, folder = service
    monkeypatch.chdir(folder)
    (folder / "models").symlink_to(indexed / "models")
    [program] = [block for block in blocks("python") if "tritonclient" in block]
    names = {}
    exec(program.replace("127.0.0.1:8000", f"127.0.0.1:{running.port}"), names)
    assert names["vector"] == pytest.approx(Encoder("models/encoder.onnx").embed(["a.jpg"]), rel=1e-4, abs=1e-4)
    programs = [block for block in blocks("python") if "from barlow import Encoder" in block]
    assert programs
    for program in programs:
        exec(program, names)
        assert names["vectors"] == pytest.approx(Encoder("models/encoder.onnx").embed(["a.jpg", "b.png"]))


def test_the_training_loop_of_ones_own_runs():
    [program] = blocks("python", [ROOT / "docs/python.md"])
    names = {}
    exec(program, names)
    z_a, z_b = ((z - z.mean(0)) / z.std(0, correction=0) for z in (names["z_a"].double(), names["z_b"].double()))
    assert names["c"].detach().numpy() == pytest.approx((z_a.T @ z_b / 64).detach().numpy(), abs=1e-3)


def test_python_page_names_all_that_is_public():
    import barlow

    text = (ROOT / "docs/python.md").read_text()
    assert {name for name in barlow.__all__ if f"| `{name}" in text} == {*barlow.__all__}


def test_images_of_ones_own_get_other_settings_wherever_the_source_is_changed():
    """README.md, docs/own-images.md and the comment on `ingest.source` name the command that chooses them."""
    text = (ROOT / "params.yaml").read_text()
    for named in (README, (ROOT / "docs/own-images.md").read_text(), text[: text.index("  source: synthetic")]):
        assert "`barlow recommend" in named
    planned = f"planned for | {MINUTES['cpu']:g} minutes | {MINUTES['cuda']:g} minutes |"
    assert planned in (ROOT / "docs/own-images.md").read_text()


def test_the_page_of_settings_lists_those_that_recommend_chooses():
    text = (ROOT / "docs/settings.md").read_text().partition("## Settings for your own images")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(\w+\.\w+)`", text)) == set(SYNTHETIC)


def test_readme_is_short():
    assert len(README.split()) <= 900, "README.md is the front door: move details into docs/"
    assert (ROOT / "docs/report.png").stat().st_size < 300_000


def test_readme_names_the_figure_of_its_table_in_the_text():
    [linear] = re.findall(r"^linear probe +([\d.]+)", README, flags=re.M)
    assert f"{linear} % in float32 (the table)" in " ".join(README.split())


def test_readme_lists_every_page():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", README))
    assert linked == {f"docs/{page.name}" for page in PAGES[1:]}


def anchor(heading):
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@each_document
def test_every_relative_link_leads_to_a_file_and_a_heading(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"https?://", target):
            continue
        name, _, heading = target.partition("#")
        file = path.parent / name if name else path
        assert file.is_file(), f"{target} leads nowhere"
        if heading:
            assert heading in map(anchor, re.findall(r"^#+ (.*)$", file.read_text(), flags=re.M)), target


def targets(pattern=""):
    """Return the targets of the Makefile whose line has the pattern."""
    return set(re.findall(rf"^([a-z0-9-]+):{pattern}", (ROOT / "Makefile").read_text(), flags=re.M))


def commands():
    """Return the commands that `barlow` accepts."""
    [choices] = [action.choices for action in cli.parser()._actions if action.dest == "command"]
    return set(choices)


@each_document
def test_every_command_named_exists(path):
    text = code(path)
    assert set(re.findall(r"\bmake ([a-z][a-z0-9-]*)", text)) <= targets()
    assert set(re.findall(r"(?<!from )\bbarlow(?:\.cli)? ([a-z]+)", text)) <= commands()


def test_every_command_is_on_the_page_of_commands():
    text = code(ROOT / "docs/commands.md")
    assert set(re.findall(r"\bmake ([a-z0-9-]+)", text)) >= targets(".*## ")
    assert set(re.findall(r"\bbarlow ([a-z]+)", text)) >= commands()


@each_document
def test_every_file_of_the_project_named_exists(path):
    text = code(path)
    named = set(re.findall(r"\b(?:src|tests|benchmarks|presets|flows|docs)/[\w./-]*\w", text))
    rooms = "|".join(folder.name for folder in (ROOT / "src/barlow").iterdir() if folder.is_dir())
    named |= {f"src/barlow/{name}" for name in re.findall(rf"(?<![\w/])(?:{rooms})/\w+\.py", text)}
    assert [name for name in sorted(named) if "NAME" not in name and not (ROOT / name).exists()] == []


@each_document
def test_every_setting_named_exists(path):
    for section, key in re.findall(rf"(?<![\w/.])({'|'.join(PARAMS)})\.([a-z0-9_]+)", code(path)):
        assert key in PARAMS[section] or key in ("py", "json"), f"{section}.{key} is not in params.yaml"


@pytest.mark.parametrize(
    "path", [*PAGES, ROOT / "flows/README.md", ROOT / "data/README.md"], ids=lambda path: path.stem
)
def test_no_page_uses_a_name_that_has_changed(path):
    old = r"\bdata\.[a-z_]+\b(?!/)|validation\.json|report --compare|off_diagonal|on_diagonal"
    assert re.findall(old, code(path)) == []


def test_the_map_names_every_command_and_every_part():
    package = ROOT / "src/barlow"
    entries = {path.parent.name for path in package.glob("*/__init__.py")} | {
        path.stem for path in package.glob("*.py")
    }
    listing = re.search(r"^ingest validate.*?```", MAP, flags=re.S | re.M).group()
    named = " ".join(re.findall(r"^[a-z]+(?: [a-z]+)*(?=  )", listing, flags=re.M)).split()
    named += re.findall(r"^\| \d \| `(\w+)`", MAP, flags=re.M)
    assert sorted(named) == sorted(entries - {"__init__", "cli"})


def test_the_map_has_the_floors_of_the_architecture():
    floors = {name: int(number) for number, name in re.findall(r"^\| (\d) \| `(\w+)`", MAP, flags=re.M)}
    assert floors == {name: i + 1 for i, floor in enumerate(FLOORS) for name in floor if name in floors}


def test_the_map_tells_what_each_stage_writes():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", MAP, flags=re.M))
    assert list(rows) == list(stages)
    for name, stage in stages.items():
        outs = {out if isinstance(out, str) else next(iter(out)) for out in stage.get("outs", [])}
        assert set(re.findall(r"`([^`]+)`", rows[name])) == outs, name


def recorded(name):
    """What a person recorded of a run, and no stage writes: `make repro` may have left other figures in reports/."""
    return json.loads((ROOT / f"benchmarks/{name}.json").read_text())


def test_the_results_are_what_summary_prints_of_the_recorded_run():
    record = recorded("default_run")
    evaluation = build(Evaluation, record["evaluate"], "default_run.json")
    finetuning = build(FineTuning, record["finetune"], "default_run.json")
    assert f"```\n{tables.table(evaluation, finetuning)}\n```" in README


def test_what_it_says_of_other_seeds_is_what_they_came_out_at():
    first, *others = (record["encoders"]["pretrained"] for record in recorded("seeds"))
    lower = [round(first[kind]["top1"] - other[kind]["top1"]) for kind in ("linear", "knn") for other in others]
    assert f"two other seeds came out {min(lower)} to {max(lower)} points lower" in README


def test_each_row_of_the_seeds_is_that_of_the_recorded_metrics():
    """Figures with an interval, in their order: linear probe and kNN, each of the encoder and of a random one."""
    results = (ROOT / "benchmarks/RESULTS.md").read_text().partition("\n| seed |")[2]
    seeds = recorded("seeds")
    for row, metrics in zip(results.splitlines()[2:], seeds, strict=False):
        shown = re.findall(r"([\d.]+) \(([\d.]+)-([\d.]+)\)", row)
        assert row.startswith(f"| {metrics['seed']} |")
        accuracies = [metrics["encoders"][e][kind] for kind in ("linear", "knn") for e in ("pretrained", "random")]
        assert [list(cell) for cell in shown] == [
            [f"{accuracy[key]:.1f}" for key in ("top1", "low", "high")] for accuracy in accuracies
        ]
    assert len(seeds) >= 3
