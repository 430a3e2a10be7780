"""`barlow claims`: test the paper's claims by DVC experiments; write reports/claims.json and print a table per claim.

The points of each claim and the rule that decides it are in presets/claims/NAME.yaml, written before any run. An
experiment's name is a hash of all its inputs: if two claims share an experiment, it runs once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from barlow.core import files, provenance
from barlow.data import sources
from barlow.evaluation import figures, intervals
from barlow.evaluation.figures import Evaluation
from barlow.experiments import grid, runs
from barlow.settings.params import Params

READ = (
    "src",
    "params.yaml",
    "dvc.yaml",
    "data/source.json",
    "data/start.json",
    "presets/claims",
)  # the revision tells if they changed
Interval = tuple[float, float]


def run(params: Params, names: list[str], preset: str, jobs: int) -> None:
    """Run the missing experiments of some claims, or of all; write and print the verdicts.

    Raises:
        UserError: no such claim or preset, other data than the preset is for, or DVC cannot run at all.
        Interrupted: SIGINT or SIGTERM came; run again to go on.
    """
    plan = grid.load(preset, params)
    chosen = grid.choose(plan, names)
    runs.require_git()
    runs.dvc("repro", "shard")
    inputs = runs.inputs()

    def called(point: grid.Point, seed: int) -> str:
        return grid.name(f"claims-{preset}", grid.apply(params, grid.overrides(plan, point, seed), preset), inputs)

    todo = {
        called(point, seed): grid.overrides(plan, point, seed)
        for seed in plan.seeds  # every point for one seed, then every point for the next
        for claim in chosen
        for point in claim.points
    }
    failed = runs.run_missing(todo, jobs)
    done = {name: reference for name, reference in runs.finished().items() if name in todo}
    results = {name: evaluation(name, reference) for name, reference in done.items()}
    seconds = sum(runs.read(reference, files.PRETRAINING)["seconds"] for reference in done.values())
    revision = provenance.revision(READ)
    base = called(grid.Point("", {}), plan.seeds[0])

    judged = {}
    for claim in chosen:
        points = []
        for point in claim.points:
            outcomes = [outcome(seed, called(point, seed), results, failed) for seed in plan.seeds]
            images = next((result.images.test for result in results.values()), 0)
            is_base = called(point, plan.seeds[0]) == base
            points.append({"label": point.label, "base": is_base, "params": point.params} | measure(outcomes, images))
        judged[claim.name] = judge(claim, points) | {"revision": revision}
        print(table(judged[claim.name]), end="\n\n", flush=True)
    data = sources.identity(params.ingest)
    previous = files.read_json(files.CLAIMS) if files.CLAIMS.exists() else {}
    same = previous.get("preset") == preset and previous.get("data") == data
    others = {claim["name"]: claim for claim in previous["claims"]} if same else {}
    judged = others | judged
    files.write_json(
        files.CLAIMS,
        {
            "preset": preset,
            "revision": revision,
            "hardware": provenance.hardware(),
            "seconds": seconds,  # of pretraining, in all experiments of this call
            "seeds": plan.seeds,
            "data": data,
            "claims": [judged[claim.name] for claim in plan.claims if claim.name in judged],
        },
    )


def evaluation(name: str, reference: str) -> Evaluation:
    """Read the reports/evaluate.json of a finished experiment."""
    return figures.build(Evaluation, runs.read(reference, files.EVALUATION), f"{files.EVALUATION} of {name}")


def outcome(seed: int, name: str, results: Mapping[str, Evaluation], failed: Mapping[str, str]) -> dict[str, Any]:
    """Return an experiment's top-1 accuracy, or why it has none."""
    if name not in results:
        return {"seed": seed, "failed": failed[name]}
    linear = results[name].encoders["pretrained"].linear
    if not linear:
        return {"seed": seed, "failed": "no accuracy: train, val or test has no labels"}
    return {"seed": seed, "top1": linear.top1, "experiment": name}


def measure(runs: list[dict[str, Any]], images: int) -> dict[str, Any]:
    """Return a point's mean and 95 % interval over the runs that did not fail; None if all failed."""
    percents = [each["top1"] for each in runs if "top1" in each]
    if not percents:
        return {"mean": None, "low": None, "high": None, "runs": runs}
    low, high = 0.0, 100.0  # one run does not tell the spread
    if len(percents) > 1:
        low, high = intervals.mean_interval(percents, images)
    return {"mean": statistics.fmean(percents), "low": low, "high": high, "runs": runs}


def difference(point: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, Interval]:
    """Return point - other and its 95 % interval from those of the two means (Zou and Donner, Stat. Med. 27, 2008).

    A point whose runs all failed is below any other.
    """
    if point["mean"] is None or other["mean"] is None:
        worst = -math.inf if other["mean"] is not None else math.nan
        return worst, (worst, worst)
    mean = point["mean"] - other["mean"]
    below = math.hypot(point["mean"] - point["low"], other["high"] - other["mean"])
    above = math.hypot(point["high"] - point["mean"], other["mean"] - other["low"])
    return mean, (mean - below, mean + above)


def verdict(rule: grid.Rule, intervals: list[Interval]) -> str:
    """Decide: shown if all differences are on the rule's side of its bound; contradicted if one is beyond."""
    sign = 1 if rule.difference == "above" else -1
    ends = [sorted((sign * (low - rule.points), sign * (high - rule.points))) for low, high in intervals]
    if any(high < 0 for _, high in ends):
        return "contradicted"
    return "shown" if all(low > 0 for low, _ in ends) else "not shown"


def judge(claim: grid.Claim, points: list[dict[str, Any]]) -> dict[str, Any]:
    """Decide a claim and return its entry in reports/claims.json."""
    by_label = {point["label"]: point for point in points}
    intervals, parts = [], []
    for label in claim.rule.compare:
        mean, (low, high) = difference(by_label[label], by_label[claim.rule.against])
        intervals.append((low, high))
        finite = math.isfinite(mean)
        parts.append(f"{label}: {mean:+.1f} ({low:+.1f} to {high:+.1f})" if finite else f"{label}: every run failed")
    failed = sum("failed" in each for point in points for each in point["runs"])
    text = f"Points of accuracy against {claim.rule.against}, with 95 % intervals: {'; '.join(parts)}."
    return {
        "name": claim.name,
        "title": claim.title,
        "claim": claim.claim,
        "x_label": claim.x_label,
        "rule": claim.rule.text,
        "verdict": verdict(claim.rule, intervals),
        "text": text + (f" {failed} run(s) failed." if failed else ""),
        "points": points,
    }


def table(claim: Mapping[str, Any]) -> str:
    """Return a claim as Markdown."""
    lines = [f"### {claim['title']}: {claim['verdict']}", "", claim["claim"], "", f"Rule: {claim['rule']}", ""]
    lines += [f"| {claim['x_label']} | linear probe, mean | 95 % | runs |", "|---|---|---|---|"]
    for point in claim["points"]:
        runs = ", ".join(f"{each['top1']:.1f}" if "top1" in each else "failed" for each in point["runs"])
        mean, interval = "", ""
        if point["mean"] is not None:
            mean, interval = f"{point['mean']:.1f}", f"{point['low']:.1f} to {point['high']:.1f}"
        label = f"{point['label']} (base)" if point["base"] else point["label"]
        lines.append(f"| {label} | {mean} | {interval} | {runs} |")
    return "\n".join([*lines, "", claim["text"]])
