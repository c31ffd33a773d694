"""What the pages of the checkout point at is there: files, folders and headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

K_ROOT = Path(__file__).parents[3]
K_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
K_PAGES = sorted(
    path
    for pattern in (
        "*.md",
        "plugin/**/*.md",
        "testbed/*.md",
        "topologies/**/*.md",
        "results/*.md",
        "results/*/README.md",
    )
    for path in K_ROOT.glob(pattern)
)


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """File or folder, and heading within it, of every link to the checkout itself."""
    for found in K_LINK.finditer(page.read_text(encoding="utf-8")):
        name, _, heading = found[1].partition("#")
        if "://" not in name:
            yield (page.parent / name if name else page), heading


def anchors(page: Path) -> set[str]:
    """As the hosting platforms make them of headings."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", K_PAGES, ids=lambda page: str(page.relative_to(K_ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    broken = [
        f"{target}#{heading}"
        for target, heading in links(page)
        if not target.exists() or (heading and heading not in anchors(target))
    ]
    assert not broken


def test_links_are_found_at_all() -> None:
    assert sum(len(list(links(page))) for page in K_PAGES) > 30
