"""Draw one token for each row of logits, and tell its log-probability.

A row's logits go through, in this order: repetition penalty, presence and frequency penalties, logit bias,
banned tokens, allowed tokens; then, unless greedy: temperature, top_k, top_p (over what top_k kept), min_p; then
one draw. Every filter keeps the tokens above some logit, so tokens that tie with the last one kept are kept too. A draw
is a function of the row's logits and of (seed, stream, position): never of its neighbours in the batch. Knows
no request.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.sampling.masks import keep_allowed
from model.sampling.philox import uniforms

_NUCLEUS_LOOK = 64  # likeliest tokens among which the nucleus is sought before the whole vocabulary is sorted
COLDEST = 1e-8  # temperatures below it draw as greedily, and would divide by zero in float32


class InvalidLogits(ArithmeticError):
    """Rows whose logits are not numbers, or leave no token to choose; `rows` says which of the call."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        super().__init__(
            f"logits of rows {rows} hold NaN or infinity: check the adapter's and the base model's weights"
        )
        self.rows = rows


@dataclass(frozen=True, slots=True)
class SampleRow:
    """How to draw one token. Fields are named as in the request; `stream` is which of its n sequences draws,
    `position` the index of the token to be drawn. The token ids are needed only where a penalty is not
    neutral: repetition looks at prompt and output, presence and frequency at the output. `banned_token_ids`
    cannot be drawn; `allowed`, if given, has a bit for each token that can. `logprobs` is how many alternatives
    to report beside the token, None for no log-probability at all. They are those of the unmodified distribution, or
    with `processed` of the one that was drawn by.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    stream: int = 0
    position: int = 0
    prompt_token_ids: tuple[int, ...] = ()
    output_token_ids: tuple[int, ...] = ()
    banned_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    processed: bool = False
    allowed: NDArray[np.int32] | None = field(default=None, compare=False)

    @property
    def adjusts(self) -> bool:
        """True if the row's logits are changed before temperature."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        edits = bool(self.logit_bias) or bool(self.banned_token_ids)
        return penalties != (1, 0, 0) or edits or self.allowed is not None


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's natural-log probability under the distribution that was asked for, and its rank there (1 = most
    likely). `top` are the most likely tokens as (token id, log-probability), most likely first."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One drawn token; `logprob` is None unless the row asked for it."""

    token_id: int
    logprob: Logprob | None


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """Draw one token for each row of logits [L, vocab] float32, which are left as they are.

    Greedy ties go to the lowest token id. Raises InvalidLogits.
    """
    adjusted = _adjusted(logits, rows)
    best_logits, best = adjusted.max(dim=-1)
    _check(best_logits)
    tokens = cast(list[int], best.tolist())
    random = [i for i, row in enumerate(rows) if row.temperature > 0]
    if random:
        drawn = _draw(adjusted[random], [rows[i] for i in random])
        for i, token in zip(random, drawn, strict=True):
            tokens[i] = token
    told = [i for i, row in enumerate(rows) if row.logprobs is not None]
    shown = _shown(logits, adjusted, rows, told)
    described = _logprobs(shown, [tokens[i] for i in told], [rows[i].logprobs or 0 for i in told])
    logprob_of = dict(zip(told, described, strict=True))
    return [Sampled(token, logprob_of.get(i)) for i, token in enumerate(tokens)]


@torch.inference_mode()
def prompt_logprobs(logits: Tensor, next_token_ids: Sequence[int], top: int) -> list[Logprob]:
    """The log-probability of the prompt token that follows each row, logits [N, vocab] float32, with the
    `top` most likely tokens. Raises InvalidLogits."""
    _check(logits.amax(dim=-1))
    return _logprobs(logits, next_token_ids, [top] * len(next_token_ids))


def _check(largest: Tensor) -> None:
    """A row's largest logit is NaN if any of its logits is."""
    sound = largest.isfinite()
    if not sound.all():
        unsound = cast(list[int], (~sound).nonzero()[:, 0].tolist())
        raise InvalidLogits(tuple(unsound))


def _shown(logits: Tensor, adjusted: Tensor, rows: Sequence[SampleRow], told: Sequence[int]) -> Tensor:
    """Return the logits that the rows of `told` are described by: as they came, or as they were drawn by."""
    shown = logits[told]
    for place, i in enumerate(told):
        if rows[i].processed:
            drawn_by = adjusted[i : i + 1]
            shown[place] = (_filtered(drawn_by, rows[i : i + 1]) if rows[i].temperature > 0 else drawn_by)[0]
    return shown


