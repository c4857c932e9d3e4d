"""What callers of `LLM` may pass, checked: prompts, parameters, where and how to compute."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from . import _core, elsewhere, extras, known_models
from .arguments import bad, flag, integer, is_list, shown
from .chat import Rendered
from .config import MOST_GRAPHS, StepCosts, assets
from .errors import DflashError, InvalidArgument, MissingPackage
from .outputs import Prompt
from .sampling import SamplingParams


class Terms(NamedTuple):
    """What an engine takes: `encode` makes token ids of a text by its name in the call, `constraints` what constrains draws."""

    encode: Callable[[str, str], list[int]]
    vocab_size: int
    max_context: int
    has_bytes: bool
    constraints: Any


_IN_A_PROMPT = ("prompt", "prompt_token_ids")


@dataclass
class Asked:
    """A prompt of a call and its parameters, not yet checked, with their names for errors."""

    index: int
    prompt: Any
    params: Any
    # ``params[2].`` where each prompt has its own, else nothing.
    option: str

    # What messages call the prompt, where that is not its place in the call.
    called: str | None = None
    # What the caller calls the request.
    request_id: str | None = None
    # For each answer what constrains its draws, or None.
    constraints: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] | None = None

    @property
    def name(self) -> str:
        return self.called or f"prompts[{self.index}]"

    def check(self, terms: Terms) -> list[int]:
        """The prompt's tokens. Token ids in arrays and the like become a plain list."""
        if isinstance(self.prompt, Rendered):
            rendered, self.prompt = self.prompt, self.prompt.ids
            self.called = rendered.name
            if rendered.error is not None:
                raise InvalidArgument(rendered.error)
            tokens = rendered.ids
        else:
            tokens = self._tokens(terms.encode)
        self.params = self._params()
        if not tokens:
            raise InvalidArgument(f"{self.name}: got an empty prompt, expected at least one token")
        most = self.params.truncate_prompt_tokens
        if most is not None:
            tokens = tokens[-(most if most > 0 else terms.max_context - 1) :]
        known_tokens(self.name, tokens, terms.vocab_size)
        for option in ("logit_bias", "stop_token_ids", "allowed_token_ids"):
            known_tokens(self.option + option, list(getattr(self.params, option) or ()), terms.vocab_size)
        if self.params.stop and not terms.has_bytes:
            raise InvalidArgument(
                f"{self.option}stop: got strings, expected stop_token_ids: this tokenizer's tokens have no bytes of their own"
            )
        try:
            self.constraints = [terms.constraints.make(self.params) for _ in range(self.params.n)]
        except InvalidArgument as error:
            raise InvalidArgument(f"{self.option}{error}") from None
        return tokens

    def _tokens(self, encode: Callable[[str, str], list[int]]) -> list[int]:
        name = self.name
        if isinstance(self.prompt, Mapping):
            given = dict(self.prompt)
            elsewhere.known(name, given, _IN_A_PROMPT, elsewhere.CALLS)
            text, ids = given.get("prompt"), given.get("prompt_token_ids")
            if ids is not None:
                tokens = token_list(f"{name}.prompt_token_ids", ids, "a list of token ids")
                if text is not None and (not isinstance(text, str) or encode(f"{name}.prompt", text) != tokens):
                    raise InvalidArgument(
                        f"{name}.prompt_token_ids: got {shown(tokens)} beside the prompt {shown(text)}, whose tokens are others, expected one of them"
                    )
                self.prompt = tokens if text is None else text
                return tokens
            if not isinstance(text, str):
                raise bad(f"{name}.prompt", text, "a string, or prompt_token_ids")
            self.prompt, name = text, f"{name}.prompt"
        if isinstance(self.prompt, str):
            return encode(name, self.prompt)
        self.prompt = token_list(name, self.prompt, "a string or a list of token ids")
        return self.prompt

    def _params(self) -> SamplingParams:
        if isinstance(self.params, Mapping):
            try:
                return SamplingParams.of(self.option.rstrip(".") or "params", self.params)
            except InvalidArgument as error:
                said, whole = str(error), self.option.rstrip(".")
                raise InvalidArgument(said if whole and said.startswith(whole) else f"{self.option}{said}") from None
        if not isinstance(self.params, SamplingParams):
            raise bad(self.option.rstrip("."), self.params, "SamplingParams")
        return self.params

    def tell(self, error: DflashError) -> DflashError:
        """The core's error about this request, with the names that the caller knows."""
        name, _, rest = str(error).partition(": ")
        return type(error)(f"{self.name if name == 'prompt' else self.option + name}: {rest}")


