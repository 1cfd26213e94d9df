"""Declare the fields that this server does not implement, with the values that ask for nothing.

They are OpenAI's, vLLM's and SGLang's. Clients send them with their defaults, which change nothing and are
accepted. Any other value asks for what the server lacks, and is refused by name. Null always asks for nothing.
"""

from collections.abc import Mapping

_OFF = (False,)
_EITHER = (True, False)

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    # OpenAI
    "suffix": ("",),
    "echo": _OFF,
    "best_of": (1,),
    "max_completion_tokens": (),
    "top_logprobs": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": _EITHER,
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "store": _OFF,
    "service_tier": ("auto", "default"),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    # Drawing and stopping, in vLLM and SGLang
    "use_beam_search": _OFF,
    "length_penalty": (1.0,),
    "early_stopping": _OFF,
    "bad_words": ([],),
    "allowed_token_ids": (),
    "stop_regex": ([],),
    "no_stop_trim": _OFF,
    "repetition_detection": (),
    "thinking_token_budget": (),
    "logits_processors": ([],),
    "custom_logit_processor": (),
    "custom_params": ({},),
    "vllm_xargs": ({},),
    # Prompts and text
    "prompt_embeds": (),
    "input_embeds": (),
    "input_ids": (),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "documents": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "use_audio_in_video": _OFF,
    "min_dynamic_patch": (),
    "max_dynamic_patch": (),
    "image_max_dynamic_patch": (),
    "video_max_dynamic_patch": (),
    "add_special_tokens": _OFF,
    "add_generation_prompt": (True,),
    "continue_final_message": _OFF,
    "spaces_between_special_tokens": _EITHER,  # text never has spaces that its tokens do not spell
    "detokenize": (True,),
    "thinking": ({"type": "disabled"},),
    "include_reasoning": (True,),
    "separate_reasoning": _EITHER,  # nothing is taken for reasoning, so there is nothing to separate
    "stream_reasoning": _EITHER,
    # Structured output
    "structured_outputs": ({},),
    "structural_tag": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": ("auto",),
    "guided_whitespace_pattern": (),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    # Scheduling, caching and several nodes
    "priority": (0,),
    "cache_salt": (),
    "extra_key": (),
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "session_params": ({},),
    "session_id": (),
    "rid": (),
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "data_parallel_rank": (),
    "routed_dp_rank": (),
    "disagg_prefill_dp_rank": (),
    # More to be returned
    "return_hidden_states": _OFF,
    "return_routed_experts": _OFF,
    "return_cached_tokens_details": _OFF,
    "return_meta_info": _OFF,
    "return_prompt_token_ids": _OFF,
    "custom_labels": ({},),
}
"""Of requests for text, tokens included: a field that an endpoint implements is looked for there first."""

TOKENS_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "features": (),
    "token_offsets": (),
    "assistant_tokens_mask": (),
    "kv_transfer_params": ({},),
}
"""Of requests of token ids for token ids."""

SAMPLING_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "extra_args": ({},),
    "prompt_logprob_token_ids": (),
    "prompt_logprob_start": (0,),
    "logprob_token_ids": (),
    "routed_experts_prompt_start": (0,),
    "trace_decode_token_ids": (),
    "thinking_token_budget": (-1,),
    "repetition_detection": (),
    "skip_reading_prefix_cache": _OFF,
    "detokenize": _EITHER,  # no text is told
    "flat_logprobs": _EITHER,  # this and the next say how vLLM keeps in memory what it answers
    "skip_clone": _EITHER,
    "output_kind": (0, 1, 2),
    "stream_interval": (1,),
    "spaces_between_special_tokens": _EITHER,
}
"""Of the sampling parameters of such requests."""

ADAPTER_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "is_3d_lora_weight": _OFF,
    "pinned": _OFF,
    "added_tokens_config": ({},),
    "load_format": ("auto",),
}
"""Of requests that load an adapter."""

_INSTEAD: Mapping[str, str] = {
    "detokenize": "ask for return_token_ids=true and pass the text over",
    "best_of": "ask for n answers and choose among them",
    "echo": "use /v1/completions",
    "suffix": "put all of the text into the prompt",
    "return_prompt_token_ids": "use return_token_ids",
    "truncate_prompt_tokens": "cut the prompt before it is sent",
    "chat_template": "put the text together yourself and use /v1/completions",
    "allowed_token_ids": "use logit_bias",
    "bad_words": "use logit_bias",
    "rid": "use request_id",
    "no_stop_trim": "use include_stop_str_in_output",
}


def asks_for_nothing(given: object, neutral: tuple[object, ...]) -> bool:
    """Return whether a value is null or one of `neutral`; nulls within an object count as left out."""
    if isinstance(given, dict):
        given = {key: value for key, value in given.items() if value is not None}  # pyright: ignore[reportUnknownVariableType] - any JSON
    return given is None or any(
        given == value and isinstance(given, bool) == isinstance(value, bool) for value in neutral
    )


def remedy(field: str) -> str:
    """Say what to do about a value that asks for what the server lacks."""
    instead = _INSTEAD.get(field)
    return "this server does not support it: leave the field out" + (f", or {instead}" if instead else "")
