"""Where a LoRA may sit in a Llama-family model, and how the base model fuses those projections."""

from dataclasses import dataclass
from enum import Enum


class SiteGroup(Enum):
    """Projections that read the same input and that the base model computes as one matrix.

    The members' order is the order of a forward pass; `sites` is the order of the fused output. EMBEDDING reads token
    ids: to it they are vectors of zeros and a one, as long as the vocabulary.
    """

    EMBEDDING = ("embed_tokens",)
    QKV = ("q_proj", "k_proj", "v_proj")
    OUT = ("o_proj",)
    GATE_UP = ("gate_proj", "up_proj")
    DOWN = ("down_proj",)
    HEAD = ("lm_head",)

    @property
    def sites(self) -> tuple[str, ...]:
        """PEFT module names of the group's members, in the order of the fused output's columns."""
        return self.value


LAYER_GROUPS = (SiteGroup.QKV, SiteGroup.OUT, SiteGroup.GATE_UP, SiteGroup.DOWN)
SITES: tuple[str, ...] = tuple(site for group in LAYER_GROUPS for site in group.sites)
"""The sites that every layer has."""
OUTER_SITES: tuple[str, ...] = SiteGroup.HEAD.sites + SiteGroup.EMBEDDING.sites
"""The sites outside the layers, once in a model. They count to layer 0."""


@dataclass(frozen=True, slots=True)
class SiteShape:
    """One projection's size: it maps `in_features` to `out_features`."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class BaseShape:
    """What an adapter must fit: the base model's layers and the shape of each site (equal in every layer).

    `outer` may be cut short: the sites outside the layers that it leaves out are not meant.
    """

    num_layers: int
    shapes: tuple[SiteShape, ...]  # aligned with SITES
    outer: tuple[SiteShape, ...] = ()  # aligned with OUTER_SITES

    def of(self, site: str) -> SiteShape:
        """The shape of `site`, one of SITES or OUTER_SITES. Raises LookupError if the base has none."""
        if site in OUTER_SITES:
            return self.outer[OUTER_SITES.index(site)]
        return self.shapes[SITES.index(site)]

    def group_out(self, group: SiteGroup) -> int:
        """Columns of the group's fused output."""
        return sum(self.of(site).out_features for site in group.sites)