def array_of(value: Any) -> Any:
    """A torch tensor of integers as an array, wherever it lies; anything else as it is."""
    torch = sys.modules.get("torch")
    if (
        torch is None
        or not isinstance(value, torch.Tensor)
        or value.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
    ):
        return value
    try:
        return value.detach().cpu().numpy()
    except (RuntimeError, TypeError):  # without values, as on "meta", or of a kind that has no plain ones
        return value


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    given = array_of(prompts)
    if not (is_list(given) or (isinstance(given, np.ndarray) and given.ndim > 0)):
        raise bad("prompts", given, "a string, token ids, or a list of these")
    if len(given) and isinstance(given[0], int | np.integer):
        return [given]
    return list(given)


def asked(prompts: Prompt | Sequence[Prompt], params: Any, request_ids: Any = None) -> list[Asked]:
    """The requests of a call; what is wrong with one of them is looked at later."""
    texts = as_list(prompts)
    if params is None or isinstance(params, SamplingParams | Mapping):
        shared = SamplingParams.of("params", {} if params is None else params)
        all_of_them = [Asked(i, text, shared, "") for i, text in enumerate(texts)]
    else:
        all_of_them = _each(texts, params)
    if request_ids is not None:
        for one, name in zip(all_of_them, _names(request_ids, len(texts))):
            one.request_id = name
    return all_of_them


def _each(texts: list[Prompt], params: Any) -> list[Asked]:
    """Prompts with parameters of their own."""
    if not is_list(params):
        raise bad("params", params, "SamplingParams, or a list of them")
    if len(params) != len(texts):
        raise InvalidArgument(f"params: got {len(params)}, expected one, or one for each of {len(texts)} prompts")
    return [Asked(i, text, one, f"params[{i}].") for i, (text, one) in enumerate(zip(texts, params))]


def _names(request_ids: Any, count: int) -> list[str]:
    """What the caller calls the requests of a call."""
    names = [request_ids] if isinstance(request_ids, str) else request_ids
    if not is_list(names) or not all(isinstance(name, str) and name for name in names):
        raise bad("request_ids", request_ids, "a non-empty string for each prompt")
    if len(names) != count:
        raise InvalidArgument(f"request_ids: got {len(names)}, expected one for each of {count} prompts")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidArgument(f"request_ids: got {shown(twice)} twice, expected each once")
    return list(names)


def token_list(name: str, prompt: Any, expected: str) -> list[int]:
    """Token ids as a list of ints."""
    prompt = array_of(prompt)
    if not (is_list(prompt) or (isinstance(prompt, np.ndarray) and prompt.ndim == 1)):
        raise bad(name, prompt, expected)
    wrong = [token for token in prompt if not isinstance(token, int | np.integer) or isinstance(token, bool)]
    if wrong:
        raise InvalidArgument(f"{name}: got an entry {shown(wrong[0])}, expected {expected}")
    return [int(token) for token in prompt]


def known_tokens(name: str, ids: Any, vocab_size: int) -> list[int]:
    """Token ids of a vocabulary, as a list of ints."""
    tokens = token_list(name, ids, "a list of token ids")
    wrong = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise InvalidArgument(f"{name}: got token id {shown(wrong)}, expected token ids in 0..{vocab_size - 1}")
    return tokens


def encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def pick_device(torch: Any, name: Any) -> Any:
    expected = "'auto', 'cpu', 'cuda' or 'cuda:N', or a torch.device of these"
    given, name = name, str(name) if isinstance(name, torch.device) else name
    if not isinstance(name, str):
        raise bad("device", given, expected)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise InvalidArgument(f"device: got {shown(name)}, but torch sees no CUDA GPU here; use 'cpu' or 'auto'")
        try:
            device = torch.device(name)
        except RuntimeError:
            device = None
        count = torch.cuda.device_count()
        if device is None or not 0 <= (device.index or 0) < count:
            raise bad("device", name, f"'cuda' or 'cuda:N', N in 0..{count - 1}")
        return device
    raise bad("device", given, expected)


