"""``doctor``: every check's findings, each problem with its fix. No check can end the others.

``python -m realtime.doctor`` answers too where a package is broken and ``sightline`` itself does not start.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from engines.text import displayable
from realtime.checks import CHECKS, Finding, Findings


def examine(checks: Sequence[Callable[[], Findings]] = CHECKS) -> list[Finding]:
    """Every check's findings; a check that fails is itself a finding."""
    findings: list[Finding] = []
    for check in checks:
        name = (check.__doc__ or check.__name__).split(":")[0].rstrip(".")
        try:
            findings += check()
        except Exception as error:  # whatever is broken here must not hide what else is
            found = f"cannot be told: {type(error).__name__}: {str(error).strip() or 'no reason given'}".splitlines()[0]
            findings.append(Finding(name, "problem", found, "mend what is named before; else report this line"))
    return findings


def is_fit(findings: list[Finding]) -> bool:
    """Whether everything that running on the processor needs is there."""
    return not any(finding.needed and finding.state == "problem" for finding in findings)


def as_json(findings: list[Finding]) -> str:
    """``ok`` and ``findings`` (``name, state, found, fix, needed``)."""
    return json.dumps({"ok": is_fit(findings), "findings": [asdict(finding) for finding in findings]})


def print_findings(findings: list[Finding], to: Any) -> None:
    """As lines with their fixes, on a rich console."""
    marks = {"ok": "[green]ok     [/]", "absent": "[dim]absent [/]", "problem": "[red]problem[/]"}
    from rich.markup import escape

    for finding in findings:
        to.print(
            f"{marks[finding.state]}  [bold]{escape(finding.name)}[/]: {escape(finding.found)}", highlight=False, soft_wrap=True
        )
        if finding.fix:
            to.print(
                f"         → {escape(finding.fix)}", style="yellow" if finding.state == "problem" else "dim", soft_wrap=True
            )
    fit = is_fit(findings)
    words = (
        "everything that running on the processor needs is here" if fit else "something that running needs is broken, see above"
    )
    to.print(words, style="bold green" if fit else "bold red")


def main() -> None:
    """``python -m realtime.doctor``: the same where ``sightline`` does not start."""
    findings = examine()
    for finding in findings:
        fix = f"\n         → {finding.fix}" if finding.fix else ""
        print(f"{finding.state:8} {displayable(finding.name)}: {displayable(finding.found)}{fix}")
    sys.exit(not is_fit(findings))


if __name__ == "__main__":
    main()
