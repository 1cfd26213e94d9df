"""Talk to Ray: set room aside, start named actors that outlive this process, ask them, and end them.

It is the only module that knows Ray's calls, beside the actor itself. Ray is optional: it is imported when asked for.
"""

import logging
import os
import time
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

import grpc

from engine.cluster.launching.member_lines import SCALER, free_ports
from engine.cluster.launching.ray_plan import Group, Service, group_of
from engine.cluster.launching.role_actor import ActorStatus, RoleActor
from engine.errors import InvalidConfig
from transport.base import Address

NAMESPACE = "loraserve"
_HEAD = {"node:__internal_head__": 0.001}  # Ray's name for the machine that its own service runs on
_ANSWER_S = 5.0
_HEAD_S = 60.0
_GONE = {"REMOVED"}


def _head_address() -> Address:
    """Return an address of the machine that this runs on, with a port that is free."""
    host = str(import_module("ray").util.get_node_ip_address())
    return Address(host, free_ports(host, 1)[0])


class RayCluster:
    """One Ray cluster and the service on it. The coordinator and the routers run on Ray's head machine.

    That machine's address stays the same as long as Ray lives, which is what clients and members go by.
    """

    def __init__(self, address: Address | None) -> None:
        """Connect. Raises InvalidConfig where Ray is not installed or no cluster answers."""
        try:
            self._ray: Any = import_module("ray")
        except ImportError as error:
            remedy = "the library ray is not installed: run scripts/setup ray on every machine"
            raise InvalidConfig("launcher", "ray", remedy) from error
        where = os.environ.get("RAY_ADDRESS", "auto") if address is None else str(address)
        try:
            if where != "auto" and os.environ.get("RAY_USE_TLS") != "1":
                _check_answers(where)
            self._ray.init(
                address=where, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR
            )
        except (OSError, RuntimeError, ValueError, grpc.FutureTimeoutError) as error:
            remedy = "no Ray cluster answers there: run `ray start` here, or give the address it tells"
            raise InvalidConfig("ray_address", None if where == "auto" else where, remedy) from error

    def close(self) -> None:
        """Leave the cluster as it is."""
        self._ray.shutdown()

    @property
    def address(self) -> str:
        """Where Ray is, as any of its machines reaches it."""
        return str(self._ray.get_runtime_context().gcs_address)

    def has_gpus(self) -> bool:
        """Tell whether any machine has a GPU."""
        return self._ray.cluster_resources().get("GPU", 0) > 0

    def free(self) -> str:
        """Say what Ray could still set aside, on all machines."""
        have = self._ray.available_resources()
        return ", ".join(f"{have.get(name, 0):g} {name}" for name in ("CPU", "GPU"))

    def head_address(self) -> Address:
        """Return an address on the head machine that is free."""
        ask = self._ray.remote(num_cpus=0, resources=_HEAD)(_head_address)
        return self._ray.get(ask.remote(), timeout=_HEAD_S)

    def names(self) -> list[str]:
        """List the service's members."""
        return sorted(self._ray.util.list_named_actors())

    def nodes(self) -> list[int]:
        """List the numbers of the nodes."""
        return sorted(int(name[5:]) for name in self.names() if name.startswith("node-"))

    def groups(self) -> list[Group]:
        """List the groups that are set aside, or are to be."""
        tables = self._ray.util.placement_group_table().values()
        named = (Group.named(each["name"]) for each in tables if each["state"] not in _GONE)
        return sorted(each for each in named if each is not None)

    def reserve(self, service: Service, groups: Sequence[Group], wait_s: float) -> bool:
        """Set groups aside; tell whether there was room in time. What there is no room for is not kept."""
        taken = self._machines() if service.spread else []
        apart = [{"ray.io/node-id": f"!in({','.join(taken)})"}] if taken else None
        made = [
            self._ray.util.placement_group(
                [service.bundle] * group.size, "STRICT_SPREAD" if service.spread else "PACK", group.name,
                lifetime="detached", bundle_label_selector=apart and apart * group.size,
            )
            for group in groups
        ]  # fmt: skip
        deadline_s = time.monotonic() + wait_s
        try:
            done = all(each.wait(max(0.0, deadline_s - time.monotonic())) for each in made)
        except BaseException:
            self.release(groups)
            raise
        if not done:
            self.release(groups)
        return done

    def ask_for_room(self, bundles: Sequence[dict[str, int]]) -> None:
        """Have Ray's autoscaler, where there is one, keep machines for so much; it replaces what was asked before."""
        import_module("ray.autoscaler.sdk").request_resources(bundles=list(bundles))

    def release(self, groups: Iterable[Group]) -> None:
        """Give groups back."""
        for group in groups:
            found = self._ray.util.get_placement_group(group.name)
            self._ray.util.remove_placement_group(found)

    def start(self, service: Service, kind: str, at: int) -> None:
        """Start a member, which Ray starts again wherever it may, for ever."""
        options: dict[str, Any] = {"num_cpus": 0, "resources": _HEAD}
        if kind == "node":
            group = group_of(at, self.groups())
            strategies = import_module("ray.util.scheduling_strategies")
            place = strategies.PlacementGroupSchedulingStrategy(
                self._ray.util.get_placement_group(group.name), placement_group_bundle_index=at - group.first
            )
            options = {"num_cpus": service.cpus, "num_gpus": service.gpus, "scheduling_strategy": place}
        name = kind if kind in ("coordinator", SCALER) else f"{kind}-{at}"
        actor = self._ray.remote(RoleActor)
        actor.options(name=name, lifetime="detached", max_restarts=-1, **options).remote(service, kind, at)

    def status(self, name: str) -> ActorStatus:
        """Tell how a member does; one that does not answer waits for Ray, or is lost."""
        try:
            return self._ask(name, "status")
        except (self._ray.exceptions.ActorDiedError, ValueError) as error:
            return ActorStatus(name, "lost", last_line=_last_line(error))
        except (self._ray.exceptions.RayActorError, self._ray.exceptions.GetTimeoutError):
            return ActorStatus(name, "waiting")

    def service(self) -> Service | None:
        """Return what members are started by; None if the coordinator cannot tell now."""
        try:
            return self._ask("coordinator", "service")
        except (self._ray.exceptions.RayError, ValueError):
            return None

    def end(self, name: str) -> None:
        """Have a member drain; one that does not answer has nothing to finish."""
        try:
            self._ask(name, "end")
        except (self._ray.exceptions.RayError, ValueError):
            self.remove(name)

    def remove(self, name: str) -> None:
        """End a member's actor, and its process if it still runs."""
        try:
            self._ray.kill(self._ray.get_actor(name), no_restart=True)
        except ValueError:  # it is gone
            return

    def _ask(self, name: str, method: str) -> Any:
        """Return a member's answer. Raises ValueError if there is none of that name, and what Ray raises."""
        return self._ray.get(getattr(self._ray.get_actor(name), method).remote(), timeout=_ANSWER_S)

    def _machines(self) -> list[str]:
        """List Ray's ids of the machines that nodes are on."""
        tables = self._ray.util.placement_group_table().values()
        return sorted(
            {
                machine
                for each in tables
                if each["state"] not in _GONE and Group.named(each["name"]) is not None
                for machine in each["bundles_to_node_id"].values()
                if machine
            }
        )


def _check_answers(where: str) -> None:
    """Raise FutureTimeoutError unless something speaks Ray's protocol there: Ray itself would wait for minutes."""
    with grpc.insecure_channel(where) as channel:
        grpc.channel_ready_future(channel).result(_ANSWER_S)


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
