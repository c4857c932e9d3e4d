"""SGLang on this machine's CPU, without and with DFLASH_RS, on the bundled pair: the same text, in fewer passes.

    make sglang-demo

With --serve the DFLASH_RS server stays up, with SGLang's own HTTP interface, until Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import cases
from servers import Server, speculative


def run(server: Server, params: dict, count: int) -> tuple[list[dict], float]:
    """Answers, one request at a time, and seconds."""
    server.generate("x", params | {"max_new_tokens": 4})
    start = time.perf_counter()
    answers = [server.generate(prompt, params) for prompt in cases.prompts(count)]
    return answers, time.perf_counter() - start


def main() -> int:
    """0 if every text is the same and the drafts were worth it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--serve", action="store_true", help="leave the DFLASH_RS server running until Ctrl-C")
    args = parser.parse_args()
    params = {"temperature": 0, "max_new_tokens": args.max_tokens, "ignore_eos": True}
    logs = Path(tempfile.mkdtemp(prefix="sglang-demo-"))
    print(f"Two servers start, logs in {logs}", file=sys.stderr)
    plain = Server(logs / "plain.log", grammar_backend="none")
    ours = Server(logs / "dflash_rs.log", **speculative(page_size=16))
    try:
        with plain:
            expected, plain_seconds = run(plain, params, args.prompts)
        ours.wait()
        answers, seconds = run(ours, params, args.prompts)
        print(cases.prompts(1)[0] + answers[0]["text"])
        same = [a["output_ids"] for a in answers] == [e["output_ids"] for e in expected]
        passes = sum(a["meta_info"]["spec_verify_ct"] for a in answers)
        tokens = sum(a["meta_info"]["completion_tokens"] for a in answers)
        lengths = [a["meta_info"]["spec_accept_length"] for a in answers]
        mean = sum(lengths) / len(lengths)
        print(
            f"\n{tokens} tokens in {passes} passes of the target; spec_accept_length {mean:.2f} "
            f"({', '.join(f'{n:.2f}' for n in lengths)})\n"
            f"{tokens / seconds:.0f} tokens/s with DFLASH_RS, {tokens / plain_seconds:.0f} without; "
            f"texts {'equal' if same else 'DIFFER'}",
            file=sys.stderr,
        )
        if args.serve:
            print(f"http://127.0.0.1:{ours.port} serves until Ctrl-C", file=sys.stderr)
            try:
                code = ours.process.wait()
            except KeyboardInterrupt:
                pass
            else:
                print(f"the server ended with code {code}, log: {ours.log}", file=sys.stderr)
                return 1
        return 0 if same and mean > 2 else 1
    finally:
        plain.close()
        ours.close()


if __name__ == "__main__":
    sys.exit(main())
