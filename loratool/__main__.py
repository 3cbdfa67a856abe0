"""``python -m loratool``."""

from loratool.cli import main

if __name__ == "__main__":
    main()
