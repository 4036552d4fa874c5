"""Check this machine: `python -m megalong.doctor`.

Says what there is and what is missing, and how to get it, and lets two processes talk to each other
and compute. Exit code 0 where training can work, 1 otherwise.
"""

from __future__ import annotations

from megalong.doctor.checks import Finding, all_checks, can_train
from megalong.utils.command_line import ArgumentParser, run


def report(section: str, findings: list[Finding]) -> None:
    """One section, in columns."""
    print(f"\n{section}")
    names = max(len(finding.name) for finding in findings)
    values = max(len(finding.value) for finding in findings)
    for finding in findings:
        line = f"  {finding.mark:4}  {finding.name:{names}}  {finding.value:{values}}"
        print(f"{line}  {finding.advice}".rstrip(), flush=True)


def main() -> int:
    ArgumentParser(__doc__, prog="python -m megalong.doctor").parse_args()
    everything = []
    for section, findings in all_checks():
        report(section, findings)
        everything += findings
    if can_train(everything):
        print("\nTraining can work here.")
        return 0
    wrong = ", ".join(finding.name for finding in everything if finding.mark == "FAIL")
    print(f"\nTraining cannot work here yet: {wrong}.")
    return 1


if __name__ == "__main__":
    run(main)
