"""Which tests pytest is asked for."""

import argparse

from _pytest.mark.expression import Expression


def selects_gpu_tests(arguments: list[str]) -> bool:
    """Whether pytest's arguments ask for tests because they need a GPU."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-m", default="")
    expression = Expression.compile(parser.parse_known_args(arguments)[0].m)

    def selects(*marks: str) -> bool:
        return expression.evaluate(lambda name, **kwargs: name in marks)

    return any(selects("gpu", *others) > selects(*others) for others in ([], ["slow"]))
