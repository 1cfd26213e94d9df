"""Begin thousands of calls and cancel them, in a process of their own: python -m tests.engine.rpc.cancel_storm.

After such a storm gRPC may cancel later calls of the process that made it. So the tests' own process makes none.
"""

import asyncio
import random
import sys

import grpc

ROUNDS, AT_ONCE = 40, 50


async def cancel_many(address: str, method: str, sent: bytes) -> None:
    """Have calls of `method` at `address` cancelled, some at once and some a moment later. Raises RuntimeError."""
    arguments = ("-m", "tests.engine.rpc.cancel_storm", address, method, sent.hex())
    storm = await asyncio.create_subprocess_exec(sys.executable, *arguments)
    if await storm.wait() != 0:
        raise RuntimeError(f"the storm ended with {storm.returncode}")


def main(address: str, method: str, sent: bytes) -> None:
    """Be the process."""
    chance = random.Random(7)
    with grpc.insecure_channel(address) as channel:
        begin = channel.unary_stream(method)
        for _ in range(ROUNDS):
            for call in [begin(sent) for _ in range(AT_ONCE)]:
                if chance.random() < 0.1:
                    call.initial_metadata()
                call.cancel()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], bytes.fromhex(sys.argv[3]))
