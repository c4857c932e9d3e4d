"""DFlash (arXiv 2602.06036): `model.DFlashDraft` is a checkpoint's module, `runtime.Runtime` drafts with it, `training` trains it."""

from .config import DraftConfig
from .model import DFlashDraft

__all__ = ["DFlashDraft", "DraftConfig"]
