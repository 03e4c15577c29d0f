"""Check that each sabotage makes its gates fail and that no gate fails without one: `nox -s bench_selftest`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.figures import RESULTS
from benchmarks.sabotage import ALL


def judged(name: str) -> tuple[dict[str, str], dict[str, str], int]:
    """Return the gates that failed and that passed under a sabotage, with their values, and the exit status."""
    suite, *options = ALL[name].run
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(Path(__file__).with_name(suite)),
        "-q",
        f"--sabotage={name}",
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    path = RESULTS / f"sabotage-{name}.json"
    if done.returncode not in {0, 1} or not path.exists():
        sys.exit(f"the run with {name} did not finish:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    gates = json.loads(path.read_text(encoding="utf-8"))["gates"]
    path.unlink()
    down, up = (
        {
            gate["name"]: f"{gate['value']:.4g}, limit {gate['limit']:g}"
            for gate in gates
            if gate["passed"] is passed and gate["value"] is not None
        }
        for passed in (False, True)
    )
    return down, up, done.returncode


def main() -> int:
    """Run every sabotage, and return 1 if a gate should have failed but passed, or the reverse."""
    wrong = 0
    for name, sabotage in ALL.items():
        down, up, status = judged(name)
        stood = [gate for gate in sabotage.falls if gate not in down]
        is_part = sabotage.run[0] != "test_counts.py"  # most gates then have no figure, so pytest's status is 1
        wrong += bool(stood) or (not sabotage.falls and bool(down)) or (not is_part and bool(status) != bool(down))
        print(f"{name}: {sabotage.what}")
        for gate, told in down.items():
            print(f"    FAILED {gate}: {told}")
        for gate in stood:
            print(f"    PASSED {gate}, which should have failed")
        for gate, told in up.items() if is_part else ():
            print(f"    passed {gate}: {told}")
        if not down and not sabotage.falls:
            print("    all passed")
    print(f"{len(ALL) - wrong} passed, {wrong} failed")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
