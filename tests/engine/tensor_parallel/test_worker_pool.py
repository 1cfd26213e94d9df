"""A worker that cannot do what it is asked says why, and all fail with that reason."""

import threading
from pathlib import Path

import pytest

from engine.errors import WorkersFailed
from engine.tensor_parallel.messages import Load
from engine.tensor_parallel.worker_pool import WorkerPool
from tests.oracles import hf

pytestmark = pytest.mark.slow


def load(folder: Path, rank: int = 1, size: int = 2) -> Load:
    dtype = "torch.float32"
    return Load(
        folder=str(folder),
        rank=rank,
        size=size,
        device="cpu",
        dtype=dtype,
        quantization="none",
        linear="torch",
        attention="torch",
        lora_dtype=dtype,
        uses_triton=False,
        threads=1,
    )


def test_a_load_error_at_a_worker_is_raised_here(tmp_path: Path) -> None:
    hf.save(hf.build("llama-3"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    workers, called = WorkerPool([load(tmp_path)]), threading.Event()
    workers.on_failure(called.set)
    with pytest.raises(
        WorkersFailed, match=r"process 1 of the 2 .*CheckpointError: .*neither model.safetensors"
    ) as failed:
        workers.wait_loaded()
    assert called.is_set()
    assert workers.failure is failed.value
    late = threading.Event()
    workers.on_failure(late.set)
    assert late.is_set()
    workers.close()


def test_one_that_fails_takes_the_others_along(tmp_path: Path) -> None:
    hf.save(hf.build("llama-3"), tmp_path / "sound")
    workers = WorkerPool([load(tmp_path / "sound", 1, 3), load(tmp_path / "missing", 2, 3)])
    with pytest.raises(WorkersFailed, match=r"process 2 of the 3 .*CheckpointError: .*does not exist"):
        workers.wait_loaded()
    workers.close()


def test_workers_that_are_closed_while_they_load_have_not_failed(tmp_path: Path) -> None:
    hf.save(hf.build("llama-3"), tmp_path)
    workers = WorkerPool([load(tmp_path)])
    workers.close()
    assert workers.failure is None
