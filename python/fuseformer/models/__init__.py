"""The reference Transformer, built of packed blocks on the fused ops."""
