"""The reference Transformer: encoder-decoder, masked LM and causal LM from the same blocks."""
