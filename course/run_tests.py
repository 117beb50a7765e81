"""The part of grade.py that runs a student's code: one assignment, in a process that may hang or die.

grade.py starts it and sends the order on standard input: a line of JSON. It answers in a file, with the secret from
the order. So a submission cannot answer by printing, and not by ending the process early.
"""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from handout import ASSIGNMENTS, PROGRAMS, PROJECT, copy_files, graft  # noqa: E402


class Verdict:
    """A pytest plugin that counts tests and notes why the first one failed."""

    def __init__(self):
        self.tests, self.passed, self.says = 0, 0, ""

    def pytest_collection_finish(self, session) -> None:
        self.tests = len(session.items)

    def pytest_runtest_makereport(self, item, call) -> None:
        if call.when == "call" and call.excinfo is None:  # a skipped test raises, too, and has not passed
            self.passed += 1

    def pytest_exception_interact(self, node, call, report) -> None:
        self.says = self.says or in_words(call.excinfo.value)


def in_words(error: BaseException) -> str:
    """What a student should read of an error: the message of the test, or what broke and where."""
    if isinstance(error, AssertionError) and str(error):
        return str(error).split("\nassert ")[0]  # pytest adds the values after the test's own words
    if isinstance(error, NotImplementedError):
        return f"not written yet: {error}"
    place, trace, here = "", error.__traceback__, Path.cwd()
    while trace:  # the innermost line of the programs
        file = Path(trace.tb_frame.f_code.co_filename)
        if file.is_relative_to(here) and not file.is_relative_to(here / "tests"):
            place = f" ({file.relative_to(here)}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}{place}"


def assemble(number: int, submission: Path, workplace: Path) -> None:
    """The teacher's project, with the student's files of this assignment.

    In these files too, the functions of all other assignments are the teacher's: a mistake counts once.
    """
    copy_files(PROGRAMS, workplace)
    for file, names in ASSIGNMENTS[number].functions.items():
        theirs, ours = submission / file, (PROJECT / file).read_text()
        if not theirs.is_file():
            raise FileNotFoundError(f"there is no {file}")
        others = [name for n, other in ASSIGNMENTS.items() if n != number for name in other.functions.get(file, [])]
        (workplace / file).write_text(graft(theirs.read_text(encoding="utf-8-sig"), others, ours))


def run(number: int, submission: Path, workplace: Path) -> dict:
    """Run the tests of one assignment in an empty folder `workplace`. Returns how many there are, passed, and why."""
    verdict = Verdict()
    os.chdir(workplace)
    sys.path.insert(0, str(workplace))
    torch.set_num_threads(1)
    try:
        assemble(number, submission, workplace)
        for file in ASSIGNMENTS[number].functions:
            importlib.import_module(file.removesuffix(".py").replace("/", "."))
    except BaseException as error:  # also SystemExit: a file that ends the program when it is imported
        verdict.says = in_words(error)
    else:
        # Only now, when the student's files have done what they do on import: they cannot change what comes later.
        tests = workplace / "tests"
        shutil.rmtree(tests, ignore_errors=True)
        tests.mkdir()
        for file in (f"test_assignment{number}.py", "conftest.py"):
            shutil.copy(PROJECT / "tests" / file, tests)
        (workplace / "pytest.ini").write_text("[pytest]\n")
        pytest.main([str(tests / f"test_assignment{number}.py"), "-q", "-p", "no:cacheprovider", "--tb=no",
                     "-c", str(workplace / "pytest.ini")], plugins=[verdict])
    return vars(verdict)


def obey(order: dict) -> None:
    """Do what the order says, write the answer, and end."""
    verdict = run(order["assignment"], Path(order["submission"]), Path(order["workplace"]))
    Path(order["answer"]).write_text(json.dumps(verdict | {"secret": order["secret"]}))
    os._exit(0)  # threads that a submission has started must not keep the process alive


if __name__ == "__main__":
    obey(json.loads(sys.stdin.readline()))
