"""The lm-eval harness, over completions and over chat, on tasks of a few words that are written here."""
# pyright: basic, reportMissingImports=false
# The client is installed where this runs.

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.clients.probe import Probe, expect, main

LM_EVAL = Path(sys.executable).with_name("lm_eval")
TOKENIZER = Path(__file__).parents[3] / "engine" / "demo" / "base"
WORDS = ("garden", "planet", "silver", "window", "basket", "yellow", "market", "winter")
DATA = """\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/words.jsonl}}}}
test_split: test
doc_to_text: "{{{{word}}}}"
target_delimiter: ""
"""
GENERATE = """\
task: reverse_words
output_type: generate_until
doc_to_target: "{{reversed}}"
generation_kwargs: {until: ["\\n"], do_sample: false, temperature: 0.0, max_gen_toks: 16}
metric_list: [{metric: exact_match}]
"""
CHOOSE = """\
task: choose_reversed
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: 1
metric_list: [{metric: acc}]
"""
PERPLEXITY = """\
task: rolling
output_type: loglikelihood_rolling
doc_to_target: "{{word}}"
metric_list: [{metric: byte_perplexity}]
"""


def program(probe: Probe) -> None:
    """Try what the harness offers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [{"word": word, "reversed": word[::-1], "choices": [word, word[::-1]]} for word in WORDS]
        (folder / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for number, task in enumerate((GENERATE, CHOOSE, PERPLEXITY)):
            (folder / f"task{number}.yaml").write_text(task + DATA.format(folder=folder))
        tasks(Harness(probe, folder), probe)


def tasks(harness: "Harness", probe: Probe) -> None:
    """Run the tasks over both of OpenAI's ways to ask."""
    chat = ("local-chat-completions", "chat/completions")
    text = ("local-completions", "completions")
    with probe.tries("plain"):
        expect(harness.score(chat, "demo", "reverse_words", "exact_match,none"), 0.0)
    with probe.tries("adapter"):
        expect(harness.score(chat, "reverse", "reverse_words", "exact_match,none"), 1.0)
    with probe.tries("batch"):
        expect(harness.score(text, "reverse", "reverse_words", "exact_match,none", batch_size=4), 1.0)
    with probe.tries("8 at once"):
        expect(harness.score(text, "reverse", "reverse_words", "exact_match,none", num_concurrent=8), 1.0)
    with probe.tries("logprobs"):
        expect(harness.score(text, "reverse", "choose_reversed", "acc,none", batch_size=4), 1.0)
    with probe.tries("loglikelihood_rolling"):
        assert harness.score(text, "demo", "rolling", "byte_perplexity,none") > 1
    with probe.tries("error"):
        try:
            harness.score(chat, "missing", "reverse_words", "exact_match,none", max_retries=1)
        except subprocess.CalledProcessError as error:
            expect("model_not_found" in error.stderr, True)
        else:
            raise AssertionError("an unknown model was scored")


class Harness:
    """Runs the command on one task; each run writes a file of results."""

    def __init__(self, probe: Probe, folder: Path) -> None:
        self._probe, self._folder, self._runs = probe, folder, 0

    def score(
        self, way: tuple[str, str], model: str, task: str, metric: str, batch_size: int = 1, **options: int
    ) -> float:
        """Run one task, and return its score. Raises CalledProcessError."""
        kind, path = way
        server = {"model": model, "base_url": f"{self._probe.base_url}/{path}", "tokenizer": TOKENIZER}
        given = ",".join(f"{name}={value}" for name, value in (server | options).items())
        self._runs += 1
        out = self._folder / f"out{self._runs}"
        command = (
            *(LM_EVAL, "run", "--model", kind, "--model_args", given, "--tasks", task),
            *(
                "--batch_size",
                str(batch_size),
                "--include_path",
                self._folder,
                "--output_path",
                out,
                "--apply_chat_template",
            ),
        )
        variables = {
            **os.environ, "OPENAI_API_KEY": self._probe.key, "HF_HOME": str(self._folder), "HF_DATASETS_OFFLINE": "1"
        }  # fmt: skip
        ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
        print(ended.stdout, ended.stderr, file=sys.stderr)
        ended.check_returncode()
        (result,) = out.rglob("results_*.json")
        return float(json.loads(result.read_text())["results"][task][metric])


if __name__ == "__main__":
    main(program)
