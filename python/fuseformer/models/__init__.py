"""The reference Transformer, built of packed blocks on the fused ops."""

from .causal_lm import CausalLM
from .checkpoint import load_model, save_model
from .config import ModelConfig
from .encoder_decoder import EncoderDecoder
from .generation import generate
from .heads import SequenceClassifier, SpanAnswerer, Spans, best_spans
from .masked_lm import MaskedLM
from .scoring import sequence_nll
from .sequences import Sequences, pack_ids

__all__ = [
    "CausalLM",
    "EncoderDecoder",
    "MaskedLM",
    "ModelConfig",
    "SequenceClassifier",
    "Sequences",
    "SpanAnswerer",
    "Spans",
    "best_spans",
    "generate",
    "load_model",
    "pack_ids",
    "save_model",
    "sequence_nll",
]
