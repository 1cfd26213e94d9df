"""Log-probabilities in the shapes of OpenAI's objects."""

from engine.api.parsing import GenerateRequest
from engine.api.writers import CompletionWriter
from engine.output import Delta
from engine.tokenizer import Tokenizer
from scheduler.plan import TokenLogprob
from scheduler.request import SamplingParams
from tests.fakes.tokenizers import byte_tokenizer


def test_of_tokens_with_one_text_the_likeliest_is_told() -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    request = GenerateRequest("base", ((1,),), SamplingParams(logprobs=2))
    unknown = tokenizer.vocab_size  # ids without a token have no text
    drawn = TokenLogprob(unknown + 2, -3.0, 3, ((unknown, -0.5), (unknown + 1, -1.5)))
    entry = CompletionWriter(request, tokenizer).whole(0, Delta(0, "", (unknown + 2,), (drawn,)))
    logprobs = entry["logprobs"]
    assert isinstance(logprobs, dict)
    assert logprobs["top_logprobs"] == [{"": -0.5}]
