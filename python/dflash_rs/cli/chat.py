"""`dflash-rs chat`: a conversation in the terminal, or one answer, with accepted drafts coloured."""

from __future__ import annotations

import argparse
import sys
from typing import Any, TextIO

from dflash_rs.cli import console, engine
from dflash_rs.cli.arguments import EXIT_CODES, FORMATTER, add_debug, add_engine
from dflash_rs.cli.display import Painter, split_delta, summary
from dflash_rs.cli.generate import add_sampling, sampling_from
from dflash_rs.errors import InvalidArgument, OutOfPages

# Options that are about many texts, or about numbers beside them.
_WITHOUT = ("logprobs", "prompt_logprobs", "n")
_COMMANDS = "/quit ends, /reset begins a new conversation"


def add(commands: Any) -> None:
    """Adds the command."""
    chat = commands.add_parser(
        "chat",
        help="talk to a model that was trained to chat",
        description="Talk to a model that was trained to chat: it has a chat template. Type a line, read the answer; "
        + _COMMANDS
        + ".",
        formatter_class=FORMATTER,
        epilog="""examples:
  dflash-rs chat --model Qwen/Qwen3-4B --draft path/to/Qwen3-4B-DFlash-b16
  dflash-rs chat --model path/to/model --no-draft --message 'What is the capital of France?'
  dflash-rs chat --model path/to/model --no-draft --system 'Answer in one word.' --message 'Is 91 prime?' --message 'Why?'
  printf 'Hello\\nWho are you?\\n' | dflash-rs chat --model path/to/model --no-draft

"""
        + EXIT_CODES,
    )
    chat.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    chat.add_argument(
        "--message",
        action="append",
        metavar="TEXT",
        help="say this, show the answer and end; may be given repeatedly; default: read lines from standard input",
    )
    chat.add_argument("--chat-template", metavar="FILE", help="a Jinja template instead of the tokenizer's own")
    add_engine(chat)
    chat.add_argument("--no-draft", action="store_true", help="decode without speculation: the same text, slower")
    add_sampling(chat, without=_WITHOUT)
    chat.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="auto: on a terminal unless NO_COLOR is set",
    )
    chat.add_argument("--quiet", action="store_true", help="no summaries and no hints on standard error")
    add_debug(chat)
    chat.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """`dflash-rs chat`."""
    system = None if args.system is None else console.as_text("--system", args.system)
    said = None if args.message is None else [console.as_text("--message", text) for text in args.message]
    if said is not None and not all(said):
        raise InvalidArgument("--message: got an empty text, expected at least one character")
    params = sampling_from(args)
    llm = engine.make_engine(args)
    try:
        talk = Talk(llm, params, system, args.chat_template, Painter.choose(args.color, sys.stdout), args.quiet)
        # A model that cannot chat says so before anything is typed.
        talk.check()
        return _one_shot(talk, said) if said is not None else _lines(talk, sys.stdin, args.quiet)
    finally:
        llm.close()


class Talk:
    """A conversation, and how its answers are shown."""

    def __init__(self, llm: Any, params: Any, system: str | None, template: str | None, paint: Painter, quiet: bool):
        self._llm, self._params, self._paint, self._quiet = llm, params, paint, quiet
        self._options = {} if template is None else {"chat_template": template}
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Begins anew."""
        self.messages = list(self._system)

    def check(self) -> None:
        """Raises InvalidArgument where there is no template, or it takes no such conversation."""
        self._llm.encode_chat([*self._system, {"role": "user", "content": "?"}], **self._options)

    def answer(self, text: str) -> str | None:
        """Says `text` and shows the answer, which becomes part of the conversation; returns what went wrong with it, else None.

        Raises what `LLM.chat` raises; the conversation is then what it was before.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        output, shown = None, ""
        with self._llm.stream_chat(asked, self._params, **self._options) as events:
            for event in events:
                drafted, own = split_delta(event, self._llm.decode)
                shown += event.text
                console.emit(self._paint("draft", drafted) + self._paint("own", own))
                output = event.output or output
        console.emit("" if shown.endswith("\n") else "\n")
        if output is None or output.finish_reason == "error":
            return (output and output.error) or "the engine gave no reason"
        self.messages = [*asked, {"role": "assistant", "content": output.text}]
        if not self._quiet:
            cached = output.metrics.get("cached_prompt_tokens", 0)
            known = f"; {cached} of {output.metrics['prompt_tokens']} prompt tokens were known" if cached else ""
            console.say(summary(output, self._params) + known)
        return None


def _one_shot(talk: Talk, said: list[str]) -> int:
    for text in said:
        wrong = talk.answer(text)
        if wrong is not None:
            return console.complain(wrong, console.FAILED)
    return console.OK


def _lines(talk: Talk, stdin: TextIO, quiet: bool) -> int:
    """A turn for every line, until /quit or the end of standard input. What is no command is told, and its code is a
    script's in the end. A message that cannot be answered is told to somebody at a terminal, who goes on; a script ends there."""
    person = stdin.isatty()
    console.decoding(stdin)
    if person and not quiet:
        console.say(f"Type a message; {_COMMANDS}.")
    script = console.OK
    while True:
        if person:
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = console.read_line(stdin)
        if not line:
            if person:
                console.say("")
            return script
        text = line.strip()
        if text == "/quit":
            return script
        if text == "/reset":
            talk.reset()
        elif line.startswith("/") and " " not in text:
            none = f"{text} is no command: {_COMMANDS}; a message may begin with a space and a slash"
            if person:
                console.say(none)
            else:
                script = console.complain(none, console.BAD_INPUT)
        elif text:
            try:
                wrong = talk.answer(text)
                code = console.FAILED
            except (InvalidArgument, OutOfPages) as error:
                wrong, code = str(error), console.BAD_INPUT
            except KeyboardInterrupt:
                if not person:
                    raise
                # The answer is left, the conversation goes on without it.
                console.emit("\n")
                console.say("interrupted; the question is forgotten")
                continue
            if wrong is not None:
                console.complain(wrong, code)
                if not person:
                    return code
