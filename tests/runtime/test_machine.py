"""What memory there is: the machine's, or less where a container or a service is limited."""

from __future__ import annotations

from pathlib import Path

import pytest

from kestrel.runtime import machine


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 64000000 kB\nMemAvailable: 32000000 kB\n")
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    return tmp_path


def group(folder: Path, limit: str, used: int, cached: int, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, text in zip(names, (limit, str(used)), strict=True):
        (folder / name).write_text(f"{text}\n")
    (folder / "memory.stat").write_text(
        f"anon 1\n{'inactive_file' if version == 2 else 'total_inactive_file'} {cached}\n"
    )


@pytest.mark.parametrize(("version", "unlimited"), [(2, "max"), (1, str(2**63 - 4096))])
def test_the_tightest_limit_of_a_group_and_those_around_it(cgroups: Path, version: int, unlimited: str) -> None:
    top = cgroups / "cgroup" / ("" if version == 2 else "memory")
    own = "0::/user/job" if version == 2 else "7:memory:/user/job"
    (cgroups / "proc" / "self" / "cgroup").write_text(f"3:cpu:/elsewhere\n{own}\n")
    group(top / "user" / "job", str(8 * 2**30), 3 * 2**30, 2**30, version)
    group(top / "user", str(4 * 2**30), 3 * 2**30, 2 * 2**30, version)
    assert machine.memory_limit() == 4 * 2**30
    assert machine.memory_available() == 3 * 2**30  # the cache of files gives way
    group(top / "user", unlimited, 3 * 2**30, 0, version)
    assert machine.memory_limit() == 8 * 2**30 and machine.memory_available() == 6 * 2**30


def test_without_a_limit_it_is_the_machines(cgroups: Path) -> None:
    assert machine.memory_available() == 32_000_000 * 1024 and machine.memory_limit() > 2**28
    (cgroups / "proc" / "meminfo").unlink()  # not Linux
    assert machine.memory_available() == machine.memory_limit()


def test_what_this_process_uses() -> None:
    assert 2**20 < machine.memory_used() <= 2 * machine.memory_peak()
    machine.release_free_memory()
