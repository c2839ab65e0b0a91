"""The demo: everything from a Python installation to two compared students, on a laptop."""

from stages.demo.run import demo

__all__ = ["demo"]
