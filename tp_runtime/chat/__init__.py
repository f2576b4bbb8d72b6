"""Chats: dialogues with a model, which keep their keys and values between turns, and can be edited, saved and loaded.

This room knows nothing of the command line, of ONNX Runtime, or of what a KV cache holds: a model is handed to it.
"""

from .overflow import Overflow
from .saved import SAVED, Saved, SavedChat
from .session import ChatSession
from .state import ChatModel
from .stream import ChatResult, ChatStream

__all__ = ["SAVED", "ChatModel", "ChatResult", "ChatSession", "ChatStream", "Overflow", "Saved", "SavedChat"]
