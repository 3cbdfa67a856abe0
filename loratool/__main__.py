"""``python -m loratool``."""

if __name__ == "__main__":
    try:
        from loratool.cli import main

        main()
    except KeyboardInterrupt:  # before `main` has caught it: nothing has begun
        raise SystemExit(130) from None
