"""Use NIXL, and through it UCX, to read bytes from a peer's memory without its help. Nothing else imports NIXL.

NIXL is an optional extra; without it this node offers no such path. Its binding layer is used directly, because the
Python class above it fixes the progress thread's pause at zero, which burns a core.

UCX is configured by its environment, read once when the agent is made. Set unless the variable is set already:
  UCX_NET_DEVICES         the active InfiniBand devices and `lo`. UCX trusts whoever reaches its TCP port with all
                          registered memory, so that port must not be on a network; RDMA and same-host reads remain.
                          With `open_network` (an isolated network, by explicit choice) it is left to UCX.
  UCX_USE_MT_MUTEX        y: a read on one host copies while it holds UCX's lock, and the progress thread would spin
                          on it all the while; asleep it leaves the processor to the copy: twice the speed on few cores
  UCX_CMA_SEG_SIZE        16m: so much is copied by one call on one host. Every call costs some microseconds, so the
                          512k of the default take a fifth more time
  UCX_TCP_{TX,RX}_SEG_SIZE  256k: five times the throughput of the default
  UCX_TCP_USER_TIMEOUT, UCX_TCP_KEEPIDLE, UCX_TCP_KEEPINTVL
                          a cut link is noticed in seconds, not in a quarter of an hour
  UCX_IB_GPU_DIRECT_RDMA  yes where there is InfiniBand: a missing kernel module is an error, not a slow copy
  NIXL_LOG_LEVEL, UCX_LOG_LEVEL  errors come as exceptions instead
"""

import importlib
import os
import secrets
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from transport.base import HOST, Memory
from transport.errors import PathUnavailable, PeerGone, WireError

PROGRESS_PAUSE_US = 1000
BINDINGS = ("nixl_cu12._bindings", "nixl_cu13._bindings")
INFINIBAND = Path("/sys/class/infiniband")


class ReadState(Enum):
    """How a read stands. Done and failed are final: no byte lands after them."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Side(NamedTuple):
    """One end of a read: (address, bytes) of each piece, all in the memory of one device or of the host."""

    device: int
    pieces: Sequence[tuple[int, int]]


class NixlAgent:
    """One incarnation of a node in UCX; safe to use from any thread.

    Raises PathUnavailable if NIXL is missing or fails.
    """

    def __init__(self, name: str, open_network: bool = False) -> None:
        _prepare_environment(open_network)
        self._nixl = nixl = _load_bindings()
        self._failures: tuple[type[Exception], ...] = (
            nixl.nixlBackendError,
            nixl.nixlCancelledError,
            nixl.nixlInvalidParamError,
            nixl.nixlMismatchError,
            nixl.nixlNotAllowedError,
            nixl.nixlNotFoundError,
            nixl.nixlNotPostedError,
            nixl.nixlNotSupportedError,
            nixl.nixlRemoteDisconnectError,
            nixl.nixlRepostActiveError,
            nixl.nixlUnknownError,
        )
        config = nixl.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = PROGRESS_PAUSE_US
        config.syncMode = nixl.NIXL_THREAD_SYNC_STRICT
        self.name = f"{name}-{secrets.token_hex(6)}"  # NIXL wants a name to be used once
        try:
            self._agent = nixl.nixlAgent(self.name, config)
            self._agent.createBackend("UCX", {"ucx_error_handling_mode": "peer"})
        except self._failures as error:
            raise PathUnavailable(
                f"UCX does not start: {error}; check the UCX_* environment, or do without"
            ) from error

    def register(self, memory: Memory) -> None:
        """Let `memory` be read by peers and written by this node's reads, until the agent is closed."""
        span = (memory.address, memory.nbytes, max(memory.device, 0), "")
        try:
            self._agent.registerMem(self._nixl.nixlRegDList(self._kind(memory.device), [span]), [])
        except self._failures as error:
            raise PathUnavailable(
                f"UCX cannot register device {memory.device}: {error}; do without UCX"
            ) from error

    def metadata(self) -> bytes:
        """Return what a peer must know of this agent to read what is registered by now."""
        return self._agent.getLocalMD()

    def add_peer(self, metadata: bytes) -> str:
        """Load, or update, a peer's metadata and return its agent's name. Raises WireError if it is damaged."""
        try:
            return self._agent.loadRemoteMD(metadata).decode()
        except (*self._failures, UnicodeDecodeError) as error:
            raise WireError(
                f"damaged UCX metadata: {error}; compare the versions of NIXL at both ends"
            ) from error

    def remove_peer(self, peer: str) -> None:
        """Disconnect, so that the next read connects afresh."""
        try:
            self._agent.invalidateRemoteMD(peer)
        except self._nixl.nixlNotFoundError:
            return  # it was removed already

    def begin(self, peer: str, local: Side, remote: Side) -> "NixlRead":
        """Start to read `remote` at `peer` into `local`, piece by piece. On one host this copies before it returns."""
        nixl = self._nixl
        try:
            handle = self._agent.createXferReq(
                nixl.NIXL_READ, self._descriptors(local), self._descriptors(remote), peer, "", []
            )
        except self._failures as error:
            raise PeerGone(f"{peer}: UCX {error}; use another source") from error
        try:
            status = self._agent.postXferReq(handle, "")
        except self._failures:
            return NixlRead(self, handle, disturbed=True)  # some pieces may be under way all the same
        return NixlRead(self, handle, done=status == nixl.NIXL_SUCCESS)

    def state(self, handle: int) -> ReadState:
        """Tell how the read stands."""
        try:
            status = self._agent.getXferStatus(handle)
        except self._failures:
            return ReadState.FAILED
        return {self._nixl.NIXL_SUCCESS: ReadState.DONE, self._nixl.NIXL_IN_PROG: ReadState.RUNNING}.get(
            status, ReadState.FAILED
        )

    def release(self, handle: int) -> None:
        """Give back a read that has ended."""
        self._agent.releaseXferReq(handle)

    def close(self) -> None:
        """Destroy the agent; no read is running."""
        del self._agent

    def _kind(self, device: int) -> object:
        return self._nixl.DRAM_SEG if device == HOST else self._nixl.VRAM_SEG

    def _descriptors(self, side: Side) -> object:
        device = max(side.device, 0)
        rows = [(address, nbytes, device) for address, nbytes in side.pieces]
        return self._nixl.nixlXferDList(self._kind(side.device), rows)


