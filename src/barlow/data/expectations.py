"""The checks of a data set: Great Expectations suites, run on small tables, and Data Docs of their outcomes."""

from __future__ import annotations

import html
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from barlow.settings.params import Validate

# Great Expectations does not escape file names in its pages, and loads scripts: a browser must run neither.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
HEAD = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
STYLE = """<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 75rem; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 } td, th { border: 1px solid #ccc; padding: .3rem .6rem }
th { text-align: left } td { vertical-align: top } ul { padding-left: 1.2rem } .row { display: block }
.fa-check-circle::before { content: "\\2714"; color: #080 } .fa-times::before { content: "\\2718"; color: #c00 }
.fa-exclamation-triangle::before, .fa-exclamation-circle::before { content: "\\26a0"; color: #b60 }
.modal, footer, .card, .tooltip, .cooltip .top, button, img { display: none }
</style>"""


class Outcome(NamedTuple):
    """The outcome of one expectation."""

    name: str
    table: str
    success: bool
    severity: str  # critical | warning
    observed: float  # the share of rows that pass, or the figure that is bounded
    bound: float  # on `observed`
    rule: str  # the params that set the bound, as key=value
    unexpected: int  # number of rows that fail
    rows: dict[str, Any]  # value by name (an image's path) of the rows that fail


