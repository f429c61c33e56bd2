"""Conversations in every spelling, checked and brought to one: messages of {role, content}, and tools.

An assistant's message may also have `tool_calls` ({id?, type, function: {name, arguments}}, arguments as an object)
and `train: false`; a tool's may have `name` and `tool_call_id`.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, cast

from loratune.data.values import as_dict, as_list, as_string, as_text
from loratune.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "assistant": ("tool_calls", "train", "weight"),
    "tool": ("name", "tool_call_id"),
}
# ShareGPT's names of roles, as FastChat, LLaMA-Factory and Axolotl read them.
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}

Value = tuple[str, dict[str, Any]]  # the canonical kind, and its value
Message = dict[str, Any]


def messages(row: dict[str, Any]) -> Value:
    """messages (OpenAI's spelling) and tools."""
    return conversation(as_list(row["messages"], "messages", _EXPECTED), row.get("tools"))


def sharegpt(row: dict[str, Any]) -> Value:
    """conversations of {from, value}, beside them a system prompt and tools."""
    turns = as_list(row["conversations"], "conversations", "a list of {from, value} objects")
    return conversation(
        [*_system(row), *(_sharegpt_turn(turn, n) for n, turn in enumerate(turns, 1))], row.get("tools")
    )


def alpaca(row: dict[str, Any]) -> Value:
    """The user says the instruction, a blank line and the input; the assistant the output. `history` goes before."""
    said = [as_string(row["instruction"], "instruction"), _optional(row, "input")]
    prompt = "\n\n".join(part for part in said if part.strip())
    if not prompt:
        raise DataError("instruction and input are both empty; remove the row or fill one in.")
    answer = {"role": "assistant", "content": as_text(row["output"], "output")}
    return conversation([*_system(row), *_history(row), {"role": "user", "content": prompt}, answer], None)


def prompt_completion(row: dict[str, Any]) -> Value:
    """Two strings; or two lists of messages, of which only the completion's are trained on."""
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list):
        as_string(prompt, "prompt")
        return "prompt_completion", {"prompt": prompt, "completion": as_text(completion, "completion")}
    given = [_message(message, f"message {number} of the prompt") for number, message in enumerate(prompt, 1)]
    answer = as_list(completion, "completion", "a list of messages, as the prompt is one")
    untrained = [message | {"train": False} if message["role"] == "assistant" else message for message in given]
    return conversation([*untrained, *answer], None)


def conversation(turns: list[Any], tools: Any) -> Value:
    """Checks messages and tools and returns them as the `messages` kind; DataError for what cannot be trained on."""
    if not turns:
        raise DataError(f"messages is an empty list; expected {_EXPECTED}.")
    checked = [_message(turn, f"message {number}") for number, turn in enumerate(turns, 1)]
    roles = [message["role"] for message in checked]
    if "assistant" not in roles:
        raise DataError(f"no message is from the assistant (roles: {', '.join(roles)}), so nothing could be trained.")
    first = next(role for role in roles if role not in ("system", "developer"))
    if first != "user":
        raise DataError(f"the first message after the system's is from {first}; expected user.")
    if not any(message["role"] == "assistant" and message.get("train", True) for message in checked):
        raise DataError("every assistant's message has train: false, so nothing could be trained.")
    value: dict[str, Any] = {"messages": checked}
    if tools := _tools(tools):
        value["tools"] = tools
    return "messages", value


def _tools(value: Any) -> list[Any]:
    listed = as_list([] if value is None or value == "" else value, "tools", "a list of objects")
    return [as_dict(tool, f"tool {number}", "an object (a JSON schema)") for number, tool in enumerate(listed, 1)]


