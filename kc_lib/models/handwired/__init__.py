"""Hand-wired transformers: real GPT-2s whose circuit is known because their weights were set, not trained."""

from kc_lib.models.handwired.circuits import HAND_WIRED, HandWired, edge_set, hand_wired

__all__ = ["HAND_WIRED", "HandWired", "edge_set", "hand_wired"]
