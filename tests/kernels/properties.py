"""hypothesis, or where it is not installed (a GPU machine without a network) skips in its place."""

try:
    from hypothesis import HealthCheck, example, given, settings
    from hypothesis import strategies as st
except ImportError:
    import pytest

    class _Anything:
        """Takes every call and attribute that builds a strategy."""

        def __call__(self, *args, **options):
            return self

        def __getattr__(self, name):
            return self

    HealthCheck = st = _Anything()

    def given(*args, **options):
        return pytest.mark.skip(reason="hypothesis is not installed")

    def example(*args, **options):
        return lambda function: function

    settings = example

__all__ = ["HealthCheck", "example", "given", "settings", "st"]
