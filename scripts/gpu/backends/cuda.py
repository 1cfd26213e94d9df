"""Backends of a CUDA device. Imported only there, since it needs Triton."""

import ctypes
import itertools
from collections.abc import Callable, Mapping

import torch

from lora.memory.page_writer import PageWriter, PinnedWriter
from lora.ops.base import LoraOp
from lora.ops.triton.op import TritonLora
from lora.target_modules import BaseShape
from model.attention.base import GraphAttention, UnsupportedAttention
from model.attention.flashinfer_paged import DTYPES, HEAD_DIMS, FlashInferAttention, load_flashinfer
from model.attention.triton.backend import TritonPagedAttention
from model.config import ModelConfig
from model.ops.base import GraphOps
from model.ops.triton.layer import TritonOps
from model.sampling.device import DeviceSampler
from scripts.gpu.backends.base import Run, Sampler

_WARM_UPS = 2
_POISONED_BYTES = 512 << 20


class CudaBackends:
    """DeviceBackends on the current CUDA device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._pool = torch.cuda.graph_pool_handle()
        # One stream for all recordings: libraries keep memory for each that they meet.
        self._side = torch.cuda.Stream(self.device)

    def lora(self, base: BaseShape, dtype: torch.dtype) -> LoraOp:
        """See DeviceBackends."""
        return TritonLora(base, dtype, self.device)

    def ops(self, config: ModelConfig, dtype: torch.dtype) -> GraphOps:
        """See DeviceBackends."""
        return TritonOps(config, dtype, TritonLora(config.base_shape(), dtype, self.device))

    def attentions(
        self, config: ModelConfig, dtype: torch.dtype
    ) -> Mapping[str, Callable[[], GraphAttention] | str]:
        """See DeviceBackends."""
        return {"triton": lambda: TritonPagedAttention(config), "flashinfer": self._flashinfer(config, dtype)}

    def _flashinfer(self, config: ModelConfig, dtype: torch.dtype) -> Callable[[], GraphAttention] | str:
        if dtype not in DTYPES or config.head_dim not in HEAD_DIMS:
            return f"it has no kernel for heads of {config.head_dim} in {dtype}"
        try:
            library = load_flashinfer()
        except UnsupportedAttention as error:
            return error.remedy
        return lambda: FlashInferAttention(config, self.device, library)

    def sampler(self, rows: int) -> Sampler:
        """See DeviceBackends."""
        return DeviceSampler(rows, self.device)

    def poison(self, op: object) -> None:
        """See DeviceBackends. Memory that was given back is what the allocator gives out first."""
        lora = op.lora if isinstance(op, TritonOps) else op
        if isinstance(lora, TritonLora):
            lora.h.fill_(torch.nan)
        for nbytes in (_POISONED_BYTES, 16 << 20, 1 << 20, 1 << 16):
            torch.full((nbytes // 4,), torch.nan, device=self.device)

    def record(self, run: Run) -> Run:
        """See DeviceBackends: a CUDA graph, after runs in which kernels are compiled."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        return graph.replay

    def times_ms(self, run: Run, count: int) -> list[float]:
        """See DeviceBackends."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        marks[-1].synchronize()
        return [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]

    def page_writer(self) -> PageWriter:
        """See DeviceBackends."""
        return PinnedWriter(self.device)

    def nodes(self, run: Run) -> int:
        """See DeviceBackends. Raises RuntimeError where the driver cannot tell."""
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        count = ctypes.c_size_t()
        driver = ctypes.CDLL("libcuda.so.1")
        code = driver.cuGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
        if code:
            raise RuntimeError(f"cuGraphGetNodes gave {code}")
        return count.value

    def synchronize(self) -> None:
        """See DeviceBackends."""
        torch.cuda.synchronize(self.device)
