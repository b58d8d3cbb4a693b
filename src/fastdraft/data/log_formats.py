"""A line of a log or a data set as an OpenAI request and its answer, whoever wrote it.

`asked(row)` gives the request, with `messages` or a `prompt`, `answered(row)` the answer, with `choices`: of
OpenAI's chats, completions, Responses, batches, Anthropic's, Ollama's, of ShareGPT's, TRL's, Alpaca's rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdraft.data.messages import BESIDE_TEXT, from_json, message_text

# Request keys that a chat template reads as variables of the same names.
_VARIABLES = ["tools", "documents", "enable_thinking", "reasoning_effort"]
_VARIABLES += ["add_generation_prompt", "continue_final_message"]
# Those that change the prompt in ways that cannot be repeated here.
_UNSUPPORTED = ["functions", "chat_template", "suffix", "echo", "previous_response_id", "conversation"]
_UNSUPPORTED += ["truncate_prompt_tokens"]
TALKS = ("conversations", "conversation")  # keys of data sets: a whole talk, that may end with a question
# Status of a response of Responses, type of a result of Anthropic's batches.
_NO_ANSWER = ("failed", "cancelled", "errored", "canceled", "expired")


def asked(row: Mapping[str, Any]) -> dict[str, Any]:
    """The request's keys, those beside it, Ollama's `options` and the `extra_body` of OpenAI's client in one;
    `messages` as they were written.
    """
    inner = _mapping(*(row.get(key) for key in ("request", "body", "params")))
    options = _mapping(inner.get("options"), row.get("options"))
    extra = _mapping(inner.get("extra_body"), row.get("extra_body"))
    # Arrow writes nulls for whatever other rows have.
    told = {k: v for part in (row, inner, options, extra) for k, v in part.items() if v is not None}
    # Ollama's /api/generate puts the prompt into the template, unless it is called raw.
    is_generate = "response" in _mapping(row.get("response")) and not told.get("raw")
    messages = _messages(told, is_generate=is_generate)
    return told if messages is None else {**told, "messages": messages}


def _messages(told: Mapping[str, Any], *, is_generate: bool) -> Any:
    prompt, words, given = told.get("prompt"), told.get("instruction"), told.get("input")
    for talk in (from_json(told.get(key)) for key in ("messages", *TALKS)):
        # Lists, or columns of them; the `conversation` of Responses is a name or {"id": name}.
        if talk and isinstance(_first_of(talk), list | dict):
            return talk
    if isinstance(prompt, list) and isinstance(_first_of(prompt), dict):
        return [*prompt, *_list(told.get("completion"))]
    if isinstance(prompt, str) and is_generate:
        return [{**_message("user", prompt), "images": told.get("images")}]
    if prompt is not None:
        return None
    if isinstance(words, str):
        # What an instruction is about follows it, as in prompts of data sets.
        about = [text for text in (given, told.get("context")) if text and isinstance(text, str)]
        turns = [text for pair in _list(told.get("history")) for text in _list(pair)]
        turns.append("\n\n".join([words, *about]))
        return [_message(("user", "assistant")[number % 2], text) for number, text in enumerate(turns)]
    if isinstance(given, str):
        return [_message("user", given)]
    items = [item if "role" in item else _item(item) for item in map(_mapping, _list(given))]
    return items or None


def system_words(told: Mapping[str, Any]) -> str:
    """The system message that stands beside the messages; empty without one."""
    keys = ("system", "system_prompt", *(["instructions"] if "input" in told else []))
    texts = (message_text({"content": told.get(key)})[0] for key in keys)
    return "\n\n".join(text for text in texts if text)


def template_arguments(told: Mapping[str, Any]) -> dict[str, Any] | str:
    """What the request tells the chat template beside the messages, or the key that cannot be repeated."""
    messages, think = told.get("messages"), told.get("think")
    if key := next((key for key in _UNSUPPORTED if told.get(key) and told[key] is not messages), ""):
        return key
    if isinstance(told.get("thinking"), dict):  # servers tell their templates in words of their own
        return "thinking"
    arguments, tools = told.get("chat_template_kwargs", {}), told.get("tools", [])
    if not isinstance(arguments, dict) or {"chat_template", "tokenize"} & arguments.keys():
        return "chat_template_kwargs"
    # Anthropic's tools and those of Responses have another form, which servers translate.
    if not isinstance(tools, list) or not all("function" in _mapping(tool) for tool in tools):
        return "tools"
    effort = think if isinstance(think, str) else _mapping(told.get("reasoning")).get("effort")  # Ollama's
    named = {"reasoning_effort": effort, "enable_thinking": think if isinstance(think, bool) else None}
    named |= {key: told[key] for key in _VARIABLES if told.get(key) not in (None, [])}
    if isinstance(messages, list) and _mapping(*messages[-1:]).get("prefix"):
        named["continue_final_message"] = True  # Mistral's and DeepSeek's word
    if named.get("continue_final_message"):
        named["add_generation_prompt"] = False
    return {key: value for key, value in (named | arguments).items() if value is not None}


def has_failed(row: Mapping[str, Any]) -> bool:
    """The call gave no answer: an empty response, an error in its place, or a status that tells so."""
    answers = [row[key] for key in ("response", "choices", "completion", "output") if key in row]
    if answers and all(answer is None for answer in answers) and not any(map(row.get, TALKS)):
        return True
    bodies = [row, *(answer for answer in (*answers, row.get("result")) if isinstance(answer, dict))]
    bodies += [body["body"] for body in bodies if isinstance(body.get("body"), dict)]
    codes = [body.get("status_code") for body in bodies]
    if any(type(code) is int and not 200 <= code < 300 for code in codes):
        return True
    if any(body.get(key) in _NO_ANSWER for body in bodies[1:] for key in ("status", "type")):
        return True
    spoken = ("choices", "content", "output", "message")
    return any(body.get("error") and not any(map(body.get, spoken)) for body in bodies[1:])


def answered(row: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
    """The answer with `choices`; empty where the row has none but for the last of its messages."""
    body = row.get("response") or _mapping(row.get("result")).get("message")
    body = body.get("body", body) if isinstance(body, dict) else body
    if isinstance(row.get("message"), dict) or isinstance(row.get("output"), list):
        body = row  # Ollama's or that of Responses beside its request
    if row.get("choices"):
        return dict(row)
    if isinstance(body, dict):
        return dict(body) if body.get("choices") else _of_body(row, body)
    texts = [text for text in (body, row.get("completion"), row.get("output")) if isinstance(text, str)]
    return flat_answer(row, {"content": texts[0]}, "stop" if chat else "length") if texts else {}


def flat_answer(row: Mapping[str, Any], message: Mapping[str, Any], word: str) -> dict[str, Any]:
    """A message whose ids, log-probs and end stand in the row itself; `word` where it tells no end."""
    choice = {key: row[key] for key in ("logprobs", "stop_reason", "matched_stop") if key in row}
    beside = {key: row[key] for key in BESIDE_TEXT if isinstance(row.get(key), str | list)}  # no settings
    choice |= {"message": {**beside, **message}, "finish_reason": row.get("finish_reason") or word}
    choice["token_ids"] = row.get("response_token_ids") or row.get("token_ids")
    return {"choices": [choice], "usage": row.get("usage")}


def _of_body(row: Mapping[str, Any], body: Mapping[str, Any]) -> dict[str, Any]:
    """An answer that is a message, or holds one: Ollama's, Anthropic's, that of Responses."""
    usage, word = _mapping(body.get("usage")), body.get("done_reason")
    if body.get("done") is False:
        return {"choices": [{"delta": {}}]}
    if isinstance(body.get("message"), dict) or isinstance(body.get("response"), str):
        message = _mapping(body.get("message"), {**body, "content": body.get("response")})
        return {"choices": [{"message": message, "finish_reason": word or "stop"}]}
    if isinstance(body.get("output"), list):
        parts = [part for item in map(_mapping, body["output"]) for part in _item(item)["content"]]
        short = str(_mapping(body.get("incomplete_details")).get("reason") or "stop")
        word = {"max_output_tokens": "length"}.get(short, short)
        usage = {"prompt_tokens": usage.get("input_tokens"), "completion_tokens": usage.get("output_tokens")}
        return {"choices": [{"message": {"content": parts}, "finish_reason": word}], "usage": usage}
    if not {"content", "role"} & body.keys():
        return {}
    if "finish_reason" not in body and isinstance(word := body.get("stop_reason"), str):
        # Anthropic's; its count of the prompt leaves out what was in the cache.
        choice = {"message": body, "finish_reason": word, "stop_reason": body.get("stop_sequence")}
        return {"choices": [choice], "usage": {"completion_tokens": usage.get("output_tokens")}}
    return flat_answer({**row, **body}, body, "stop")


def _item(item: Mapping[str, Any]) -> dict[str, Any]:
    """An item of Responses as a message; whatever is neither words nor thinking is a call or its result."""
    if item.get("type", "message") == "message":
        content = item.get("content")
        return _message("assistant", content if isinstance(content, list) else [content])
    return _message("assistant", [{"type": "reasoning" if item["type"] == "reasoning" else "function_call"}])


def _first_of(value: Any) -> Any:
    return next(iter(value.values() if isinstance(value, dict) else _list(value)), None)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _mapping(*values: Any) -> Mapping[str, Any]:
    """The first of them that is an object; else an empty one."""
    return next((value for value in values if isinstance(value, dict)), {})
