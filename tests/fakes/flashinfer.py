"""flashinfer's paged wrappers in plain torch: what `plan` is told decides what `run` computes, so that a wrong index,
length, mask or window gives a wrong answer here too. Signatures are those of flashinfer 0.6.18, as far as they are
used; what it checks or needs of its arguments (host or device, dtypes, strides, fixed sizes under a graph) is checked.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Plan:
    """Where things are is read at `run`, as kernels do: under a graph these are the buffers."""

    rows: Tensor  # [S + 1]
    indptr: Tensor
    indices: Tensor
    last: Tensor
    sizes: tuple[int, int, int, int]  # query heads, kv heads, head_dim, page size
    causal: bool
    window_left: int
    sm_scale: float
    dtypes: tuple[torch.dtype, torch.dtype]


class _Wrapper:
    def __init__(self, workspace: Tensor, layout: str, backend: str) -> None:
        assert workspace.dtype == torch.uint8
        assert workspace.numel() >= 1 << 20
        assert layout == "NHD"
        assert backend in ("auto", "fa2")
        self.workspace_bytes = workspace.numel()
        self._plan: _Plan | None = None
        self.plans = 0
        self.pages = 0  # of the last plan

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        plan = self._plan
        assert plan is not None, "run before plan"
        keys, values = paged_kv_cache
        heads, kv_heads, head_dim, page_size = plan.sizes
        assert keys.stride() == values.stride()
        assert keys.shape[1:] == values.shape[1:] == (page_size, kv_heads, head_dim)
        assert q.shape == (int(plan.rows[-1]), heads, head_dim) == out.shape
        assert q.stride(2) == keys.stride(3) == 1
        assert (q.dtype, keys.dtype, out.dtype) == (plan.dtypes[0], plan.dtypes[1], q.dtype)
        rows, indptr, indices, last = (x.tolist() for x in (plan.rows, plan.indptr, plan.indices, plan.last))
        for i, tail in enumerate(last):
            pages = indices[indptr[i] : indptr[i + 1]]
            length = (len(pages) - 1) * page_size + tail
            k, v = (cached[pages].flatten(0, 1)[:length] for cached in paged_kv_cache)
            out[rows[i] : rows[i + 1]] = _attend(q[rows[i] : rows[i + 1]], k, v, plan)
        return out

    def _set(
        self, plan: _Plan, pos_encoding_mode: str, host: tuple[Tensor, ...], arrays: tuple[Tensor, ...]
    ) -> None:
        assert pos_encoding_mode == "NONE"
        assert all(x.device == _CPU for x in host), "an indptr on the device costs a sync"
        assert all(x.dtype == torch.int32 for x in (*host, *arrays))
        assert plan.dtypes[0] in (
            torch.bfloat16,
            torch.float16,
            torch.float32,
        )  # the last for exact comparisons
        assert plan.sizes[0] % plan.sizes[1] == 0
        assert int(plan.indptr[0]) == 0
        assert int(plan.indptr[-1]) <= len(plan.indices)
        assert bool((plan.indptr.diff() > 0).all())
        assert bool(((plan.last >= 1) & (plan.last <= plan.sizes[3])).all())
        self._plan = plan
        self.plans += 1
        self.pages = int(plan.indptr[-1])


def _attend(q: Tensor, k: Tensor, v: Tensor, plan: _Plan) -> Tensor:
    """One request's rows, the last of which is its last token: q [n, heads, head_dim], k, v [m, kv heads, head_dim]."""
    group = plan.sizes[0] // plan.sizes[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q.float(), k) * plan.sm_scale
    row, position = torch.arange(len(k) - len(q), len(k))[:, None], torch.arange(len(k))
    hidden = torch.zeros(len(q), len(k), dtype=torch.bool)
    if plan.causal:
        hidden |= position > row
    if plan.window_left >= 0:
        hidden |= position < row - plan.window_left
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", weights, v).to(q.dtype)


class _Decode(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout, backend)
        self.use_tensor_cores = use_tensor_cores
        buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        self._buffers = tuple(x for x in buffers if x is not None)
        assert len(self._buffers) == (3 if use_cuda_graph else 0)

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        sm_scale: float | None = None,
    ) -> None:
        arrays = indptr, indices, last_page_len
        if self._buffers:
            held_indptr, held_indices, held_last = self._buffers
            assert len(last_page_len) == len(held_last), "the batch size is fixed under a graph"
            held_indptr.copy_(indptr)
            held_indices[: len(indices)] = indices
            held_last.copy_(last_page_len)
            arrays = self._buffers
        plan = _Plan(
            torch.arange(len(last_page_len) + 1),
            *arrays,
            sizes=(num_qo_heads, num_kv_heads, head_dim, page_size),
            causal=False,
            window_left=window_left,
            sm_scale=sm_scale or head_dim**-0.5,
            dtypes=(q_data_type, kv_data_type or q_data_type),
        )
        self._set(plan, pos_encoding_mode, (indptr, last_page_len), (indices,))


class _Prefill(_Wrapper):
    def __init__(
        self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", *, backend: str = "auto"
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout, backend)

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        sm_scale: float | None = None,
        window_left: int = -1,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        max_token_per_sequence: int | None = None,
    ) -> None:
        assert max_token_per_sequence == int(qo_indptr.diff().max())
        plan = _Plan(
            qo_indptr,
            paged_kv_indptr,
            paged_kv_indices,
            paged_kv_last_page_len,
            sizes=(num_qo_heads, num_kv_heads, head_dim_qk, page_size),
            causal=causal,
            window_left=window_left,
            sm_scale=sm_scale or head_dim_qk**-0.5,
            dtypes=(q_data_type, kv_data_type or q_data_type),
        )
        host = (qo_indptr, paged_kv_indptr, paged_kv_last_page_len)
        self._set(plan, pos_encoding_mode, host, (paged_kv_indices,))


class FakeFlashInfer:
    """Stands for the module `flashinfer`, and keeps what was made of it."""

    def __init__(self) -> None:
        self.decodes: list[_Decode] = []
        self.prefills: list[_Prefill] = []

    def BatchDecodeWithPagedKVCacheWrapper(self, *args: Any, **options: Any) -> _Decode:  # noqa: N802
        self.decodes.append(_Decode(*args, **options))
        return self.decodes[-1]

    def BatchPrefillWithPagedKVCacheWrapper(self, *args: Any, **options: Any) -> _Prefill:  # noqa: N802
        self.prefills.append(_Prefill(*args, **options))
        return self.prefills[-1]