class NixlRead:
    """A read that has begun. It cannot be stopped, only waited for.

    `done` if it had ended when it began, `disturbed` if not all of it did begin.
    """

    def __init__(self, agent: NixlAgent, handle: int, done: bool = False, disturbed: bool = False) -> None:
        self._agent = agent
        self._handle = handle
        self._done = done
        self._disturbed = disturbed

    def state(self) -> ReadState:
        """Tell how it stands."""
        if self._done:
            return ReadState.DONE
        state = self._agent.state(self._handle)
        return ReadState.FAILED if self._disturbed and state is ReadState.DONE else state

    def release(self) -> None:
        """Give it back, once it has ended."""
        self._agent.release(self._handle)


def active_infiniband() -> list[str]:
    """List the InfiniBand ports that are up, as UCX names them."""
    states = sorted(INFINIBAND.glob("*/ports/*/state"))
    return [f"{state.parts[-4]}:{state.parts[-2]}" for state in states if "ACTIVE" in state.read_text()]


def _prepare_environment(open_network: bool) -> None:
    infiniband = active_infiniband()
    wanted = {
        "UCX_USE_MT_MUTEX": "y",
        "UCX_CMA_SEG_SIZE": "16m",
        "UCX_TCP_TX_SEG_SIZE": "256k",
        "UCX_TCP_RX_SEG_SIZE": "256k",
        "UCX_TCP_USER_TIMEOUT": "5s",
        "UCX_TCP_KEEPIDLE": "1s",
        "UCX_TCP_KEEPINTVL": "1s",
        "NIXL_LOG_LEVEL": "FATAL",
        "UCX_LOG_LEVEL": "fatal",
    }
    if infiniband:
        wanted["UCX_IB_GPU_DIRECT_RDMA"] = "yes"
    if not open_network:
        wanted["UCX_NET_DEVICES"] = ",".join([*infiniband, "lo"])
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def _load_bindings() -> ModuleType:
    for name in BINDINGS:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise PathUnavailable("NIXL is not installed: scripts/setup ucx, or use the stream")
