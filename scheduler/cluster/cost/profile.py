"""A node type's profile: its cost models, the SLO, a typical request, and the operating points that follow.

Text in, values out: reading and writing the JSON file is left to whoever has a file system.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scheduler.cluster.cost.model import CostModel, Kernel
from scheduler.cluster.state import OperatingPoints

_BISECTIONS = 60


class InvalidProfile(ValueError):
    """A profile that is not JSON, lacks a field, or asks for what its node cannot do; says which and the
    remedy."""


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request may wait: seconds to its first token, and between tokens."""

    ttft_s: float
    tbt_s: float


@dataclass(frozen=True, slots=True)
class Lengths:
    """The mean request, in tokens."""

    prompt_tokens: float
    output_tokens: float


@dataclass(frozen=True, slots=True)
class Limits:
    """What one node has room for: prompt tokens in one step, tokens of K/V, and adapters in pages; and what a token
    of K/V takes."""

    step_prompt_tokens: int
    kv_tokens: int
    page_bytes: int = 2 << 20
    kv_token_bytes: int = 128 << 10  # an 8B Llama's in 16 bits


@dataclass(frozen=True, slots=True)
class Profile:
    """`provenance` says how the coefficients were come by: "derived" from data sheets, or "measured"."""

    hardware: str
    base_model: str
    provenance: str
    note: str
    models: tuple[CostModel, ...]
    slo: Slo
    lengths: Lengths
    limits: Limits

    def model(self, kernel: Kernel) -> CostModel:
        """Return the cost model of one kernel kind."""
        for model in self.models:
            if model.kernel is kernel:
                return model
        known = [model.kernel.value for model in self.models]
        raise InvalidProfile(
            f"kernel={kernel.value!r} is not in the profile of {self.hardware}: it has {known}"
        )

    def operating_points(self, kernel: Kernel, ranks: Sequence[int]) -> OperatingPoints:
        """Return OP of each rank under this profile's SLO."""
        model = self.model(kernel)
        rates = tuple(operating_point(model, rank, self.slo, self.lengths, self.limits) for rank in ranks)
        return OperatingPoints(tuple(ranks), rates)


def operating_point(model: CostModel, rank: int, slo: Slo, lengths: Lengths, limits: Limits) -> float:
    """Return the most input plus output tokens/s that one node sustains within the SLO.

    Every request is of a different adapter of `rank`. In the steady state of continuous batching with B
    sequences decoding, each step draws B tokens and reads B·prompt/output prompt tokens. A step may last as
    long as the SLO's time between tokens. A prompt is read in ceil(prompt / step_prompt_tokens) steps after
    waiting for the one that runs, and must make its time to first token. The largest such B that K/V has room
    for gives the rate.
    """
    chunks = math.ceil(lengths.prompt_tokens / limits.step_prompt_tokens)
    longest_s = min(slo.tbt_s, slo.ttft_s / (chunks + 1))
    if longest_s <= model.base_s:
        raise InvalidProfile(
            f"slo={slo} leaves {longest_s:.4f} s for a step but an empty one takes {model.base_s:.4f}: "
            "loosen the SLO or take a faster node"
        )
    room = limits.kv_tokens / (lengths.prompt_tokens + lengths.output_tokens)
    sequences = _largest(lambda count: _steady_step_s(model, rank, count, lengths) <= longest_s, room)
    rows = sequences * (1 + lengths.prompt_tokens / lengths.output_tokens)
    return rows / _steady_step_s(model, rank, sequences, lengths)


def _steady_step_s(model: CostModel, rank: float, sequences: float, lengths: Lengths) -> float:
    """Return seconds of a step that `sequences` share, each of its own adapter; a prompt is read whole."""
    prompts, rank = sequences / lengths.output_tokens, model.charged_rank(rank)
    rows = sequences + prompts * lengths.prompt_tokens
    charged = (
        1.0,
        prompts * lengths.prompt_tokens,
        sequences,
        sequences * (lengths.prompt_tokens + lengths.output_tokens / 2),
        sequences * rank,
        rows * rank,
        sequences,
        rows,
        prompts * lengths.prompt_tokens * (lengths.prompt_tokens + 1) / 2,
        max(0.0, rows - model.knee_rows),
    )
    return sum(a * b for a, b in zip(model.coefficients, charged, strict=True))


def _largest(holds: Callable[[float], bool], most: float) -> float:
    """Find, by bisection, the largest number up to `most` for which what holds for every smaller one `holds`."""
    if holds(most):
        return most
    low, high = 0.0, most
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def to_json(profile: Profile) -> str:
    """Return the profile as JSON text, which `from_json` turns back into an equal one."""
    plain = asdict(profile)
    for model in plain["models"]:
        model["kernel"] = model["kernel"].value
    return json.dumps(plain, indent=2) + "\n"


def from_json(text: str) -> Profile:
    """Read a profile; raises InvalidProfile naming what is missing or wrong."""
    try:
        return _profile(json.loads(text))
    except json.JSONDecodeError as error:
        raise InvalidProfile(f"the profile is not JSON ({error}): write it with to_json") from error
    except KeyError as error:
        raise InvalidProfile(f"the profile lacks the field {error}: write it with to_json") from error
    except (TypeError, ValueError) as error:
        raise InvalidProfile(
            f"the profile has a field of the wrong kind ({error}): write it with to_json"
        ) from error


def _profile(plain: Mapping[str, Any]) -> Profile:
    models = tuple(_cost_model(model) for model in plain["models"])
    return Profile(
        hardware=plain["hardware"],
        base_model=plain["base_model"],
        provenance=plain["provenance"],
        note=plain["note"],
        models=models,
        slo=Slo(**plain["slo"]),
        lengths=Lengths(**plain["lengths"]),
        limits=Limits(**plain["limits"]),
    )


def _cost_model(plain: Mapping[str, Any]) -> CostModel:
    coefficients = {**plain}
    kernel = Kernel(coefficients.pop("kernel"))
    return CostModel(kernel, **coefficients)
