"""What the processes of one run check of one another before they begin."""

from __future__ import annotations

from pathlib import Path

import pytest

from kestrel.config.settings import Settings
from kestrel.runtime import rendezvous


@pytest.mark.parametrize("exists", [True, False])
def test_a_dry_run_needs_no_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool) -> None:
    looked_for = []
    monkeypatch.setattr(rendezvous, "_appears", lambda path: looked_for.append(path.exists()) or True)
    run_dir = tmp_path if exists else tmp_path / "new"
    tree = {"run_dir": str(run_dir), "data": {"source": "s"}, "model": {"name": "m"}}
    rendezvous._require_same(Settings.model_validate(tree))
    assert looked_for == [True] * exists and not list(tmp_path.iterdir())
