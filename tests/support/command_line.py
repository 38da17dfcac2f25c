"""The command line, run in this process."""

from typer.testing import CliRunner

from tsugiki import cli


def invoke(*arguments):
    """Run a command; return the result, or raise what is not an exit."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def printed(*arguments):
    """Run a command; return what it printed on standard output."""
    return invoke(*arguments).stdout
