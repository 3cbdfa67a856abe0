"""Mutated headers and configurations: mutations, a runner that measures, an atheris target."""
