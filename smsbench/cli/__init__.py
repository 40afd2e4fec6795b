"The command line; `main` and the commands are imported when they are asked for."


def __getattr__(name):
    from importlib import import_module

    if name.startswith('__'):
        raise AttributeError(name)
    return getattr(import_module('smsbench.cli.commands'), name)
