"""transformers + PEFT as the oracle of a base model with many adapters: one request at a time, no batching."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import peft
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora.target_modules import SITES
from tests.oracles import hf
from tests.oracles.tokenizer import write_tokenizer


class PeftOracle:
    """A base model with named adapters (PEFT folders), computed in the model's dtype on the CPU."""

    def __init__(self, base: PreTrainedModel, folders: Mapping[str, Path]) -> None:
        self._base = base
        self._model: peft.PeftModel | None = None
        for name, folder in folders.items():
            if self._model is None:
                self._model = peft.PeftModel.from_pretrained(base, str(folder), adapter_name=name)
            else:
                self._model.load_adapter(str(folder), adapter_name=name)

    def greedy(self, adapter: str | None, token_ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """The tokens that greedy decoding adds under the adapter, ends ignored."""
        assert self._model is not None
        if adapter is None:
            with self._model.disable_adapter():
                return hf.greedy(self._base, token_ids, max_new_tokens)
        self._model.set_adapter(adapter)
        return hf.greedy(self._base, token_ids, max_new_tokens)

    def logprobs(self, adapter: str | None, token_ids: Sequence[int]) -> Tensor:
        """[T, vocab] float32 log-probabilities of the token after each of the prompt's."""
        assert self._model is not None
        if adapter is None:
            with self._model.disable_adapter():
                return hf.logits(self._base, token_ids).log_softmax(-1)
        self._model.set_adapter(adapter)
        return hf.logits(self._base, token_ids).log_softmax(-1)


def write_adapter(base: PreTrainedModel, folder: Path, config: peft.LoraConfig, seed: int) -> Path:
    """A random adapter over `base`, written by PEFT: deltas as large as an eighth of the base's outputs."""
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_embedding_A" in name:
                parameter.normal_(generator=generator)
            elif "lora_A" in name:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
            elif "lora_B" in name or "lora_embedding_B" in name:
                parameter.normal_(std=0.1 * parameter.shape[1] ** -0.5, generator=generator)
    assert isinstance(model, peft.PeftModel)
    model.save_pretrained(str(folder))
    model.unload()
    return folder


def write_llama(folder: Path, ranks: Mapping[str, int]) -> Path:
    """A small Llama with a tokenizer in `folder`/base, and in `folder`/NAME an adapter of each rank over all sites."""
    base = hf.build("llama-3")
    hf.save(base, folder / "base")
    write_tokenizer(folder / "base")
    for seed, (name, rank) in enumerate(ranks.items()):
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(SITES))
        write_adapter(base, folder / name, config, seed)
    return folder
