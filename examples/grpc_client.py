"""Ask a running server over gRPC, by the client that comes with the project.

Start `scripts/serve --grpc-port 8001` in another terminal, then run `python examples/grpc_client.py [HOST:PORT]`.
"""

import sys

from engine import SamplingParams
from engine.client import CallFailed, Client

PROMPT = "<|user|>garden<|end|><|assistant|>"  # the embedded model's chat template, which gRPC does not apply


def main(address: str) -> None:
    """Print the adapters, a whole answer, a streamed one, and a refusal."""
    params = SamplingParams(temperature=0)
    with Client(address, timeout_s=60) as client:
        print("adapters:", *(each.name for each in client.adapters()))
        print("reverse:", client.generate(PROMPT, params, adapter="reverse")[0].text)
        print("upper:", "".join(part.text for part in client.stream(PROMPT, params, adapter="upper")))
        try:
            client.generate(PROMPT, params, adapter="nobody")
        except CallFailed as error:
            print("nobody:", error.code)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001")
