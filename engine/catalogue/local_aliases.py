"""Keep what the aliases of a single server were made from, beside what their names mean in its registry."""

from engine.catalogue.alias_targets import (
    NO_ALIAS,
    Alias,
    Targets,
    check_is_no_target,
    check_may_be_target,
    check_same_prompts,
    chosen_target,
)
from engine.errors import UnknownModel, adapter_errors
from engine.waiting.adapter_names import AdapterNames
from engine.waiting.task_pool import TaskPool
from lora.adapter import AdapterEntry
from lora.format.companions import Companions
from lora.store.registry import AdapterRegistry


class LocalAliases:
    """The aliases of one server. Used on one event loop; one change at a time."""

    def __init__(self, names: AdapterNames, registry: AdapterRegistry, pool: TaskPool) -> None:
        """Know none. Files of targets are waited for in `pool`."""
        self._names, self._registry, self._pool = names, registry, pool
        self._aliases: dict[str, Alias] = {}

    def of(self, name: str) -> Alias:
        """Return what an alias was made from; NO_ALIAS for another name."""
        return self._aliases.get(name, NO_ALIAS)

    def target_of(self, name: str, key: str) -> str:
        """Return the name whose meaning answers a request for `name`, as `chosen_target` does."""
        return chosen_target(name, self.of(name).targets, key)

    def take(self, name: str, alias: Alias) -> None:
        """Take up an alias that was made before this server began."""
        self._aliases[name] = alias

    def forget(self, name: str) -> None:
        """Take in that a name is no alias any more."""
        self._aliases.pop(name, None)

    def check_is_no_target(self, name: str) -> None:
        """Raise InvalidAdapterName for a name to which some alias leads by share."""
        check_is_no_target(name, {each: alias.targets for each, alias in self._aliases.items()})

    async def set(self, name: str, target: str, targets: Targets) -> AdapterEntry:
        """Let `name` mean what `target` means now, and its requests be answered by `targets`, if there are any.

        Raises as AdapterCatalogue.set_alias; then all is as before.
        """
        if targets:
            await self._check(name, targets)
        before, alias = self._aliases.get(name), Alias(target, targets)
        if targets:  # before the name means the first of them, so that this never answers all requests
            self.take(name, alias)
        try:
            entry = await self._names.alias(name, target)
        except BaseException:
            self.forget(name)
            if before is not None:
                self.take(name, before)
            raise
        self.take(name, alias)
        return entry

    async def _check(self, name: str, targets: Targets) -> None:
        """Raise UnknownModel or InvalidAdapterName for targets that `name` cannot lead to by share."""
        self.check_is_no_target(name)
        companions: dict[str, Companions] = {}
        for each in targets:
            check_may_be_target(name, each.name, self.of(each.name).targets)
            if (await self._names.resolve(each.name)).is_base:
                raise UnknownModel(each.name)
            with adapter_errors(each.name):
                read = self._registry.companions
                companions[each.name] = await self._pool.run(lambda each=each, read=read: read(each.name))
        check_same_prompts(name, companions)
