"""One FF block alone: its time, its bandwidth, and the bytes that it must read."""
