"""A content's identity. A room of its own, since whoever only lays adapters out needs no library of digests."""

from blake3 import blake3
from torch import Tensor

from lora.flat import FlatLayout, write_header


def digest_of(layout: FlatLayout, rows: Tensor) -> str:
    """The content's identity: BLAKE3 (hex) of header and rows. rows: [nbytes] uint8 on the host.

    Every pulled adapter is digested before it is served, and SHA-256 takes several times as long for it as a network
    takes to bring it. (O'Connor, Aumasson, Neves, Wilcox-O'Hearn: BLAKE3, one function, fast everywhere, 2020.)
    """
    content = blake3(write_header(layout).encode())
    content.update(rows.numpy().data)
    return content.hexdigest()
