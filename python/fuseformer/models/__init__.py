"""The reference Transformer, built of packed blocks on the fused ops."""

from .causal_lm import CausalLM
from .config import ModelConfig
from .encoder_decoder import EncoderDecoder
from .generation import generate
from .masked_lm import MaskedLM
from .scoring import sequence_nll
from .sequences import Sequences, pack_ids

__all__ = [
    "CausalLM",
    "EncoderDecoder",
    "MaskedLM",
    "ModelConfig",
    "Sequences",
    "generate",
    "pack_ids",
    "sequence_nll",
]
