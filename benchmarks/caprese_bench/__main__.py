"""`python -m caprese_bench` is `caprese bench`."""

from .cli import main

if __name__ == "__main__":
    main()
