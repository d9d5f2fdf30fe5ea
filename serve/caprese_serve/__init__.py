"""The `caprese` command, and the demo."""
