"""Layers that fold a text into a state: `mixer.Mixer` is one of them, `state.MixerState` keeps what they remember of every request."""

from .kinds import attending, find_mixers, known_layers
from .state import MixerState

__all__ = ["MixerState", "attending", "find_mixers", "known_layers"]
