"""The `caprese` command, the demo, and a client and launcher of `vllm serve`."""
