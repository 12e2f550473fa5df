"""Serve Mixture-of-Experts checkpoints made with fairseq: a fairseq `--user-dir` plugin, and `load` for Python.

This file imports nothing on purpose: fairseq imports `tasks/` and `models/` by itself, the pure rooms (`gating`,
`trace`) are of use without fairseq, and `load` comes in when it is asked for.
"""

__version__ = "0.1.0"

_EXPORTS = {"load": "load", "register": "load"}  # name -> the module in serving/ that has it


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.serving.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])


class _Folders(list):
    """The package's folders, of which fairseq asks whether its `--user-dir` is one.

    It asks only where the package has been imported before, and then would import neither tasks nor models.
    """

    def __contains__(self, folder) -> bool:
        found = super().__contains__(folder)
        if found:
            __getattr__("register")()
        return found


__path__ = _Folders(__path__)