def pick_dtype(torch: Any, name: Any, device: Any) -> Any:
    given, name = name, str(name).removeprefix("torch.") if isinstance(name, torch.dtype) else name
    if not isinstance(name, str):
        raise bad("dtype", given, "a name, for example 'float32', or torch's own")
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise bad("dtype", given, f"'auto' or one of {sorted(known)}")
    return known[name]


def pick_precision(name: str, device: Any, dtype: Any) -> str:
    if not isinstance(name, str) or name not in ("highest", "medium", "auto"):
        raise bad("matmul_precision", name, "'highest', 'medium' or 'auto'")
    applies = device.type == "cpu" and str(dtype) == "torch.float32"
    if name == "medium" and not applies:
        raise InvalidArgument(
            f"matmul_precision: got 'medium' with {dtype} on {device}, expected 'highest': it is for float32 on a CPU"
        )
    if name == "auto":
        return "medium" if applies and _core.multiplies_bf16() else "highest"
    return name


def pick_models(model: Any, draft: Any) -> tuple[str | Path, str | Path | None]:
    """Where the two models are: folders or hub names."""
    expected = (
        "a model's folder, GGUF file or hub name, the name of a known or bundled model, or None for the bundled one"
    )
    if model is None:
        model = assets() / "target"
        draft = assets() / "draft" if isinstance(draft, str) and draft == "auto" else draft
    elif not isinstance(model, str | Path):
        raise bad("model", model, expected)
    elif not str(model) or "\0" in str(model):
        raise bad("model", model, expected)
    elif isinstance(draft, str) and draft == "auto" and (known := known_models.find(model)) is not None:
        # Where there is no drafter for it, the model is missing rather than its drafter: loading says so, or decodes plainly.
        draft = known.drafter
    elif isinstance(draft, str) and draft == "auto":
        from .models.checkpoint.folder import is_hub_name

        # Whatever else is wrong, this is what has to be seen first.
        if not Path(model).exists() and not is_hub_name(model):
            raise InvalidArgument(f"model: got {model}, and there is no such folder or file")
        raise InvalidArgument(
            "draft: got 'auto' with a model of your own, expected a drafter's folder or hub name, 'lookup', or None to decode plainly"
        )
    if draft is not None and (not isinstance(draft, str | Path) or not str(draft) or "\0" in str(draft)):
        raise bad("draft", draft, "a drafter's folder or hub name, 'lookup', or None to decode plainly")
    if isinstance(draft, str) and known_models.find(draft) is not None:
        raise InvalidArgument(
            f"draft: got {draft!r}, the name of a target, expected 'auto' with that model for the drafter that comes with it, or a drafter's folder"
        )
    return model, draft


class StepOptions(NamedTuple):
    """How an `LLM` takes its steps: see there."""

    block_size: int | None
    adaptive: bool
    costs: StepCosts | None
    tree_nodes: int
    cuda_graphs: bool
    overlap: bool | None
    lookup: bool | None = None
    capture_ahead: int = 0

    def check(self) -> StepOptions:
        """Raises InvalidArgument for what can be refused before models are loaded; the sizes depend on them."""
        flag("adaptive", self.adaptive)
        flag("cuda_graphs", self.cuda_graphs)
        integer("capture_ahead", self.capture_ahead, 0, MOST_GRAPHS)
        if self.capture_ahead and not self.cuda_graphs:
            raise bad("capture_ahead", self.capture_ahead, "0 with cuda_graphs=False")
        if self.overlap is not None:
            flag("overlap", self.overlap)
        if self.lookup is not None:
            flag("lookup", self.lookup)
        if self.costs is not None and not isinstance(self.costs, StepCosts):
            raise bad("costs", self.costs, "a StepCosts")
        return self


def import_torch() -> ModuleType:
    """torch, where what runs models is installed."""
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingPackage(f"LLM needs torch and transformers ({error}): {extras.install('torch')}") from error
    return torch
