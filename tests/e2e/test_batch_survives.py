"""A batch over HTTP is answered wholly, each line once and rightly, though its server is killed in the middle."""

import json
import re
import time
from pathlib import Path

import openai
import pytest

from engine.demo.embedded import TASKS, held_out_inputs
from engine.serve import main
from tests.forked_process import ForkedProcess

BOUND_S = 120
LINES = 120


def served(folder: Path) -> tuple[ForkedProcess, openai.OpenAI]:
    options = ["--port", "0", "--no-progress", "--kv-cache-bytes", "32MiB", "--batch-dir", str(folder)]
    process = ForkedProcess(main, ([*options, "--batch-in-flight", "4"],), {"OMP_NUM_THREADS": "1"})
    found = re.search(r"http://\S+:\d+", process.stdout.readline())
    assert found
    return process, openai.OpenAI(base_url=f"{found[0]}/v1", api_key="none", max_retries=0)


def until_completed(client: openai.OpenAI, batch_id: str, least: int) -> openai.types.Batch:
    """The batch once it has so many answers, or its end."""
    until = time.monotonic() + BOUND_S
    while time.monotonic() < until:
        batch = client.batches.retrieve(batch_id)
        assert batch.request_counts is not None
        if batch.request_counts.completed >= least and (least < LINES or batch.status == "completed"):
            return batch
        time.sleep(0.01)
    raise AssertionError(f"the batch has not come that far in {BOUND_S} s")


@pytest.mark.slow
def test_a_killed_server_answers_a_batch_when_it_starts_again(tmp_path: Path) -> None:
    asked = {
        f"{task.name}-{number}": (task, text)
        for task in TASKS
        for number, text in enumerate(held_out_inputs(task, LINES // len(TASKS), seed=5))
    }
    assert len(asked) == LINES
    lines = [
        {
            "custom_id": name,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": task.name,
                "messages": [{"role": "user", "content": text}],
                "temperature": 0,
                "max_tokens": 24,
            },
        }
        for name, (task, text) in asked.items()
    ]
    content = "".join(f"{json.dumps(each)}\n" for each in lines).encode()
    process, client = served(tmp_path / "batches")
    with client:
        sent = client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = client.batches.create(
            input_file_id=sent.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        before = until_completed(client, batch.id, 5)
    process.kill()
    process.wait(BOUND_S)
    assert before.status == "in_progress"
    process, client = served(tmp_path / "batches")
    try:
        with client:
            done = until_completed(client, batch.id, LINES)
            assert done.output_file_id is not None
            assert done.error_file_id is None
            results = [
                json.loads(each) for each in client.files.content(done.output_file_id).text.splitlines()
            ]
    finally:
        process.kill()
        process.wait(BOUND_S)
    said = {
        each["custom_id"]: each["response"]["body"]["choices"][0]["message"]["content"] for each in results
    }
    assert len(results) == LINES
    assert said == {name: task.answer(text) for name, (task, text) in asked.items()}
