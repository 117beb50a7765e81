"""The course: what a student receives, what the grader gives for it, and that it is not fooled.

The assignments' own tests lie in test_assignment1.py to test_assignment7.py. What a mistake looks like to a student is
written in course/mistakes/.
"""

import ast
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

CODE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CODE / "course"))
import grade  # noqa: E402
import handout  # noqa: E402
import run_tests  # noqa: E402

MISTAKES = {number: yaml.safe_load((CODE / f"course/mistakes/assignment{number}.yaml").read_text())
            for number in handout.ASSIGNMENTS}


def run_script(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> Path:
    """A folder with two students' copies: `blank`, and `solved`."""
    folder = tmp_path_factory.mktemp("copies")
    for arguments in (["blank"], ["solved", "--solutions"]):
        made = run_script(CODE / "course/handout.py", folder / arguments[0], *arguments[1:])
        assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="session", autouse=True)
def verdicts(request, tmp_path_factory):
    """{id of a test's parameters: a future of the verdict that it asks for}, for all tests of this session.

    They are graded on the cores that the other tests leave idle (conftest.py puts those that ask for them at the end),
    and in forks of a process that has torch, which are quicker than grade.py's processes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision.datasets", "torchvision.transforms.v2", "run_tests"])

    def hand_in(number: int, wrong: list[int] | dict) -> Path:
        place = tmp_path_factory.mktemp("work")
        (place / "work").mkdir()
        if isinstance(wrong, list):
            handout.write_copy(place / "submission", wrong)
        else:
            write_mistake(place / "submission", number, wrong)
        return place

    def judge(number: int, place: Path) -> dict:
        answer = place / "answer.json"
        order = dict(assignment=number, submission=str(place / "submission"), workplace=str(place / "work"),
                     answer=str(answer), secret="")
        process = context.Process(target=run_tests.obey, args=(order,))
        process.start()
        process.join(120)
        return json.loads(answer.read_text())

    asked = [item.callspec for item in request.session.items if item.get_closest_marker("last")]
    # All are written before any thread begins: two that parse Python at the same time can disturb each other (in 3.11,
    # a SystemError about recursion depth).
    places = {call.id: hand_in(call.params["number"], call.params["wrong"]) for call in asked}
    pool = ThreadPoolExecutor(max(1, os.cpu_count() - 1))
    yield {call.id: pool.submit(judge, call.params["number"], places[call.id]) for call in asked}
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def verdict(request, verdicts) -> dict:
    """Of the tests of an assignment on a submission, for a test with these parameters:

    number    the assignment
    wrong     what is wrong with the submission: the assignments that are left blank, or one of MISTAKES
    """
    return verdicts[request.node.callspec.id].result()


# -- The student's copy -------------------------------------------------------------------------------------------


def test_every_listed_function_exists_and_belongs_to_one_assignment():
    listed = [(file, name) for assignment in handout.ASSIGNMENTS.values()
              for file, names in assignment.functions.items() for name in names]
    assert len(listed) == len(set(listed))
    for file, name in listed:
        assert name in handout.find_functions((CODE / file).read_text()), f"{file} has no function {name} any more"


def test_a_function_loses_its_body_and_keeps_all_else():
    source = '''import x  # stays
class A:
    @x.no_grad()
    def f(self, a: int,
          b=2) -> int:
        """What f does."""
        # how
        def inner(c):
            return c
        return inner(a)  # so

    def g(self): # no docstring
        # a secret
        return 1
'''
    assert handout.hollow(source, ["A.f", "A.g"], 3) == '''import x  # stays
class A:
    @x.no_grad()
    def f(self, a: int,
          b=2) -> int:
        """What f does."""
        raise NotImplementedError("assignment 3: A.f")

    def g(self): # no docstring
        raise NotImplementedError("assignment 3: A.g")
'''


def test_a_function_of_another_file_takes_its_place():
    here = "import a\ndef f():\n    return 1\n\nclass C:\n    def m(self):\n        return 2\n"
    there = "class C:\n    # other lines\n\n    @property\n    def m(self):\n        # why\n        return 3\n"
    assert handout.graft(here, ["C.m", "missing"], there) == here.replace(
        "    def m(self):\n        return 2", "    @property\n    def m(self):\n        # why\n        return 3")


def test_the_students_copy(copies):
    for path in (copies / "blank").rglob("*.py"):
        ast.parse(path.read_text())
    tokenizer = (copies / "blank/tokenizer.py").read_text()
    assert 'raise NotImplementedError("assignment 3: Quantizer.forward")' in tokenizer
    assert "copied to l2(z) unchanged" in tokenizer and "(codes - z).detach()" not in tokenizer, \
        "docstring yes, solution no"
    assert (copies / "solved/tokenizer.py").read_text() == (CODE / "tokenizer.py").read_text()
    inside = {str(path.relative_to(copies / "blank")) for path in (copies / "blank").rglob("*") if path.is_file()}
    assert {"course/README.md", "tests/conftest.py", "tests/test_assignment7.py", "configs/demo.yaml"} <= inside
    assert {f"support/{path.name}" for path in (CODE / "support").glob("*.py")} <= inside
    assert not {"course/answers.md", "course/grade.py", "tests/test_beitv2.py", "tests/steps.py"} & inside
    assert not [name for name in inside if "mistakes" in name]


def test_some_assignments_only(tmp_path):
    assert run_script(CODE / "course/handout.py", tmp_path / "a", "--assignments", "2,6-7").returncode == 0
    numbers = {int(n) for path in (tmp_path / "a").rglob("*.py")
               for n in re.findall(r'NotImplementedError\("assignment (\d)', path.read_text())}
    assert numbers == {2, 6, 7}


@pytest.mark.parametrize("arguments, words", [
    (["{there}"], "is not empty: choose another folder"), (["new", "--assignments", "9"], "such as 3, 1-4"),
    (["new", "--assignments", "x"], "such as 3, 1-4")])
def test_mistakes_of_a_teacher(tmp_path, arguments, words):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").touch()
    done = run_script(CODE / "course/handout.py", *(a.format(there=tmp_path / "there") for a in arguments))
    assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr


def test_no_folder_to_grade(tmp_path):
    done = run_script(CODE / "course/grade.py", tmp_path / "nothing")
    assert done.returncode == 1 and "name the folder of a student's copy" in done.stderr


# -- Points -------------------------------------------------------------------------------------------------------


def test_points_of_two_copies_as_a_teacher_asks_for_them(copies):
    done = run_script(CODE / "course/grade.py", copies / "blank", copies / "solved", copies / "bob.zip",
                      "--assignments", "1,6", "--json")
    assert done.returncode == 1 and f"no folder, so not graded: {copies / 'bob.zip'}" in done.stderr
    results = json.loads(done.stdout)
    blank, solved = results[str(copies / "blank")], results[str(copies / "solved")]
    assert blank["total"] == 0 and solved["total"] == 20
    for number in ("1", "6"):
        verdict = blank["assignments"][number]
        assert verdict["passed"] == 0 < verdict["tests"], verdict
        assert verdict["says"].startswith(f"not written yet: assignment {number}: "), verdict


@pytest.mark.last
@pytest.mark.parametrize("number", handout.ASSIGNMENTS)
@pytest.mark.parametrize("wrong", [pytest.param(list(handout.ASSIGNMENTS), id="blank"), pytest.param([], id="solved")])
def test_a_blank_copy_has_no_points_and_a_solved_one_all(number, wrong, verdict):
    assert verdict["passed"] == (0 if wrong else verdict["tests"]) and verdict["tests"] > 0, verdict
    assert not wrong or verdict["says"].startswith(f"not written yet: assignment {number}: "), verdict


@pytest.mark.last
@pytest.mark.parametrize("number, wrong", [
    pytest.param(number, sorted(handout.ASSIGNMENTS.keys() - {filled}), id=f"{number}-when {filled} is filled in")
    for filled, assignment in handout.ASSIGNMENTS.items() for number, other in handout.ASSIGNMENTS.items()
    if set(assignment.functions) & set(other.functions)])  # where they share no file, all is that of a blank copy
def test_one_assignment_filled_in_gives_its_points_alone(number, wrong, verdict):
    assert (verdict["passed"] > 0) == (number not in wrong), verdict


def section_of(number: int) -> str:
    return (CODE / "course/README.md").read_text().split(f"\n## {number}. ")[1].split("\n---\n")[0]


def needs_of(number: int) -> tuple[list[str], set[int]]:
    """What its section says: other assignments' functions that the tests need, and assignments of the experiment."""
    tests, experiment = re.search(r"\nThe tests need (.*?);\s+the experiment needs (.*?)\.\n", section_of(number),
                                  re.DOTALL).groups()
    numbers = [int(n) for n in re.findall(r"\d", experiment)]
    between = range(min(numbers), max(numbers) + 1) if " to " in experiment else numbers
    return re.findall("`(.*?)`", tests), {*between, number}


