"""The demo: everything from a Python installation to two compared students, on a laptop."""
