"""Commands of scripts/ end in one line, without a traceback, for a value or a file that they cannot use."""

import runpy
import sys
from pathlib import Path

import pytest

WRONG = {
    "scripts.bench.bodies --rounds 0": "give a number from 1",
    "scripts.bench.engine --models x --baselines none --quiet-wait 0": "make it by python -m",
    "scripts.bench.engine --baselines nope": "'nope' is none of",
    "scripts.bench.engine --kinds zz": "'zz' is none of",
    "scripts.bench.engine --batches 1,,2": "'' is no whole number",
    "scripts.bench.engine --rounds 0": "give a number from 1",
    "scripts.bench.engine --timeout nan": "give seconds",
    "scripts.bench.engine.draw /nowhere --out x.png": "/nowhere",
    "scripts.bench.tiers.draw /dev/null --out x.png": "has no rows",
    "scripts.bench.make_models --sizes zz": "'zz' is none of",
    "scripts.bench.make_models --adapters -1": "give a number from 1",
    "scripts.bench.host --sequences 0": "give a number from 1",
    "scripts.bench.host --steps -5": "give a number from 1",
    "scripts.bench.layers --folder /nowhere": "there is no /nowhere",
    "scripts.bench.serving --clients -1": "give a number from 1",
    "scripts.bench.serving --prompt-tokens 5-1": "give LOW-HIGH",
    "scripts.bench.serving --prompt-tokens x": "no whole number",
    "scripts.bench.simulator --traces /nowhere --out rows": "/nowhere",
    "scripts.bench.tiers --folder /nowhere": "there is no /nowhere",
    "scripts.bench.transport --rounds 0": "give a number from 1",
    "scripts.figures.policies --draw --out .": "has no rows",
    "scripts.figures.policies --traces /nowhere --out .": "/nowhere",
    "scripts.profile_node fit --rows /nowhere --profile x": "/nowhere",
    "scripts.reading --out /nowhere/x": "/nowhere/x",
}


@pytest.mark.parametrize(("command", "told"), WRONG.items(), ids=WRONG.keys())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of a module that another test has imported
def test_what_a_command_cannot_use_is_told_in_one_line(
    command: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, *arguments = command.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    said = f"{capsys.readouterr().err}\n{ended.value.code}"
    assert ended.value.code not in (0, None)
    last = next(line for line in reversed(said.splitlines()) if told in line)
    assert "Traceback" not in said
    assert len(last) < 400
