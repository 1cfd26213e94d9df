"""Show the models of an engine as one tenant sees them: what it may not use is not there, whoever else has it."""

from typing import Protocol

from engine.api.parsing import FetchedModels
from engine.tenants.accounts import TenantAccounts
from engine.tokenizer import Tokenizer


class AccountedModels(FetchedModels, Protocol):
    """Models, and the accounts that tell who may use them."""

    @property
    def accounts(self) -> TenantAccounts:
        """What tenants may use."""
        ...

    @property
    def model_names(self) -> tuple[str, ...]:
        """All names of the base model."""
        ...


class TenantModels:
    """FetchedModels of one tenant."""

    def __init__(self, models: AccountedModels, tenant: str) -> None:
        self._models, self._tenant = models, tenant

    @property
    def tokenizer(self) -> Tokenizer:
        """The base model's tokenizer and chat template."""
        return self._models.tokenizer

    def tokenizer_of(self, model: str) -> Tokenizer:
        """Return the tokenizer of a model. As ServedModels.tokenizer_of."""
        return self._models.tokenizer_of(model)

    @property
    def model_name(self) -> str:
        """The name that responses call the base model by."""
        return self._models.model_name

    @property
    def model_names(self) -> tuple[str, ...]:
        """All names of the base model."""
        return self._models.model_names

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its output together."""
        return self._models.max_model_len

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._models.vocab_size

    def may_serve(self, model: str) -> bool:
        """Return False if the tenant may not use `model`, or there is none."""
        return self._models.accounts.may_use(self._tenant, model) and self._models.may_serve(model)

    async def find(self, model: str) -> None:
        """Have what `model` means fetched. As FetchedModels.find."""
        await self._models.find(model)
