"""The bench of activated LoRAs: both kinds have the same weights, and the rows tell what each had to compute."""

from pathlib import Path

import pytest

from scripts.bench.activated import INVOCATION, conversation, main
from scripts.results import read_rows


def test_activated_loras_compute_the_conversation_once_and_plain_ones_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    given = ["--size", "tiny", "--adapters", "3", "--rank", "4", "--tokens", "40", "--rounds", "2"]
    main([*given, "--out", str(out)])
    plain, activated = read_rows(out)
    assert (plain["kind"], plain["computed_tokens"]) == ("lora", [44, 44, 44])
    assert (activated["kind"], activated["computed_tokens"]) == ("alora", [44, 12, 12])
    assert len(activated["first_token_s"]) == len(activated["cpu_s"]) == 3
    assert "alora computed_tokens [44, 12, 12]" in capsys.readouterr().out


def test_conversations_have_no_token_of_the_invocation() -> None:
    assert not set(INVOCATION) & set(conversation(0, 2048))
    assert conversation(0, 8) != conversation(1, 8)
