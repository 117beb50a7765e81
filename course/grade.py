"""Grade students' copies: each assignment's tests, in a process of its own and with a time limit.

    python course/grade.py FOLDER                        # a table, with the first failing expectation in words
    python course/grade.py submissions/*                 # many
    python course/grade.py submissions/* --json          # for a class list
    python course/grade.py FOLDER --assignments 1-3 --seconds 120

The tests are those of this clone, and so is everything else but the files that an assignment names (see handout.py).
Nothing else of a submission is read: its tests, its conftest.py, its pytest.ini and its plugins play no part.

A submission that hangs, exits, kills its process, prints results of its own or fails on import gets 0 points for the
assignment, and the next one goes on. This is no sandbox: the code runs with your rights. It can read and change your
files, start other processes, use the network, and look for the grader's secret in its own process. Grade the work of
people whom you do not trust in a container without a network, with this clone mounted read-only.
"""

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from handout import ASSIGNMENTS, parse_numbers

POINTS = 10  # of each assignment; every test of it is worth the same share
SECONDS = 60  # an honest submission needs less than ten on one core


def grade(folder: Path, number: int, seconds: float = SECONDS) -> dict:
    """Points of one assignment: {"points", "of", "passed", "tests", "says"}, where `says` explains what is missing."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        answer, workplace = Path(place) / "answer.json", Path(place) / "work"
        workplace.mkdir()
        order = {"assignment": number, "submission": str(folder.resolve()), "workplace": str(workplace),
                 "answer": str(answer), "secret": secrets.token_hex()}
        ending = run_process(order, seconds)
        verdict = read_answer(answer, order["secret"])
    if ending or verdict is None:
        verdict = {"tests": 0, "passed": 0, "says": ending or "the process ended before its tests did"}
    passed, tests = verdict["passed"], verdict["tests"]
    says = verdict["says"] or ("" if 0 < passed == tests else "the tests were stopped before their end")
    return {"points": POINTS * passed // max(1, tests), "of": POINTS, "passed": passed, "tests": tests,
            "says": one_line(says)}


def run_process(order: dict, seconds: float) -> str:
    """Run run_tests.py with this order. Returns "" if it ended well, or how it ended."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYTEST"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    # What it prints is thrown away. A pipe would also stay open for as long as a process that it has left behind.
    process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("run_tests.py"))], env=environment,
                               cwd=order["workplace"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        with process.stdin as pipe:
            pipe.write(json.dumps(order).encode() + b"\n")
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"no end after {seconds:g} seconds"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # it, and what it has started
        except ProcessLookupError:
            pass
        process.wait()
    return f"the process ended with status {status} before its tests did" if status else ""


def read_answer(path: Path, secret: str) -> dict | None:
    """The answer of run_tests.py, or None if there is none, or one that somebody else wrote."""
    try:
        answer = json.loads(path.read_text())
        return answer if answer.pop("secret") == secret else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def one_line(text: str, longest: int = 300) -> str:
    """Text of a submission, fit for a terminal: no line breaks, no control characters, not endless."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= longest else f"{text[:longest]} …"


def table(folder: Path, verdicts: dict[int, dict]) -> str:
    """One submission's points, an assignment a line."""
    width = max(len(ASSIGNMENTS[number].title) for number in verdicts)
    lines = [str(folder)]
    for number, verdict in verdicts.items():
        lines.append(f"  {number}  {ASSIGNMENTS[number].title:<{width}}  {verdict['points']:>2} of {verdict['of']}"
                     f"  {verdict['says']}".rstrip())
    total, of = (sum(verdict[key] for verdict in verdicts.values()) for key in ("points", "of"))
    return "\n".join([*lines, f"     {'total':<{width}}  {total:>2} of {of}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", help="students' copies")
    parser.add_argument("--assignments", type=parse_numbers, default=list(ASSIGNMENTS), metavar="1-4",
                        help="which ones to grade (default: all)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of each assignment (default: 60)")
    parser.add_argument("--json", action="store_true", help="print {folder: {total, assignments}} instead of tables")
    arguments = parser.parse_args()
    folders = [folder for folder in arguments.folders if folder.is_dir()]
    if not folders:
        sys.exit(f"error: there is no folder '{arguments.folders[0]}': name the folder of a student's copy")
    others = [str(path) for path in arguments.folders if path not in folders]

    results = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {folder: {number: pool.submit(grade, folder, number, arguments.seconds)
                         for number in arguments.assignments} for folder in folders}
        for folder, parts in jobs.items():
            verdicts = {number: job.result() for number, job in parts.items()}
            results[str(folder)] = {"total": sum(verdict["points"] for verdict in verdicts.values()),
                                    "assignments": verdicts}
            if not arguments.json:
                print(table(folder, verdicts), flush=True)
    if arguments.json:
        print(json.dumps(results, indent=2))
    if others:
        sys.exit(f"error: no folder, so not graded: {', '.join(others)}")


if __name__ == "__main__":
    main()