def suites(v: Validate) -> dict[str, list[Any]]:
    """Return the expectations by the name of their table; the first column of each table names its rows."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # before the import, which is when it is read
    import great_expectations.expectations as gxe

    def named(name: str, kind: Any, *keys: str, **arguments: Any) -> Any:
        rule = ", ".join(f"validate.{key}={_plain(getattr(v, key))}" for key in keys)
        return kind(meta={"name": name, "rule": rule}, **arguments)

    between, in_set = gxe.ExpectColumnValuesToBeBetween, gxe.ExpectColumnValuesToBeInSet
    null, unique = gxe.ExpectColumnValuesToBeNull, gxe.ExpectColumnValuesToBeUnique
    unique_pairs, distinct = gxe.ExpectCompoundColumnsToBeUnique, gxe.ExpectColumnProportionOfUniqueValuesToBeBetween
    lowest, highest, equal = (
        gxe.ExpectColumnMinToBeBetween,
        gxe.ExpectColumnMaxToBeBetween,
        gxe.ExpectColumnPairValuesToBeEqual,
    )
    # A row that fails is quarantined; a suite fails if there are too many such rows. Two copies of an image both count
    # as "not unique", so `copies` allows twice as many rows as `distinct`.
    most = {"mostly": v.min_accepted_fraction}
    copies = {"mostly": max(0.0, 1 - 2 * v.max_duplicate_fraction)}
    side = {"min_value": v.min_side, "max_value": v.max_side}
    low, high = v.brightness
    warning = {"severity": "warning"}
    return {
        "schema": [named("schema", equal, column_A="found", column_B="expected")],
        "files": [named("decodable", null, "min_decodable_fraction", column="error", mostly=v.min_decodable_fraction)],
        "images": [
            named("format", in_set, "formats", column="format", value_set=list(v.formats), **most),
            named("mode", in_set, "modes", column="mode", value_set=list(v.modes), **most),
            named("width", between, "min_side", "max_side", column="width", **side, **most),
            named("height", between, "min_side", "max_side", column="height", **side, **most),
            named("bytes", between, "max_bytes", column="bytes", max_value=v.max_bytes, **most),
            named("unique", unique, "max_duplicate_fraction", column="sha256", **copies),
            named("unique_in_split", unique_pairs, "max_duplicate_fraction", column_list=["split", "sha256"], **copies),
            named(
                "distinct", distinct, "max_duplicate_fraction", column="sha256", min_value=1 - v.max_duplicate_fraction
            ),
            named("brightness", between, "brightness", column="brightness", min_value=low, max_value=high, **warning),
            named("contrast", between, "min_contrast", column="contrast", min_value=v.min_contrast, **warning),
        ],
        "dataset": [
            named(
                "accepted_fraction",
                lowest,
                "min_accepted_fraction",
                column="accepted_fraction",
                min_value=v.min_accepted_fraction,
            )
        ],
        "classes": [
            named(
                "images_per_class", between, "min_images_per_class", column="images", min_value=v.min_images_per_class
            )
        ],
        "drift": [
            named(f"{column}_drift", highest, "max_drift", column=column, max_value=v.max_drift, **warning)
            for column in ("brightness", "contrast")
        ],
    }


def _plain(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def new_context(site: Path) -> Any:
    """Return a Great Expectations context in memory that writes Data Docs to the folder `site`, which is emptied."""
    import great_expectations as gx

    shutil.rmtree(site, ignore_errors=True)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    for name in list(context.list_data_docs_sites()):
        context.delete_data_docs_site(name)
    backend = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(site.resolve())}
    index = {"class_name": "DefaultSiteIndexBuilder"}
    context.add_data_docs_site(
        "data_docs", {"class_name": "SiteBuilder", "site_index_builder": index, "store_backend": backend}
    )
    return context


def check(context: Any, table: str, frame: pd.DataFrame, expectations: list[Any]) -> list[Outcome]:
    """Run a suite on a table and return the outcomes, in the order of `expectations`."""
    import great_expectations as gx

    key = frame.columns[0]
    batch = (
        context.data_sources.add_pandas(table).add_dataframe_asset(table).add_batch_definition_whole_dataframe(table)
    )
    suite = context.suites.add(gx.ExpectationSuite(table, expectations=expectations))
    definition = context.validation_definitions.add(gx.ValidationDefinition(name=table, data=batch, suite=suite))
    validation = definition.run(
        batch_parameters={"dataframe": frame},
        result_format={
            "result_format": "COMPLETE",
            "unexpected_index_column_names": [key],
            "return_unexpected_index_query": False,
        },
    )
    outcomes = {}
    for one in validation.results:
        config, result = one.expectation_config, one.result
        if not result:
            raise RuntimeError(f"Great Expectations could not check {config.meta['name']}: {one.exception_info}")
        rows = {row[key]: row.get(config.kwargs.get("column")) for row in result.get("unexpected_index_list") or []}
        if "element_count" in result:
            observed = 1 - result["unexpected_count"] / result["element_count"]
            bound = config.kwargs.get("mostly", 1.0)
        else:
            observed = result["observed_value"]
            bound = config.kwargs.get("min_value", config.kwargs.get("max_value"))
        outcomes[config.meta["name"]] = Outcome(
            config.meta["name"],
            table,
            bool(one.success),
            config.severity.value,
            round(float(observed), 6),
            round(float(bound), 6),
            config.meta["rule"],
            result.get("unexpected_count", 0),
            rows,
        )
    return [outcomes[expectation.meta["name"]] for expectation in expectations]


def write_docs(context: Any, site: Path, outcomes: list[Outcome]) -> None:
    """Write Data Docs of the outcomes: site/index.html, with a link to one page per table.

    The pages of Great Expectations need the network: without it their index is empty and no mark tells passed from
    failed. Our own index and a few lines of style work offline.
    """
    context.build_data_docs()
    for page in site.rglob("*.html"):
        text = (
            page.read_text(encoding="utf-8")
            .replace("<head>", "<head>" + HEAD, 1)
            .replace("</head>", STYLE + "</head>", 1)
        )
        page.write_text(text, encoding="utf-8")
    pages = {
        page.stem.rpartition("-")[2]: page.relative_to(site).as_posix() for page in site.glob("validations/**/*.html")
    }
    marks = {"critical": "fa-times", "warning": "fa-exclamation-triangle"}
    rows = "".join(
        f'<tr><td><i class="{"fa-check-circle" if outcome.success else marks[outcome.severity]}"></i> {outcome.name}'
        f"<td>{outcome.severity}<td>{outcome.observed:g}<td>{outcome.bound:g}<td>{outcome.unexpected}"
        f"<td>{html.escape(outcome.rule)}"
        f'<td><a href="{html.escape(pages[outcome.table])}">{outcome.table}</a>'
        for outcome in outcomes
    )
    heads = "<th>check<th>severity<th>found<th>bound<th>rows that fail<th>params<th>details"
    (site / "index.html").write_text(
        f"<!doctype html><meta charset=utf-8>{HEAD}<title>Data Docs</title>{STYLE}<h1>Data Docs</h1>"
        f"<p>Great Expectations on data/manifest.parquet<table><tr>{heads}{rows}</table>",
        encoding="utf-8",
    )
