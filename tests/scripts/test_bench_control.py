"""The bench of control streams counts what is sent in both directions, phase by phase."""

import json
from pathlib import Path

import pytest

from scripts.bench.control import main


@pytest.mark.slow
def test_a_small_run_keeps_a_row_for_each_phase(tmp_path: Path) -> None:
    out = tmp_path / "control.jsonl"
    main(["--adapters", "8", "--members", "3", "--seconds", "2", "--output", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["phase"] for row in rows] == ["joining", "rest", "shifting"]
    joining = rows[0]
    assert joining["to_each_bytes_per_s"] > 0
    assert all(row["from_each_bytes_per_s"] > 0 for row in rows), "members report every second"
