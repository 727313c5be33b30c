"""A conversation as tokens, with the assistant's turns marked as what to learn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from contract.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "\u2042trunkline\u2042"


def encode_messages(
    messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Token ids of `messages` through the tokenizer's chat template, and for each whether an assistant says it.

    A template with `{% generation %}` blocks marks the turns itself. For any other, an assistant turn is where the
    rendered text changes when that turn's content does, plus the special token that ends it; what the template itself
    puts around the content (an empty thinking block, say) is context.

    Raises DataError without a chat template, where the template refuses the conversation or fails on it, or for a
    tokenizer that cannot map tokens to characters.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError("the model's tokenizer has no chat template; wants 'text' or 'prompt' and 'completion' rows")
    if not tokenizer.is_fast:
        raise DataError("the model's tokenizer cannot map tokens to characters (no tokenizer.json)")
    try:
        if _GENERATION_BLOCK.search(str(tokenizer.get_chat_template())):
            return _marked_by_template(messages, tokenizer)
        return _marked_by_probe(messages, tokenizer)
    except DataError:
        raise
    except Exception as error:
        # The reason of a refusal goes to whoever runs the training, and a template may quote the conversation in it.
        said = str(error) if isinstance(error, TemplateError) else ""
        reason = said if said and said in str(tokenizer.chat_template) else type(error).__name__
        raise DataError(f"the chat template refuses the conversation: {reason}") from error


def _marked_by_template(
    messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    encoded = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]


def _marked_by_probe(
    messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    text = _render(messages, tokenizer)
    spans = [
        _content_span(messages, index, text, tokenizer)
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = list(encoded["input_ids"])
    starts = [start for start, _ in encoded["offset_mapping"]]
    content = [any(begin <= start < end for begin, end in spans) for start in starts]
    special = set(tokenizer.all_special_ids)
    learned = [
        said or (index > 0 and content[index - 1] and ids[index] in special) for index, said in enumerate(content)
    ]
    return ids, learned


def _content_span(
    messages: Sequence[dict[str, str]], index: int, text: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """Where in `text` the content of message `index` stands, found by rendering with another content in its place."""
    probed = [dict(message) for message in messages]
    probed[index]["content"] = _PROBE
    before, found, after = _render(probed, tokenizer).partition(_PROBE)
    if not found or not text.startswith(before) or not text.endswith(after) or len(before) + len(after) > len(text):
        raise DataError(
            f"the chat template changes more than message {index + 1} with its content; "
            "wants a template with {% generation %} blocks, or 'prompt' and 'completion' rows"
        )
    return len(before), len(text) - len(after)


def _render(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False))
