"""`barlow tune`: short runs with other learning rates, crops and lambdas, as DVC experiments; say which are better.

One setting at a time: its values are tried, the best is kept, and the next setting is tried with it. Runs are judged by
kNN on val where there are labels, else by the effective rank. Writes reports/tune.json, and with --apply params.yaml.

An experiment's name is a hash of all its inputs: run again, the command goes on where it was interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from barlow.advice import recipe, speed
from barlow.core import files, webdataset
from barlow.core.errors import UserError
from barlow.evaluation import features, figures
from barlow.evaluation.figures import Evaluation
from barlow.experiments import grid, runs, tuning
from barlow.experiments.tuning import Factor, Outcome
from barlow.settings import editing
from barlow.settings.params import Params

MINUTES = {"cpu": 12.0, "cuda": 30.0}  # of pretraining in all runs, if nobody says how many
READ = ("src", "params.yaml", "dvc.yaml", "data/source.json", "data/start.json")  # the revision tells if they changed


def run(params: Params, minutes: float | None = None, apply: bool = False) -> None:
    """Run the experiments that are missing, print the table and the choice; write them to params.yaml with `apply`.

    Raises:
        UserError: the minutes are not above 0, the folder is not in git, DVC cannot run, or no run came to an end.
        Interrupted: SIGINT or SIGTERM came; run again to go on.
    """
    recipe.require_minutes(minutes)
    runs.require_git()
    runs.dvc("repro", "shard")
    labelled = all(next(features.labelled(split), None) for split in ("train", "val"))
    plan = planned(params, minutes or MINUTES[speed.kind(params)], labelled)
    tried = [factor for factor in tuning.factors(params) if factor.name in plan["factors"]]
    report: dict[str, Any] = {"plan": plan, "runs": [], "choices": [], "values": {}}
    files.write_json(files.TUNING, report)  # already now: a call that goes on with this one needs the plan
    labels = tuning.present(params)
    for factor in tried:
        outcomes = measured(params, factor, labels, report)
        now = labels[factor.name]
        choices = {kind: tuning.better(outcomes, now, kind == "labels") for kind in ("labels", "rank")}
        chosen = choices["labels" if labelled else "rank"]
        report["choices"].append({"factor": factor.name, "before": now, "chosen": chosen} | choices)
        report["values"] |= factor.levels.get(chosen, {})
        labels[factor.name] = chosen
        files.write_json(files.TUNING, report)
    print(table(report, labelled))
    if report["values"] and not apply:
        print("`barlow tune --apply` writes this into params.yaml; no run is repeated.")
    elif report["values"]:
        by = "by kNN on val" if labelled else "by the effective rank"
        notes = {key: f"{value}: barlow tune, {by}" for key, value in report["values"].items()}
        print("\n".join(editing.edit(editing.nested(report["values"]), "the tuned settings", notes)))


def planned(params: Params, minutes: float, labelled: bool) -> dict[str, Any]:
    """Return which factors are tuned and the epochs of each run: as before, if this call goes on with an earlier one.

    Effective ranks of encoders that were trained on other views do not compare. So without labels, crops are not tuned.
    """
    key = grid.name("tune", grid.apply(params, {}, "params.yaml"), runs.inputs())
    before = figures.document(files.TUNING)["plan"] if files.TUNING.exists() else {}
    if (before.get("key"), before.get("minutes")) == (key, minutes):
        return dict(before)
    tried = [factor for factor in tuning.factors(params) if labelled or factor.name != "crop area"]
    tars, batch = webdataset.tars("pretrain"), params.pretrain.batch_size
    steps = max(webdataset.count(tars) // batch, 1)
    seconds = steps * batch * speed.seconds_per_image(params, tars)
    count, epochs = tuning.plan(tried, seconds, steps, minutes, params.pretrain.epochs)
    number = 1 + sum(len(factor.levels) for factor in tried[:count])
    names = [factor.name for factor in tried[:count]]
    print(
        f"{number} runs of {epochs} epochs ({epochs * steps:,} steps), about {number * epochs * seconds / 60:.1f} "
        f"minutes of pretraining in all: {', '.join(names)}",
        flush=True,
    )
    return {"key": key, "minutes": minutes, "factors": names, "epochs": epochs}


def measured(
    params: Params, factor: Factor, labels: Mapping[str, str], report: dict[str, Any]
) -> dict[str, Outcome | None]:
    """Run what is missing of a factor's values, with what is chosen so far; return the outcomes by label.

    Each run is entered into `report["runs"]`, once.
    """
    epochs, p = report["plan"]["epochs"], params.pretrain
    short = {
        "pretrain.epochs": epochs,
        "pretrain.warmup_epochs": round(p.warmup_epochs * epochs / p.epochs, 4),
        "pretrain.checkpoint_seconds": 100_000,
        "extract.baselines": False,
        "evaluate.draws": 0,
    }
    inputs, values, named = runs.inputs(), {}, {}
    for label, level in {labels[factor.name]: {}, **factor.levels}.items():
        settings = {**short, **report["values"], **level}
        name = grid.name("tune", grid.apply(params, settings, f"{factor.name} {label}"), inputs)
        named[label], values[name] = name, settings
    failed = runs.run_missing(values, 1)
    done, outcomes = runs.finished(), dict[str, Outcome | None]()
    for label, name in named.items():
        outcomes[label] = None if name in failed else outcome(name, done[name])
        if name not in [row["experiment"] for row in report["runs"]]:
            result = {"failed": failed[name]} if name in failed else vars(outcomes[label])
            row = {"experiment": name, "settings": {**labels, factor.name: label}, "params": values[name]}
            report["runs"].append(row | result)
    if not any(outcomes.values()):
        raise UserError(f"every run failed: {next(iter(failed.values()))}")
    return outcomes


def outcome(name: str, reference: str) -> Outcome:
    """Read what a finished experiment came to."""
    document = runs.read(reference, files.EVALUATION)
    evaluation = figures.build(Evaluation, document, f"{files.EVALUATION} of {name}")
    scores = evaluation.encoders["pretrained"]
    assert scores.health
    return Outcome(scores.health.effective_rank, scores.knn_val.top1 if scores.knn_val else None, evaluation.images.val)


def table(report: Mapping[str, Any], labelled: bool) -> str:
    """Return the runs and the choices as Markdown."""
    lines = ["| learning rate | crop area | lambda | kNN on val, % | effective rank |", "|---|---|---|---|---|"]
    for row in report["runs"]:
        knn = "" if row.get("knn") is None else f"{row['knn']:.1f}"
        result = [row["failed"], ""] if "failed" in row else [knn, f"{row['effective_rank']:.1f}"]
        lines.append(f"| {' | '.join([*row['settings'].values(), *result])} |")
    lines.append("")
    for choice in report["choices"]:
        told = f"{choice['factor']}: {choice['chosen']}"
        told += " (as it is)" if choice["chosen"] == choice["before"] else f" instead of {choice['before']}"
        if labelled:
            same = choice["labels"] == choice["rank"]
            told += f" by kNN; {'the same' if same else choice['rank']} by the effective rank"
        lines.append(told)
    return "\n".join(lines)
