"""The public functions and the custom ops behind them, once for all backends."""
