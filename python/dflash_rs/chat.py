"""Conversations into prompts: what callers write, checked message by message, and the tokenizer's chat template, which does the rest.

A template is a Jinja text out of the checkpoint or from the caller. transformers renders it in a sandbox; it can read the messages and
nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import bad, flag, is_list, one_name, shown
from .errors import InvalidArgument
from .sampling import SamplingParams

if TYPE_CHECKING:
    from .outputs import Output
    from .streams import Stream

Message = Mapping[str, Any]
Conversation = Sequence[Message]
# Stands for an answer's text where a template is asked what follows it; no template has a use for it.
_MARK = "@@answer@@"
_MESSAGE = "a message {'role': ..., 'content': ...}"
# What `LLM.chat` says to templates by arguments of its own.
_OWN = ("add_generation_prompt", "chat_template", "continue_final_message", "messages", "tokenize", "tools")


@dataclass
class Rendered:
    """A conversation of a call: `name` is what messages call it; its token ids, or why it has none."""

    name: str
    ids: list[int]
    error: str | None = None


@dataclass(frozen=True)
class Template:
    """How conversations become texts: `text` is the caller's template, None the tokenizer's own. The rest is what templates are given.

    Raises InvalidArgument for options of the wrong kind, and where neither the caller nor the tokenizer has a template.
    """

    tokenizer: Any
    model: str
    text: str | None
    generation_prompt: bool
    continue_final: bool
    tools: Sequence[Any] | None
    options: Mapping[str, Any]

    @classmethod
    def choose(
        cls,
        tokenizer: Any,
        model: str,
        *,
        add_generation_prompt: Any,
        continue_final_message: Any,
        tools: Any,
        chat_template: Any,
        chat_template_kwargs: Any,
    ) -> Template:
        """Of what a call of `LLM.chat` was given; `model` is for the message that there is no template."""
        generates = flag("add_generation_prompt", add_generation_prompt)
        if flag("continue_final_message", continue_final_message) and generates:
            raise InvalidArgument(
                "continue_final_message: got True with add_generation_prompt=True, expected one of them: an answer that goes on has begun"
            )
        if tools is not None and not (
            is_list(tools) and all(isinstance(tool, Mapping) or callable(tool) for tool in tools)
        ):
            raise bad("tools", tools, "a list of tools: JSON schemas of functions, or functions with annotations")
        options = {} if chat_template_kwargs is None else chat_template_kwargs
        if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
            raise bad("chat_template_kwargs", options, "a mapping from names to what the template is given")
        own = next((name for name in options if name in _OWN), None)
        if own is not None:
            raise InvalidArgument(
                f"chat_template_kwargs: got {own!r}, expected names beside those of chat's own arguments"
            )
        named = getattr(tokenizer, "chat_template", None)
        named = isinstance(named, dict) and isinstance(chat_template, str) and chat_template in named
        text = chat_template if named else _template(chat_template)
        if text is None and not getattr(tokenizer, "chat_template", None):
            raise InvalidArgument(
                f"chat_template: got none, and the tokenizer of {model} has none either, expected a template (a Jinja text, or its "
                "file): pass chat_template=, use a model that was trained to chat, or generate() with a text of your own"
            )
        return cls(tokenizer, model, text, generates, continue_final_message, tools, dict(options))

    def render(self, messages: Sequence[Message], **change: Any) -> str:
        """The text of checked messages."""
        given: dict[str, Any] = {
            "tools": None if self.tools is None else list(self.tools),
            "chat_template": self.text,
            "add_generation_prompt": self.generation_prompt,
            "continue_final_message": self.continue_final,
        }
        return self.tokenizer.apply_chat_template(list(messages), tokenize=False, **(given | change), **self.options)

    def encode(self, name: str, conversation: Any) -> list[int]:
        """Token ids of a conversation. Raises InvalidArgument naming the message, or what the template says of it."""
        messages = check(name, conversation)
        if self.continue_final and not messages[-1]["content"]:
            raise bad(f"{name}[{len(messages) - 1}].content", messages[-1]["content"], "the beginning of an answer")
        try:
            text = self.render(messages)
        except Exception as error:  # templates raise what they like
            said = str(error).strip().partition("\n")[0]
            if type(error).__name__ == "TemplateSyntaxError":
                where = f" (line {line})" if (line := getattr(error, "lineno", None)) else ""
                raise InvalidArgument(f"chat_template: got a template that Jinja cannot read: {said}{where}") from error
            raise InvalidArgument(f"{name}: got messages that the chat template refuses: {said}") from error
        # The template writes what begins a text itself.
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def turn_end(self) -> int | None:
        """The special token that ends an answer, by what the template writes behind one; None where it writes something else."""
        try:
            text = self.render(
                [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}],
                add_generation_prompt=False,
                continue_final_message=False,
            )
        except Exception:  # a template that wants other messages than these
            return None
        tail = text.rpartition(_MARK)[2]
        ids = list(self.tokenizer(tail, add_special_tokens=False).input_ids)[:1]
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return next((i for i in ids if i in special or i in self.tokenizer.all_special_ids), None)


def _template(given: Any) -> str | None:
    """A template's text: as it is, or out of the file that is named."""
    if given is None:
        return None
    named = isinstance(given, str) and given != "" and not set("{\n\0") & set(given)
    if isinstance(given, Path) or named:
        try:
            return Path(given).read_text(encoding="utf-8")
        except OSError as error:
            raise InvalidArgument(
                f"chat_template: got {shown(str(given))}, expected a Jinja text or a file with one ({error.strerror})"
            ) from None
        except UnicodeDecodeError:
            raise InvalidArgument(
                f"chat_template: got {shown(str(given))}, which is not UTF-8, expected a Jinja text"
            ) from None
    if not isinstance(given, str) or not given:
        raise bad("chat_template", given, "a Jinja text, or a file with one")
    return given


