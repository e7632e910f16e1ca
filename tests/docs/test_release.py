"""The version and its date are the same in pyproject.toml, CHANGELOG.md and CITATION.cff."""

import re

import tomli
import yaml

from documents import page

VERSION = tomli.loads(page("pyproject.toml"))["project"]["version"]
HEADINGS = re.findall(r"^## (.+)$", page("CHANGELOG.md"), re.MULTILINE)
CITATION = yaml.safe_load(page("CITATION.cff"))


def test_the_changelog_begins_with_what_is_unreleased_and_the_version():
    unreleased, *releases = HEADINGS
    assert unreleased == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d{2}-\d{2}", release) for release in releases)
    assert releases[0].partition(" - ")[0] == VERSION
    dates = [release.partition(" - ")[2] for release in releases]
    assert dates == sorted(dates, reverse=True)


def test_the_changelog_has_no_other_groups_than_keep_a_changelog():
    groups = set(re.findall(r"^### (.+)$", page("CHANGELOG.md"), re.MULTILINE))
    assert groups <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_is_of_the_newest_release():
    assert CITATION["version"] == VERSION
    assert f"{CITATION['version']} - {CITATION['date-released']}" == HEADINGS[1]


def test_the_citation_names_the_paper_that_the_readme_links():
    (paper,) = CITATION["references"]
    assert paper["url"] in page("README.md")
    assert [author["family-names"] for author in paper["authors"]] == [
        *("Peng", "Gigant", "Quesnelle")
    ]