def _adjusted(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    changed = [i for i, row in enumerate(rows) if row.adjusts]
    if not changed:
        return logits
    logits = logits.clone()
    for i in changed:
        _adjust(logits[i], rows[i])
    keep_allowed(logits, rows)
    return logits


def _adjust(logits: Tensor, row: SampleRow) -> None:
    """Apply penalties, bias and bans to one row's logits [vocab], in place."""
    if row.repetition_penalty != 1.0:
        seen = _index(sorted({*row.prompt_token_ids, *row.output_token_ids}), logits)
        found = logits[seen]
        logits[seen] = torch.where(found > 0, found / row.repetition_penalty, found * row.repetition_penalty)
    if row.presence_penalty or row.frequency_penalty:
        counts = Counter(row.output_token_ids)
        cost = [row.presence_penalty + row.frequency_penalty * count for count in counts.values()]
        _add(logits, list(counts), [-value for value in cost])
    _add(logits, [token for token, _ in row.logit_bias], [bias for _, bias in row.logit_bias])
    logits[_index(row.banned_token_ids, logits)] = -math.inf


def _add(logits: Tensor, token_ids: Sequence[int], values: Sequence[float]) -> None:
    added = torch.tensor(values, dtype=logits.dtype, device=logits.device)
    logits.index_add_(0, _index(token_ids, logits), added)


def _index(token_ids: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(token_ids, dtype=torch.int64, device=like.device)


def _draw(logits: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Invert each row's cumulative distribution, in order of token id, at the row's own uniform number."""
    cumulative = _weights(logits, rows).cumsum(dim=-1, dtype=torch.float64)
    chance = uniforms(
        [row.seed for row in rows], [row.stream for row in rows], [row.position for row in rows]
    )
    targets = torch.from_numpy(chance).to(logits.device)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    return cast(list[int], drawn.tolist())


def _weights(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Return [R, vocab]: each token's probability times a constant of the row; 0 where a filter excludes it."""
    return _filtered(logits, rows).exp_()


def _filtered(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Return [R, vocab]: the logits that the rows draw by, the likeliest 0, and -inf where a filter excludes."""
    scaled = logits - logits.amax(dim=-1, keepdim=True)
    scaled /= _column([max(row.temperature, COLDEST) for row in rows], logits)
    _keep_top_k(scaled, [row.top_k for row in rows])
    _keep_top_p(scaled, [row.top_p for row in rows])
    _keep_min_p(scaled, [row.min_p for row in rows])
    return scaled


def _keep_top_k(scaled: Tensor, top_k: list[int]) -> None:
    """Exclude, in place, what is less than the k-th largest; k of 0, or of the vocabulary and more, keeps all."""
    chosen = [i for i, k in enumerate(top_k) if 0 < k < scaled.shape[1]]
    if chosen:
        last = torch.tensor([top_k[i] - 1 for i in chosen], device=scaled.device)[:, None]
        largest = _largest(scaled[chosen], int(last.max()) + 1)
        _exclude_below(scaled, chosen, largest.gather(1, last))


def _keep_top_p(scaled: Tensor, top_p: list[float]) -> None:
    """Exclude, in place, what is less likely than the fewest likeliest tokens that add up to p; Holtzman et al.,
    arXiv 1904.09751. They are looked for among a few first, since sorting a vocabulary takes longer."""
    chosen = [i for i, p in enumerate(top_p) if p < 1]
    if not chosen:
        return
    kept = scaled[chosen]
    masses = kept.exp().sum(dim=-1, keepdim=True, dtype=torch.float64)
    target = masses * _column([top_p[i] for i in chosen], masses)
    edge, found = _nucleus_edge(_largest(kept, min(_NUCLEUS_LOOK, kept.shape[1])), target)
    short = (~found).nonzero()[:, 0]
    if short.numel():
        edge[short], _ = _nucleus_edge(_largest(kept[short], kept.shape[1]), target[short])
    _exclude_below(scaled, chosen, edge)


def _nucleus_edge(largest: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The last of the fewest of each row's largest, [n, count] descending, whose exponentials add up to target
    [n, 1], or else the row's last; and whether they do, [n]."""
    reached = largest.exp().cumsum(dim=-1, dtype=torch.float64)
    last = torch.searchsorted(reached, target).clamp_(max=largest.shape[1] - 1)
    return largest.gather(1, last), reached[:, -1] >= target[:, 0]


def _largest(scaled: Tensor, count: int) -> Tensor:
    """Each row's `count` largest, [n, count] descending. On a CPU numpy selects and sorts, with vector instructions
    that torch does not use: sorting 32,000 logits takes 62 µs instead of 5,000."""
    if scaled.device.type != "cpu":
        return scaled.topk(count).values
    values, rest = scaled.numpy(), scaled.shape[1] - count
    if rest:
        values = np.partition(values, rest, axis=-1)[:, rest:]
    return torch.from_numpy(np.sort(values, axis=-1)[:, ::-1].copy())


def _keep_min_p(scaled: Tensor, min_p: list[float]) -> None:
    """Exclude, in place, what is less than p times as likely as the likeliest token, whose scaled logit is
    0."""
    chosen = [i for i, p in enumerate(min_p) if p > 0]
    if chosen:
        _exclude_below(scaled, chosen, _column([math.log(min_p[i]) for i in chosen], scaled))


def _exclude_below(scaled: Tensor, chosen: list[int], least: Tensor) -> None:
    """Exclude, in place, what is below the row's `least` ([len(chosen), 1])."""
    bounds = torch.full_like(scaled[:, :1], -math.inf)
    bounds[chosen] = least
    scaled.masked_fill_(scaled < bounds, -math.inf)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _logprobs(logits: Tensor, token_ids: Sequence[int], tops: Sequence[int]) -> list[Logprob]:
    """Describe one token of each row, logits [N, vocab], with `tops[i]` alternatives."""
    if not token_ids:
        return []
    total = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(1, _index(token_ids, logits)[:, None])
    ranks = cast(list[int], (logits > chosen).sum(dim=-1).add_(1).tolist())
    likeliest = logits.topk(min(max(tops), logits.shape[1]), dim=-1)
    tokens = cast(list[list[int]], likeliest.indices.tolist())
    logprobs = cast(list[list[float]], (likeliest.values - total).tolist())
    own = cast(list[float], (chosen - total)[:, 0].tolist())
    return [
        Logprob(token, logprob, rank, tuple(zip(tokens[i], logprobs[i], strict=True))[: tops[i]])
        for i, (token, logprob, rank) in enumerate(zip(token_ids, own, ranks, strict=True))
    ]
