"""Answer one word under two adapters and under the base model, in one batch, without a server.

Run it with `python examples/two_adapters.py`.
"""

from engine import LLM, SamplingParams

WORD = "garden"


def main() -> None:
    """Print what each adapter, and the base model, answers to the same word."""
    llm = LLM()  # the embedded model; LLM("path/to/llama", loras={"support": "path/to/adapter"}) takes yours
    adapters = ["reverse", "upper", None]  # None is the base model, which echoes a plain word
    conversations = [[{"role": "user", "content": WORD}] for _ in adapters]
    results = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=16), adapters)
    for adapter, result in zip(adapters, results, strict=True):
        print(f"{adapter or 'base'}: {result.outputs[0].text}")
    llm.close()


if __name__ == "__main__":
    main()
