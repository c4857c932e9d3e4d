"""What a checkpoint holds, found out before anything of it is built, and loading it through transformers.

    folder or hub name --> folder --> JSON files read --> numbers ranged --> config --> tensors' names, types and shapes --> weights

Promises, for targets, drafters and tokenizers alike:
- *nothing of a checkpoint is run*: neither its Python files nor pickles with code in them, and nobody is asked whether they may be;
- *nothing is built that the files cannot fill*: the safetensors headers say how many layers there are and how large they are, so that
  a number in `config.json` costs neither memory nor time;
- *no file outside the folder is read*, whatever an index says (the hub's own links from a snapshot to its blobs aside);
- *one kind of error*: whatever a loader raises becomes a CheckpointError that names the checkpoint and, where it can be told, file and
  field.

Each step of the picture is a room: `folder` (where it is), `reading` (JSON, and the one kind of error), `ranges` (which numbers can be
meant), `config`, `tensors` (what is stored), `causal_lm` (a target: all of it compared, then loaded), `tokenizer`. Drafters take the same
steps in `models.loader`.
"""

from .causal_lm import Described, describe_causal_lm, load_causal_lm
from .folder import is_hub_name, target_folder
from .ranges import MOST_HEADS, MOST_LAYERS, MOST_POSITIONS, MOST_VOCAB, MOST_WIDTH, check_eos, check_rope, finite
from .reading import read_object, readable, short, some
from .tensors import Stored, stored_tensors, tensor_files, weight_map_of
from .tokenizer import load_tokenizer

__all__ = [
    "MOST_HEADS",
    "MOST_LAYERS",
    "MOST_POSITIONS",
    "MOST_VOCAB",
    "MOST_WIDTH",
    "Described",
    "Stored",
    "check_eos",
    "check_rope",
    "describe_causal_lm",
    "finite",
    "is_hub_name",
    "load_causal_lm",
    "load_tokenizer",
    "read_object",
    "readable",
    "short",
    "some",
    "stored_tensors",
    "target_folder",
    "tensor_files",
    "weight_map_of",
]
