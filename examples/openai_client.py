"""Ask a running server through the official OpenAI client; an adapter's name stands where a model's does.

Start `scripts/serve` in another terminal, then run `python examples/openai_client.py [URL]`.
"""

import sys

import openai

WORD = "garden"


def main(url: str) -> None:
    """Print the names that the server answers for, one whole answer and one streamed answer."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused") as client:
        print("models:", *sorted(model.id for model in client.models.list()))
        whole = client.chat.completions.create(
            model="reverse", messages=[{"role": "user", "content": WORD}], temperature=0
        )
        print("reverse:", whole.choices[0].message.content)
        chunks = client.chat.completions.create(
            model="upper", messages=[{"role": "user", "content": WORD}], temperature=0, stream=True
        )
        print("upper:", "".join(chunk.choices[0].delta.content or "" for chunk in chunks))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
