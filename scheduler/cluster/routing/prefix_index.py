"""Which prompt prefixes a router believes each node's prefix cache to hold, from what it sent there.

Prompts are cut into chunks, each hashed with the adapter and all before it. A node is taken to keep the chunks
that were sent to it last, as many as its K/V memory holds. A wrong belief costs a worse choice, never a wrong
answer: nodes look prompts up by their own digests.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

CHUNK_TOKENS = 256


def prefix_chunks(
    adapter: str, token_ids: Sequence[int], adapted_from: int = 0, salt: str = ""
) -> tuple[int, ...]:
    """Hash the whole chunks of a prompt under the adapter of that digest, each with those before it.

    Chunks that end before position `adapted_from` are the base's, and all are apart by `salt`, as in `Request`.
    """
    parent = hash(("" if adapted_from else adapter) + salt)
    adapted = adapted_from // CHUNK_TOKENS * CHUNK_TOKENS if adapted_from else -1
    chunks: list[int] = []
    for start in range(0, len(token_ids) - CHUNK_TOKENS + 1, CHUNK_TOKENS):
        if start == adapted:
            parent = hash((parent, adapter, adapted_from))
        parent = hash((parent, tuple(token_ids[start : start + CHUNK_TOKENS])))
        chunks.append(parent)
    return tuple(chunks)


class PrefixIndex:
    """Owner of these beliefs. `node_chunks` bounds what is believed of one node."""

    def __init__(self, node_chunks: int) -> None:
        self._node_chunks = node_chunks
        self._nodes: dict[str, OrderedDict[int, None]] = {}

    def sent(self, node: str, chunks: Sequence[int]) -> None:
        """Note that a prompt of these chunks goes to `node`; its first chunks are forgotten last."""
        held = self._nodes.setdefault(node, OrderedDict())
        for chunk in reversed(chunks):
            held[chunk] = None
            held.move_to_end(chunk)
        while len(held) > self._node_chunks:
            held.popitem(last=False)

    def lose(self, node: str) -> None:
        """Forget what is believed of a node that is gone."""
        self._nodes.pop(node, None)

    def cached_tokens(self, chunks: Sequence[int]) -> Mapping[str, int]:
        """Return how many leading tokens of a prompt each node is believed to hold, worked out when asked."""
        return _CachedTokens(self._nodes, chunks)


class _CachedTokens(Mapping[str, int]):
    def __init__(self, nodes: Mapping[str, OrderedDict[int, None]], chunks: Sequence[int]) -> None:
        self._nodes, self._chunks = nodes, chunks

    def __getitem__(self, node: str) -> int:
        held = self._nodes[node]
        count = 0
        for chunk in self._chunks:
            if chunk not in held:
                break
            count += 1
        return count * CHUNK_TOKENS

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)