@pytest.mark.parametrize("number", handout.ASSIGNMENTS)
def test_an_assignment_needs_nothing_but_what_its_section_names(number, tmp_path):
    """The student's own test command, in a copy where this assignment is solved, and nothing else but that."""
    handout.write_copy(tmp_path, [])
    needed, experiment = needs_of(number)
    assert max(experiment) == number
    for other, assignment in handout.ASSIGNMENTS.items():
        for file, names in assignment.functions.items():
            assert other <= number or not set(needed) & set(names), "never of later ones"
            source = (tmp_path / file).read_text()
            blank = [name for name in names if other != number and name not in needed]
            (tmp_path / file).write_text(handout.hollow(source, blank, other))
    command = [sys.executable, "-m", "pytest", "-q", "--strict-markers", f"tests/test_assignment{number}.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_experiments_need_no_other_assignments_than_their_section_names(tmp_path):
    """Of assignments 4 to 6, which need runs of each other: the first command of each script, on few images."""
    few = ["data.train_images=64", "data.val_images=64", "tokenizer.epochs=1", "tokenizer.warmup_epochs=0",
           "pretrain.epochs=1", "pretrain.warmup_epochs=0", "finetune.probe_epochs=1"]
    (tmp_path / "runs").mkdir()
    for number in (4, 5, 6):
        folder = tmp_path / str(number)
        handout.write_copy(folder, [other for other in handout.ASSIGNMENTS if other not in needs_of(number)[1]])
        (folder / "runs").symlink_to(tmp_path / "runs")
        commands = re.findall(r"^(torchrun|python) (\S+)(.*)$", section_of(number), re.MULTILINE)
        first = {script: rest.split() + few * (how == "torchrun") for how, script, rest in reversed(commands)}
        assert first
        # All in one process: to start Python with torch takes longer than most of these runs.
        program = f"import runpy, sys\nfor sys.argv in {[[script, *first[script]] for script in reversed(first)]}:\n"
        program += "    runpy.run_path(sys.argv[0], run_name='__main__')"
        done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", handout.ASSIGNMENTS)
def test_the_handout_names_each_function_and_its_file(number):
    section = section_of(number)
    row = re.search(rf"^\| {number} \|.*$", (CODE / "course/README.md").read_text(), re.MULTILINE)[0]
    for file, names in handout.ASSIGNMENTS[number].functions.items():
        assert f"`{file}`" in row and (f"`{file}`" in section or f"| `{file.removesuffix('.py')}." in section)
        for name in names:
            assert re.search(rf"^\| `([a-z0-9]+\.)?{re.escape(name)}\(", section, re.MULTILINE), name


@pytest.mark.parametrize("number", handout.ASSIGNMENTS)
def test_each_test_is_marked_with_its_assignment(number):
    text = (CODE / f"tests/test_assignment{number}.py").read_text()
    assert f"\npytestmark = pytest.mark.assignment({number})\n" in text


# -- Mistakes -----------------------------------------------------------------------------------------------------


class Replacement(ast.NodeTransformer):
    """Replaces each statement or expression that equals `right` by `wrong`, and counts them."""

    def __init__(self, right: str, wrong: str):
        self.right, self.wrong, self.count = ast.parse(right).body[0], ast.parse(wrong).body, 0
        if isinstance(self.right, ast.Expr):  # an expression: a part of a statement, or a statement of its own
            self.right = self.right.value
            self.wrong = self.wrong[0].value if isinstance(self.wrong[0], ast.Expr) else self.wrong

    def visit(self, node):
        whole = isinstance(self.wrong, list) and isinstance(node, ast.Expr)  # `pass` in place of a call
        if ast.dump(node.value if whole else node) == ast.dump(self.right):
            self.count += 1
            return self.wrong
        return self.generic_visit(node)


def write_mistake(folder: Path, number: int, mistake: dict) -> None:
    """Write the files of assignment `number` into `folder`, with this mistake in one of them."""
    handout.copy_files(list(handout.ASSIGNMENTS[number].functions), folder)
    name = mistake["in"]
    file = next(file for file, names in handout.ASSIGNMENTS[number].functions.items() if name in names)
    source = (CODE / file).read_text()
    function = handout.find_functions(source)[name]
    place, indent = handout.lines_of(function), " " * function.col_offset
    replacement = Replacement(mistake["right"], mistake["wrong"])
    text = ast.unparse(ast.fix_missing_locations(replacement.visit(function)))
    assert replacement.count == 1, \
        f"{name} has {replacement.count} times what this mistake replaces: {mistake['right']}"
    (folder / file).write_text(handout.replace_lines(source, {place: indent + text.replace("\n", f"\n{indent}")}))


@pytest.mark.last
@pytest.mark.parametrize("number, wrong", [pytest.param(number, mistake, id=f"{number}-{mistake['mistake'][:50]}")
                                           for number, mistakes in MISTAKES.items() for mistake in mistakes])
def test_each_mistake_is_caught_and_its_message_says_why(number, wrong, verdict):
    assert verdict["passed"] < verdict["tests"], f"nobody notices: {wrong['mistake']}"
    assert any(words in verdict["says"] for words in wrong["caught"].split("|")), verdict["says"]


def test_there_are_six_mistakes_for_each_assignment():
    assert all(len(mistakes) >= 6 for mistakes in MISTAKES.values())


# -- Hostile submissions ------------------------------------------------------------------------------------------

# What is put in front of data.py, which assignment 2 needs, and what the grader says of it.
HOSTILE = {
    "hangs": ("while True: pass", "no end after"),
    "exits": ("import sys; sys.exit(0)", "SystemExit"),
    "raises": ("raise RuntimeError('no\\n\\x1b[2Jway')", "RuntimeError: no [2Jway (data.py, line 1)"),
    "is no Python": ("def f(:", "SyntaxError"),
    "leaves with success": ("import os; os._exit(0)", "the process ended before its tests did"),
    "is killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with status -9"),
    "prints a summary": ("print('=== 14 passed in 0.12s ===', flush=True)\nimport os; os._exit(0)", "before its tests"),
    "answers itself": ("import json, os\n"
                       "open('../answer.json', 'w').write(json.dumps(dict(tests=9, passed=9, says='', secret='')))\n"
                       "os._exit(0)", "before its tests"),
    "leaves a process behind": ("import subprocess; subprocess.Popen(['sleep', '60'])", "not written yet"),
    "edits the tests": ("import os\nos.makedirs('tests')\n"
                        "for n in ('test_assignment2.py', 'conftest.py'):\n"
                        "    open('tests/' + n, 'w').write('def test(): pass')", "not written yet"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_submission_gets_nothing(how, copies, tmp_path):
    """Everything else of assignment 2 is blank, so that any point would be stolen."""
    code, says = HOSTILE[how]
    shutil.copytree(copies / "blank", tmp_path / "copy")
    (tmp_path / "copy/data.py").write_text(f"{code}\n" + (CODE / "data.py").read_text().replace(
        "def block_mask(", "def block_mask(*a, **k):\n    raise NotImplementedError('assignment 2')\n\n\ndef unused("))
    verdict = grade.grade(tmp_path / "copy", 2, seconds=4 if how == "hangs" else grade.SECONDS)
    assert verdict["points"] == 0 and says in verdict["says"], verdict


@pytest.mark.parametrize("body, says", [("import pytest; pytest.skip('later')", "stopped before"),
                                        ("import pytest; pytest.exit('done', returncode=0)", "stopped before"),
                                        ("import os; os._exit(0)", "before its tests"),
                                        ("import sys; sys.exit(0)", "SystemExit")])
def test_a_function_that_ends_its_test_gets_nothing(body, says, copies, tmp_path):
    shutil.copytree(copies / "blank", tmp_path / "copy")
    for file in ("data.py", "beitv2.py"):
        text = (tmp_path / "copy" / file).read_text()
        (tmp_path / "copy" / file).write_text(re.sub(r'raise NotImplementedError\("assignment 2: .*', body, text))
    verdict = grade.grade(tmp_path / "copy", 2)
    assert verdict["points"] == 0 and says in verdict["says"], verdict


def test_files_beside_the_sources_play_no_part(copies, tmp_path, monkeypatch):
    """A sitecustomize, a plugin, a pytest.ini, a conftest and tests of one's own; also when started from within."""
    copy = tmp_path / "copy"
    shutil.copytree(copies / "blank", copy)
    for name in ("sitecustomize.py", "usercustomize.py", "conftest.py", "tests/conftest.py", "plugin.py", "pytest.py"):
        (copy / name).write_text(f"open({str(tmp_path / 'was here')!r}, 'w')\nimport os\nos._exit(0)\n")
    (copy / "pytest.ini").write_text("[pytest]\naddopts = -p plugin --co\n")
    (copy / "tests/test_assignment2.py").write_text("def test(): pass\n")
    monkeypatch.setenv("PYTHONPATH", str(copy))
    monkeypatch.setenv("PYTEST_ADDOPTS", "--co")
    monkeypatch.setenv("PYTEST_PLUGINS", "plugin")
    monkeypatch.chdir(copy)
    verdict = grade.grade(copy, 2)
    assert verdict["points"] == 0 and verdict["says"].startswith("not written yet"), verdict
    assert not (tmp_path / "was here").exists()


def test_the_grader_says_where_a_submission_broke(copies, tmp_path):
    """Also in a file that lies in a folder."""
    shutil.copytree(copies / "blank", tmp_path / "copy")
    file = tmp_path / "copy/support/teachers.py"
    lines = file.read_text().split("\n")
    number = next(i for i, line in enumerate(lines, start=1) if 'raise NotImplementedError("assignment 4' in line)
    lines[number - 1] = lines[number - 1].split("raise")[0] + "return images[:, 3]"
    file.write_text("\n".join(lines))
    says = grade.grade(tmp_path / "copy", 4)["says"]
    assert says.startswith("IndexError: ") and says.endswith(f" (support/teachers.py, line {number})"), says


@pytest.mark.parametrize("missing", ["gone", "a folder", "no text"])
def test_a_source_that_cannot_be_read(missing, copies, tmp_path):
    shutil.copytree(copies / "solved", tmp_path / "copy")
    file = tmp_path / "copy/data.py"
    file.unlink()
    if missing == "a folder":
        file.mkdir()
    elif missing == "no text":
        file.write_bytes(b"\xff\xfe\xff")
    verdict = grade.grade(tmp_path / "copy", 2)
    says = "no data.py" if missing != "no text" else "UnicodeDecodeError"
    assert verdict["points"] == 0 and says in verdict["says"], verdict
    assert grade.grade(tmp_path / "copy", 6)["points"] == 10, "which does not need that file"


def test_the_table_names_what_is_missing():
    verdicts = {2: dict(points=7, of=10, says="75 patches should be masked, but 74 are"),
                6: dict(points=10, of=10, says="")}
    assert grade.table(Path("ada"), verdicts) == """ada
  2  Block-wise masks    7 of 10  75 patches should be masked, but 74 are
  6  Patch aggregation  10 of 10
     total              17 of 20"""
