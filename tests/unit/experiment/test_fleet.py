"""What a fleet writes for its servers, which see their site's files alone."""

from __future__ import annotations

from pathlib import Path

from prfaas_testbed.experiment.inputs import seen_profile


def test_a_profile_that_is_a_path_is_copied_to_where_sites_see_it_and_a_name_stays(tmp_path: Path) -> None:
    one, other, folder = tmp_path / "a" / "p.yaml", tmp_path / "b" / "p.yaml", tmp_path / "work"
    for path, text in ((one, "one"), (other, "other")):
        path.parent.mkdir()
        path.write_text(text)
    copies = [seen_profile(str(path), folder) for path in (one, other)]
    assert [Path(copy or "").read_text() for copy in copies] == ["one", "other"]
    assert all(Path(copy or "").is_relative_to(folder) for copy in copies)
    assert seen_profile("toy", folder) == "toy"
    assert seen_profile(None, folder) is None