def split(messages: Any) -> list[tuple[str, Any]]:
    """The conversations of a call, with their names for errors: one list of messages, or a list of such lists."""
    if not is_list(messages) or not messages:
        raise bad("messages", messages, "a list of messages, or a list of such lists")
    if is_list(messages[0]):
        return [(f"messages[{i}]", one) for i, one in enumerate(messages)]
    return [("messages", messages)]


def check(name: str, conversation: Any) -> list[dict[str, Any]]:
    """A conversation's messages as templates take them: content that comes in parts becomes one text."""
    if not is_list(conversation) or not conversation:
        raise bad(name, conversation, "a list of at least one message")
    return [_message(f"{name}[{i}]", message) for i, message in enumerate(conversation)]


def _message(name: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise bad(name, message, _MESSAGE)
    for key in ("role", "content"):
        # An answer that calls a tool may say nothing beside it.
        if key not in message and not (key == "content" and message.get("tool_calls")):
            raise InvalidArgument(f"{name}: got {shown(dict(message))} without a {key}, expected {_MESSAGE}")
    role, content = message["role"], message.get("content")
    if not isinstance(role, str) or not role:
        raise bad(f"{name}.role", role, "a name such as 'system', 'user' or 'assistant'")
    if content is None and message.get("tool_calls"):
        content = ""
    elif isinstance(content, Sequence) and is_list(content):
        content = "\n".join(_part(f"{name}.content[{i}]", part) for i, part in enumerate(content))
    if not isinstance(content, str):
        raise bad(f"{name}.content", content, "a string, or a list of {'type': 'text', 'text': ...}")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise bad(f"{name}.content", content, "a string without lone surrogates") from None
    return {**message, "content": content}


def _part(name: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if isinstance(part, Mapping) and isinstance(part.get("type"), str) and part["type"] != "text":
        raise InvalidArgument(f"{name}.type: got {shown(part['type'])}, expected 'text': this engine reads text alone")
    raise bad(name, part, "a string or {'type': 'text', 'text': ...}")


class Chats:
    """What an `LLM` has for conversations. Texts that go on come from `LLM.generate` and `LLM.stream`, which take the other arguments."""

    tokenizer: Any
    model_dir: str
    eos_token_ids: list[int]
    generate: Any
    stream: Any

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: Any = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template: str | Path | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> list[Output]:
        """Answers a conversation, or several at once; returns one `Output` each, in order.

        A conversation is a list of messages, ``{"role": "user", "content": "..."}``; content may also be a list of
        ``{"type": "text", "text": ...}``. What else a message has (``tool_calls``, ``name``) is the template's to read.

        - `params` and `more` are those of `generate`: one for all or one each.
        - `add_generation_prompt`: the text ends where an answer begins. `continue_final_message`: it ends within the last message, which goes
          on; with ``add_generation_prompt=False``.
        - `tools`: JSON schemas of functions, or functions with annotations, shown by templates that know tools.
        - `chat_template`: a Jinja text, its file, or the name of one of the tokenizer's; None is the tokenizer's own.
          `chat_template_kwargs`: what else it is given, for example ``{"enable_thinking": False}``.

        An answer ends with its turn: at an end-of-text token, or at the special token that the template writes behind an answer (unless
        ``ignore_eos``). Output.prompt holds the token ids that the template made.

        Raises InvalidArgument for a message (``messages[1].content: ...``), for a template that refuses the messages, and for a target
        without a template; otherwise as `generate`.
        """
        template = self._template(
            add_generation_prompt, continue_final_message, tools, chat_template, chat_template_kwargs
        )
        params = one_name("params", params, more.pop("sampling_params", None))
        return self.generate(*self._turns_of(template, messages, params, more), **more)

    def stream_chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: Any = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template: str | Path | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Stream:
        """Like `chat`, but an iterator of tokens as they are committed, which ends as that of `stream` does."""
        template = self._template(
            add_generation_prompt, continue_final_message, tools, chat_template, chat_template_kwargs
        )
        params = one_name("params", params, more.pop("sampling_params", None))
        return self.stream(*self._turns_of(template, messages, params, more), **more)

    def encode_chat(
        self,
        messages: Conversation,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template: str | Path | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, as `chat` would make them."""
        template = self._template(
            add_generation_prompt, continue_final_message, tools, chat_template, chat_template_kwargs
        )
        return template.encode("messages", messages)

    def _template(self, generates: Any, continues: Any, tools: Any, template: Any, options: Any) -> Template:
        return Template.choose(
            self.tokenizer,
            self.model_dir,
            add_generation_prompt=generates,
            continue_final_message=continues,
            tools=tools,
            chat_template=template,
            chat_template_kwargs=options,
        )

    def _turns_of(self, template: Template, messages: Any, params: Any, more: Mapping[str, Any]) -> tuple[Any, Any]:
        """Prompts and parameters for `generate`."""
        rendered = []
        for name, conversation in split(messages):
            try:
                rendered.append(Rendered(name, template.encode(name, conversation)))
            except InvalidArgument as error:
                if more.get("on_error", "raise") == "raise":
                    raise
                rendered.append(Rendered(name, [], str(error)))
        end = template.turn_end()
        ends = () if end is None or end in self.eos_token_ids else (end,)
        return rendered, _ending(params, ends)


def _ending(params: Any, ends: tuple[int, ...]) -> Any:
    """Parameters with tokens that end a turn; what is none is for `generate` to refuse."""
    if params is None:
        params = SamplingParams()
    if not ends:
        return params
    if isinstance(params, Mapping):
        params = SamplingParams.of("params", params)
    if is_list(params):
        return [_ending(one, ends) for one in params]
    if not isinstance(params, SamplingParams) or params.ignore_eos or set(ends) <= set(params.stop_token_ids):
        return params
    return replace(params, stop_token_ids=(*params.stop_token_ids, *ends))
