import dataclasses
import os
import re

import pandas as pd
import pytest

from barlow.data import expectations

EVIL = "ü b/<script>alert(1)</script>&amp;.jpg"


def test_every_setting_is_behind_an_expectation(smoke):
    rules = " ".join(one.meta["rule"] for suite in expectations.suites(smoke.validate).values() for one in suite)
    for field in dataclasses.fields(smoke.validate):
        assert f"validate.{field.name}=" in rules
    assert os.environ["GX_ANALYTICS_ENABLED"] == "false"


@pytest.fixture(scope="module")
def site(tmp_path_factory, smoke):
    """Outcomes of two small tables, one with failures, and the Data Docs of both."""
    site = tmp_path_factory.mktemp("docs") / "data_docs"
    site.mkdir()
    (site / "stale.html").touch()
    suites = expectations.suites(dataclasses.replace(smoke.validate, min_decodable_fraction=0.7))
    context = expectations.new_context(site)
    table = pd.DataFrame({"path": ["a", EVIL, "c", "d"], "error": [None, "broken", None, "broken"]})
    outcomes = expectations.check(context, "files", table, suites["files"])
    outcomes += expectations.check(
        context, "drift", pd.DataFrame({"name": ["all"], "brightness": 0.25, "contrast": 0.1}), suites["drift"]
    )
    expectations.write_docs(context, site, outcomes)
    return site, outcomes


def test_outcomes(site):
    decodable, brightness, contrast = site[1]
    assert decodable == expectations.Outcome(
        name="decodable",
        table="files",
        success=False,
        severity="critical",
        observed=0.5,
        bound=0.7,
        rule="validate.min_decodable_fraction=0.7",
        unexpected=2,
        rows={EVIL: "broken", "d": "broken"},
    )
    assert (brightness.name, brightness.success, brightness.severity) == ("brightness_drift", False, "warning")
    assert (brightness.observed, brightness.bound, brightness.rows) == (0.25, 0.1, {})
    assert (contrast.name, contrast.success, contrast.observed) == ("contrast_drift", True, 0.1)


def test_data_docs_are_whole_run_no_script_and_load_nothing(site):
    folder, _ = site
    pages = {page.relative_to(folder).as_posix(): page.read_text(encoding="utf-8") for page in folder.rglob("*.html")}
    assert "stale.html" not in pages
    assert len(pages) == 5  # the index and, per table, a suite and its result
    for page in pages.values():
        policy, rest = re.split(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', page)[1:]
        assert policy.startswith("default-src 'none'; ")
        assert "script-src" not in policy
        assert not re.search(r"<(script|link|img)\b", page[: -len(rest)])  # nothing comes before the policy
    index = pages["index.html"]
    links = re.findall(r'href="([^"]+)"', index)
    assert len(links) == 3
    assert set(links) <= set(pages)
    assert re.findall(r"fa-[a-z-]+(?=\"></i> \w+)", index) == ["fa-times", "fa-exclamation-triangle", "fa-check-circle"]
    result = pages[links[0]]
    assert "broken" in result
    assert "fa-times text-danger" in result


def test_what_cannot_be_checked_is_not_taken_for_a_pass(tmp_path, smoke):
    context = expectations.new_context(tmp_path / "docs")
    suite = expectations.suites(smoke.validate)["files"]
    with pytest.raises(RuntimeError, match="could not check decodable"):
        expectations.check(context, "files", pd.DataFrame({"path": ["a"]}), suite)
