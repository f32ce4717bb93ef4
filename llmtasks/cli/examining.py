"""``doctor``: what in the configuration and on the servers will bite."""

from __future__ import annotations

import sys

import click

from llmtasks.cli import UNEXAMINED, tables
from llmtasks.cli.target import station_of
from llmtasks.doctor import CHECKS, Report, Severity, examine
from llmtasks.errors import ConfigurationError, LLMTasksError
from llmtasks.wording import counted

_WIDTH = max(len(check.name) for check in CHECKS)


@click.command()
@click.option(
    "--fail-on",
    type=click.Choice([str(Severity.WARNING), str(Severity.ERROR)]),
    default=str(Severity.ERROR),
    show_default=True,
    help="Exit with 1 after findings that are at least so bad.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(context: click.Context, fail_on: str, as_json: bool) -> None:
    """Say what in the configuration and on the servers will bite, why, and what to do.

    It only reads. Exit code: 0 nothing as bad as --fail-on, 1 findings, 2 a check could not run.
    """
    try:
        at = station_of(context, functions=True)
    except LLMTasksError:
        raise
    except Exception as error:  # whatever the app's modules raise
        raise ConfigurationError(f"the app's modules cannot be imported: {type(error).__name__}: {error}") from error
    report = examine(at, _say if sys.stderr.isatty() else lambda _: None)
    if sys.stderr.isatty():
        click.echo("\r".ljust(_WIDTH + 11) + "\r", err=True, nl=False)
    if as_json:
        tables.print_json(report)
    else:
        _print(report)
    if report.has(Severity(fail_on)):
        context.exit(1)
    if any(item.failed for item in report.not_run):
        context.exit(UNEXAMINED)


def _say(name: str) -> None:
    click.echo(f"\rchecking {name.ljust(_WIDTH)}", err=True, nl=False)


def _print(report: Report) -> None:
    for finding in report.findings:
        tables.print_block(
            [
                ("severity", str(finding.severity)),
                ("code", finding.code),
                ("found", finding.found),
                ("why", finding.why),
                ("fix", finding.fix),
            ]
        )
        click.echo()
    for reason in dict.fromkeys(item.reason for item in report.not_run):
        names = [item.check for item in report.not_run if item.reason == reason]
        click.echo(f"not run: {', '.join(names)}: {reason}")
    counts = [
        counted(sum(finding.severity is severity for finding in report.findings), str(severity))
        for severity in Severity
    ]
    click.echo(f"{', '.join(counts)}; {counted(len(report.passed), 'check')} found nothing")