def _message(value: Any, name: str) -> Message:
    message = as_dict(value, name, "an object with role and content")
    role, content = message.get("role"), message.get("content")
    if len(message) != 2 or "role" not in message or "content" not in message:
        message = _without_nulls(message, name)
    if role not in ROLES:
        near = get_close_matches(str(role), ROLES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{name} has the role {role!r}; expected one of {', '.join(ROLES)}.{hint}")
    name = f"{name} ({role})"
    plain: Message = {"role": role, "content": _content(content, name, may_be_empty="tool_calls" in message)}
    if len(message) == 2:
        if role == "assistant":
            as_text(plain["content"], name)
        return plain
    return plain | _extras(message, name)


def _without_nulls(message: Message, name: str) -> Message:
    """Optional keys that are null were not there; keys that nothing reads are refused."""
    allowed = ("role", "content", *_OPTIONAL.get(str(message.get("role")), ()))
    kept = {key: value for key, value in message.items() if value is not None or key in ("role", "content")}
    if kept.keys() - set(allowed) or "role" not in kept or not kept.keys() & {"content", "tool_calls"}:
        found = ", ".join(map(repr, message)) or "none"
        more = f" (and {', '.join(allowed[2:])})" if allowed[2:] else ""
        raise DataError(f"{name} has the keys {found}; expected role and content{more}.")
    return {"content": None} | kept


def _content(value: Any, name: str, may_be_empty: bool) -> str:
    if value is None and may_be_empty:
        return ""
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        return "".join(_text_part(cast(Message, part), name) for part in value)
    return as_string(value, name)


def _text_part(part: Message, name: str) -> str:
    if part["type"] != "text":
        raise DataError(f"{name} has a part of the type {part['type']!r}; only text can be trained on.")
    return as_string(part.get("text"), f"{name}: text")


def _extras(message: Message, name: str) -> Message:
    extras: Message = {key: as_string(message[key], f"{name}: {key}") for key in _OPTIONAL["tool"] if key in message}
    if calls := message.get("tool_calls"):
        listed = as_list(calls, f"{name}: tool_calls", "a list of calls")
        extras["tool_calls"] = [_call(call, f"{name}: call {number}") for number, call in enumerate(listed, 1)]
    elif message["role"] == "assistant":
        as_text(_content(message["content"], name, may_be_empty=False), name)
    if not _trained(message, name):
        extras["train"] = False
    return extras


def _trained(message: Message, name: str) -> bool:
    if "train" in message and "weight" in message:
        raise DataError(f"{name} has both train and weight; keep one.")
    train = message.get("train", True)
    if not isinstance(train, bool):
        raise DataError(f"{name} has train: {train!r}; expected true or false.")
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"{name} has the weight {weight!r}; expected 0 (not trained on) or 1.")
    return train and bool(weight)


def _call(value: Any, name: str) -> Message:
    call = as_dict(value, name, "an object")
    function = as_dict(call.get("function", call), name, "an object with name and arguments")
    arguments = {} if function.get("arguments") in (None, "") else function["arguments"]
    if not isinstance(function.get("name"), str):
        raise DataError(f"{name} has no name of a function; expected {{name, arguments}}.")
    spelled = {"name": function["name"], "arguments": as_dict(arguments, f"{name}: arguments", "an object")}
    identity = {"id": as_string(call["id"], f"{name}: id")} if call.get("id") is not None else {}
    return identity | {"type": "function", "function": spelled}


def _system(row: dict[str, Any]) -> list[Message]:
    system = _optional(row, "system")
    return [{"role": "system", "content": system}] if system.strip() else []


def _optional(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    return "" if value is None else as_string(value, key)


def _history(row: dict[str, Any]) -> Iterator[Message]:
    """LLaMA-Factory's: a list of [what the user said, what the assistant answered]."""
    history = [] if row.get("history") in (None, "") else row["history"]
    for number, pair in enumerate(as_list(history, "history", "a list of pairs"), 1):
        said = as_list(pair, f"pair {number} of the history", "two strings")
        if len(said) != 2:
            raise DataError(f"pair {number} of the history has {len(said)} parts; expected two strings.")
        yield {"role": "user", "content": said[0]}
        yield {"role": "assistant", "content": said[1]}


def _sharegpt_turn(value: Any, number: int) -> Any:
    turn = as_dict(value, f"message {number}", "an object with from and value")
    if "from" not in turn or "value" not in turn:
        return turn  # {role, content} under ShareGPT's column; refused later if it is neither
    speaker = turn["from"]
    role = _SHAREGPT_ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
    rest = {key: item for key, item in turn.items() if key not in ("from", "value")}
    if role == "function_call":
        called = turn["value"]
        return rest | {"role": "assistant", "content": None, "tool_calls": _called(called, f"message {number}")}
    return rest | {"role": role, "content": turn["value"]}


def _called(value: Any, name: str) -> list[Any]:
    """A call is spelled as JSON in a string: one {name, arguments}, or a list of them."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        return as_list(value, name, "a list of calls")
    return [as_dict(value, name, "a call, {name, arguments}, as JSON")]


_EXPECTED = "a list of {role, content} objects"
