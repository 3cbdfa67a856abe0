"""Makes the documentation: ``python -m docs.make`` (see `docs.make.__main__`)."""
