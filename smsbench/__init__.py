__version__ = "0.1.0"

_DOOR = {
    'read_answer': 'smsbench.answers.reader'
}  # name -> module that holds it, imported at first use
__all__ = list(_DOOR)


def __getattr__(name):
    "A name of the door, imported when it is first asked for: `import smsbench` loads nothing."
    if name not in _DOOR:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module

    return getattr(import_module(_DOOR[name]), name)


def __dir__():
    return sorted({*globals(), *_DOOR})
