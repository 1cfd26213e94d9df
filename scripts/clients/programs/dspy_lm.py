"""DSPy's language model and a program of one prediction."""
# pyright: basic, reportMissingImports=false
# The client is installed where this runs.

import asyncio
import contextlib

import dspy
from dspy.utils.exceptions import AdapterParseError, LMInvalidRequestError

from scripts.clients.probe import REVERSED, UPPER, WORD, Probe, expect, main


def language_model(probe: Probe, model: str, **options: object) -> dspy.LM:
    """Make a model as DSPy's users do; nothing is answered from its cache."""
    server = {"api_base": probe.base_url, "api_key": probe.key, "num_retries": 0}
    return dspy.LM(f"openai/{model}", temperature=0, max_tokens=64, cache=False, **server, **options)


def program(probe: Probe) -> None:
    """Try what the client offers."""
    with probe.tries("plain"):
        expect(language_model(probe, "demo")(WORD), [WORD])
    with probe.tries("adapter"):
        expect(language_model(probe, "reverse")(WORD), [REVERSED])
    with probe.tries("engine litellm"):
        expect(language_model(probe, "upper", engine="litellm")(WORD), [UPPER])
    with probe.tries("completions"):
        assert language_model(probe, "upper", model_type="text")(WORD)
    with probe.tries("logprobs"):
        answer = language_model(probe, "reverse", logprobs=True, top_logprobs=2)(WORD)[0]
        expect(answer["text"], REVERSED)
        assert answer["logprobs"]
    with probe.tries("stop"):
        expect(language_model(probe, "demo", stop=["d"])(WORD), ["gar"])
    with probe.tries("batch"):
        model = language_model(probe, "upper")
        found = dspy.Parallel(num_threads=4, disable_progress_bar=True)([(model, (WORD,))] * 4)
        expect(found, [[UPPER]] * 4)
    with probe.tries("error"):
        try:
            language_model(probe, "missing")(WORD)
        except LMInvalidRequestError:
            pass
        else:
            raise AssertionError("an unknown model was answered")
    with probe.tries("a prompt that is too long"):
        try:
            language_model(probe, "demo")(WORD * 1000)
        except dspy.ContextWindowExceededError:
            pass
        else:
            raise AssertionError("a prompt beyond the model's length was taken")
    predictions(probe)
    with probe.tries("streamify"):
        assert len(asyncio.run(streamed(probe))) > 1


def predictions(probe: Probe) -> None:
    """Predict with two adapters of DSPy. The answer lacks the form that they ask for: that takes a larger model."""
    for adapter in (dspy.ChatAdapter(use_json_adapter_fallback=False), dspy.JSONAdapter()):
        with (
            probe.tries(f"a prompt of {type(adapter).__name__}"),
            dspy.context(lm=language_model(probe, "demo"), adapter=adapter),
            contextlib.suppress(AdapterParseError),
        ):
            dspy.Predict("word -> answer")(word=WORD)


async def streamed(probe: Probe) -> list[object]:
    """Gather the chunks of a streamed prediction, whose answer lacks the form too."""
    predict, chunks = dspy.streamify(dspy.Predict("word -> answer")), []
    form = dspy.ChatAdapter(use_json_adapter_fallback=False)
    with dspy.context(lm=language_model(probe, "demo"), adapter=form), contextlib.suppress(AdapterParseError):
        async for chunk in predict(word=WORD):
            chunks.append(chunk)
    return chunks


if __name__ == "__main__":
    main(program)
