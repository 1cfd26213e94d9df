"""Where a LoRA may sit in a Llama-family layer, and how the base model fuses those projections."""

from dataclasses import dataclass
from enum import Enum


class SiteGroup(Enum):
    """Projections that read the same input and that the base model computes as one matrix.

    The members' order is the order of a layer's forward pass; `sites` is the order of the fused output.
    """

    QKV = ("q_proj", "k_proj", "v_proj")
    OUT = ("o_proj",)
    GATE_UP = ("gate_proj", "up_proj")
    DOWN = ("down_proj",)

    @property
    def sites(self) -> tuple[str, ...]:
        """PEFT module names of the group's members, in the order of the fused output's columns."""
        return self.value


SITES: tuple[str, ...] = tuple(site for group in SiteGroup for site in group.sites)


@dataclass(frozen=True, slots=True)
class SiteShape:
    """One projection's size: it maps `in_features` to `out_features`."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class BaseShape:
    """What an adapter must fit: the base model's layers and the shape of each site (equal in every layer)."""

    num_layers: int
    shapes: tuple[SiteShape, ...]  # aligned with SITES

    def of(self, site: str) -> SiteShape:
        """The shape of `site`, one of SITES."""
        return self.shapes[SITES.index(site)]

    def group_out(self, group: SiteGroup) -> int:
        """Columns of the group's fused output."""
        return sum(self.of(site).out_features for site in group.sites)
