"""An encoder-only language model of the reference blocks, which fills in masked tokens."""

from typing import ClassVar

from .language_model import LanguageModel


class MaskedLM(LanguageModel):
    """A language model whose tokens see both sides; its targets are the tokens that were masked.

    Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2018, section
    3.1.
    """

    causal: ClassVar[bool] = False
